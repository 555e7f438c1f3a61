"""What recording costs: seconds of an optimizer step with koopt attached over those without, nothing else changed.

    python benchmarks/live_recording.py

Blocks of steps with and without koopt take turns, and the median of their ratios is printed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import torch
from torch import nn

import koopt

SIZES = {"100 weights": (8, 8, 2), "25k weights": (64, 128, 128, 10), "118k weights": (784, 128, 128, 10)}


def seconds(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return time.perf_counter() - started


def run(sizes: tuple[int, ...], batch: int) -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return model, optimizer, torch.randn(batch, sizes[0]), torch.randint(0, sizes[-1], (batch,))


def overhead(sizes: tuple[int, ...], mode: str, batch: int, pairs: int, steps: int, refused: bool) -> float:
    plain, beside = run(sizes, batch), run(sizes, batch)
    # a constant guard refuses every jump; a budget of nothing leaves recording alone
    guard = None if mode == "forecast" else (lambda: 1.0)
    koopt.attach(beside[1], beside[0], guard, mode, max_overhead=0.03 if refused else 0.0)
    for each in (plain, beside):
        seconds(*each, 500)
    return statistics.median(1 / (seconds(*plain, steps) / seconds(*beside, steps)) for _ in range(pairs)) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=101)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--refused", action="store_true", help="try jumps too, all of which a constant guard refuses")
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, sizes in SIZES.items():
        for mode in ("forecast", "jump", "auto"):
            share = overhead(sizes, mode, arguments.batch, arguments.pairs, arguments.steps, arguments.refused)
            print(f"{name}, {mode}: recording costs {100 * share:.1f} % of a step", flush=True)


if __name__ == "__main__":
    main()
