"""Fits and forecasts on a CUDA device against the CPU of the same machine: the same numbers, and how much faster.

    python benchmarks/devices.py

Snapshots lie on the device that is timed, in float32; each way takes the median of repeats, by the clock, all kernels
done. The CPU has all its threads. Differences are relative to how far the weights move, in the largest element.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from typing import TYPE_CHECKING

import torch
from timing import clock

import koopt

if TYPE_CHECKING:
    from torch import Tensor

SHAPES = {  # patches, snapshots, weights of each
    "1,000 nodes of 32 weights": (1_000, 100, 32),
    "30,000 weights one by one": (30_000, 100, 1),
    "2,000 nodes of 785 weights": (2_000, 30, 785),
    "8 layers of 250,000 weights": (8, 30, 250_000),
    "a network of 10,000,000 weights": (1, 30, 10_000_000),
}
RANKS = (4, None)
HORIZON = 50


def windows(patches: int, time: int, state: int) -> Tensor:
    """Sums of four decays and a little noise."""
    generator = torch.Generator().manual_seed(0)
    rates = torch.tensor([0.99, 0.95, 0.9, 0.7]) ** torch.arange(time)[:, None]
    found = rates @ torch.randn(patches, 4, state, generator=generator)
    return found.add_(torch.randn(patches, time, state, generator=generator), alpha=1e-4)


def forecast(snapshots: Tensor, rank: int | None) -> Tensor:
    return koopt.fit(snapshots, rank).forecast(HORIZON, max_modulus=1.0)


def seconds(snapshots: Tensor, rank: int | None, repeats: int) -> float:
    taken = []
    for _ in range(1 + repeats):
        started = clock(snapshots.device)
        forecast(snapshots, rank)
        taken.append(clock(snapshots.device) - started)
    return statistics.median(taken[1:])


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("devices.py needs a CUDA device, and torch finds none here")
    print(f"{torch.cuda.get_device_name()} against {os.cpu_count()} cores, torch {torch.__version__}")
    for (name, shape), rank in itertools.product(SHAPES.items(), RANKS):
        here = windows(*shape)
        there = here.cuda()
        own, other = forecast(here, rank), forecast(there, rank).cpu()
        moved = (here[:, -1] - here[:, 0]).abs().max()
        apart = ((own - other).abs().max() / moved).item()
        cpu, cuda = seconds(here, rank, 3), seconds(there, rank, 5)
        print(
            f"{name}, rank {rank}: CPU {1e3 * cpu:.1f} ms, CUDA {1e3 * cuda:.1f} ms, {cpu / cuda:.1f} times as fast, "
            f"differ by {apart:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
