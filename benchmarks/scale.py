"""What koopt costs by the number of weights: memory, recording, factor and combination; and a run of many weights.

    python benchmarks/scale.py                                      # slopes, in one process
    python benchmarks/scale.py --device cuda                        # the same on an accelerator
    torchrun --nproc-per-node 2 benchmarks/scale.py --weights 1e8   # real optimizer steps under FSDP2, random data

Slopes are processor times of one thread, on an accelerator seconds by the clock, all kernels done. Memory is the peak
of each process; --snapshots is the tail that jumps are made from.
"""

from __future__ import annotations

import argparse
import os
import resource
import time

import torch
import torch.distributed as dist
from timing import now
from torch import nn

import koopt
from koopt import linalg
from koopt.exchange import counting
from koopt.live.candidates import moved
from koopt.live.window import BlockMeans, Snapshots

SIZES = (2_000_000, 4_000_000, 8_000_000, 16_000_000)


def seconds(call, device: torch.device, repeats: int = 4) -> float:
    """The least of some repeats."""
    call()
    times = []
    for _ in range(repeats):
        started = now(device)
        call()
        times.append(now(device) - started)
    return min(times)


def slopes(count: int, dtype: torch.dtype, device: torch.device) -> None:
    """Seconds for 1e9 weights of one process, by a least-squares line through all sizes."""
    rows = []
    for size in SIZES:
        parameter = [torch.randn(size, device=device)]
        held = Snapshots(parameter, count, dtype, device)
        means = BlockMeans(parameter, 4, dtype, device)
        for _ in range(count):
            parameter[0].add_(torch.randn(size, device=device), alpha=1e-3)
            held.add(parameter)
        window, coefficients = held.ordered(), torch.full((count,), 1 / count, dtype=torch.float64)
        displacements = window - window[-1]
        calls = {
            "record a snapshot": lambda p=parameter, h=held: h.add(p),
            "add to a mean": lambda p=parameter, m=means: m.add(p),
            "Gram matrix": lambda w=window: linalg.gram(w, lambda rows: rows.diff(dim=-2)),
            "combination": lambda p=parameter, d=displacements, c=coefficients: moved(p, d, c),
        }
        rows.append({name: seconds(call, device) for name, call in calls.items()})
    print(f"{count} snapshots in {dtype}: {dtype.itemsize} bytes a weight and snapshot")
    print(f"seconds for 1e9 weights on {device.type}:")
    sizes = torch.tensor(SIZES, dtype=torch.float64)
    centered = sizes - sizes.mean()
    for name in rows[0]:
        times = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        slope = (centered @ times / centered.square().sum()).item()
        print(f"  {name:20} {slope * 1e9:8.2f}   (measured: {', '.join(f'{t:.4f}' for t in times.tolist())} s)")


def run(weights: float, snapshots: int, dtype: torch.dtype) -> None:
    """A few steps, one attempt to jump and a forecast under FSDP2."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    layers = 8
    width = round((weights / layers) ** 0.5)
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())))
    for layer in model[::2]:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(dist.get_rank())
    x, y = (torch.randn(4, width, generator=generator) for _ in range(2))

    def loss() -> torch.Tensor:
        return nn.functional.mse_loss(model(x), y)

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        return time.perf_counter() - started

    plain = min(step() for _ in range(2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    steps = 2 * snapshots  # of which the last half are recorded, where they are smooth
    koop = koopt.attach(
        optimizer, model, lambda: loss().item(), "jump", tail=steps, cycle=steps, max_overhead=9.0, dtype=dtype
    )
    with counting() as traffic:
        for _ in range(snapshots):
            step()
        recorded = min(step() for _ in range(snapshots - 1))
        step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if dist.get_rank() == 0:
        total, jump = sum(parameter.numel() for parameter in model.parameters()), koop.jumps[-1]
        print(f"{total:,} weights on {dist.get_world_size()} processes, {snapshots} snapshots in {dtype}")
        print(
            f"a snapshot takes {koop.nbytes / snapshots / 2**20:.0f} MiB a process, all {koop.nbytes / 2**30:.2f} GiB"
        )
        print(f"peak of a process: {before / 2**30:.2f} GiB without koopt, {peak / 2**30:.2f} GiB with an attempt")
        print(f"a step takes {plain:.2f} s, with recording {recorded:.2f} s; {traffic.bytes:,} bytes exchanged")
        print(f"the attempt took {jump.seconds:.1f} s and {jump.evaluations} guard evaluations: {jump.reason}")
    dist.barrier()  # gloo may abort a process whose peer has gone before
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, default=1e8, help="of the network, under torchrun")
    parser.add_argument("--snapshots", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", type=torch.device, default="cpu", help="for the slopes: cpu, cuda")
    given = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, given.dtype)
    if "WORLD_SIZE" in os.environ:
        run(given.weights, given.snapshots, dtype)
    else:
        slopes(given.snapshots, dtype, given.device)


if __name__ == "__main__":
    main()
