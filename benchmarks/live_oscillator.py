"""Steps to the plain run's final loss with jumps, on the paper's differential-equation solver, Adam and cosine.

    python benchmarks/live_oscillator.py --seeds 100 101 102

Guard evaluations are counted as a third of a step each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import koopt
from koopt import plot
from koopt.experiments import oscillator
from koopt.live.candidates import gain


def run(
    seed: int, steps: int, rate: float, options: dict | None, target: float | None = None, figure: str | None = None
) -> dict[str, float]:
    """The cost in steps until the target, or the final loss and the best where there is none; draws its jumps."""
    network = oscillator.Oscillator()
    weights = oscillator.initial_weights(seed)
    with torch.no_grad():
        for parameter, piece in zip(
            network.parameters(), weights.split([p.numel() for p in network.parameters()]), strict=True
        ):
            parameter.copy_(piece.view(parameter.shape))
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    times = oscillator.time_points()

    def loss_now() -> torch.Tensor:
        return oscillator.loss_by_forward(network, times)

    koop = None if options is None else koopt.attach(optimizer, network, guard=loss_now, **options)
    started, cost, best = time.perf_counter(), 0.0, float("inf")
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_now()
        best = min(best, loss.item())
        if target is not None and best <= target:
            break
        loss.backward()
        optimizer.step()
        scheduler.step()
        cost += 1
    seconds = time.perf_counter() - started
    if koop is not None and figure is not None:
        drawn = koop.report()
        reached = target is not None and best <= target
        ends = f", stopped where it reached the plain run's final loss of {target:.2e}" if reached else ""
        drawn.suptitle(f"A run of {steps:,} steps{ends}", fontsize=12)
        plot.save(drawn, Path(figure))
    jumps = [] if koop is None else koop.jumps
    evaluations = sum(jump.evaluations for jump in jumps)
    return {
        "loss": best,
        "steps": cost,
        "cost": cost + evaluations / 3,
        "accepted": sum(jump.accepted for jump in jumps),
        "attempts": len(jumps),
        "raised": sum(jump.accepted and not gain(jump.before or 0.0, jump.after or 0.0) > 0 for jump in jumps),
        "reached": float(target is None or best <= target),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=0.04)
    parser.add_argument("--option", nargs=2, action="append", default=[], metavar=("NAME", "JSON"), help="of attach")
    parser.add_argument("--figure", help="where the jumps of the last seed are drawn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = {name: json.loads(text) for name, text in arguments.option}
    shares = []
    for seed in arguments.seeds:
        plain = run(seed, arguments.steps, arguments.rate, None)
        live = run(seed, arguments.steps, arguments.rate, options, plain["loss"], arguments.figure)
        shares.append(live["cost"] / arguments.steps if live["reached"] else float("inf"))
        print(
            f"seed {seed}: plain {plain['loss']:.3e} in {arguments.steps} steps, {plain['seconds']:.1f} s; with koopt "
            f"{live['loss']:.3e} in {live['steps']:.0f} steps, cost {live['cost']:.0f} ({shares[-1]:.3f}), "
            f"{live['seconds']:.1f} s, {live['accepted']} of {live['attempts']} jumps accepted, "
            f"{live['raised']} of them raised the loss",
            flush=True,
        )
    print(f"median share of the plain cost: {statistics.median(shares):.3f}")


if __name__ == "__main__":
    main()
