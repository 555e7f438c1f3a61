"""What koopt costs beside a run that it does not help: recording alone, and attempts that are all refused.

    python benchmarks/live_recording.py
    python benchmarks/live_recording.py --parts
    python benchmarks/live_recording.py --device cuda --sizes 932k 25M

Seconds with koopt attached over seconds without: of the processor, on an accelerator by the clock, all kernels done.
One network is trained with and without in turn, by blocks of 100 steps, as does who begins; koopt sees its own steps
only, and they are as many as asked for. (Two networks of a kind differ by some percent of their own, by where their
memory lies.) Shown is the median of repeats, with the lowest and the highest; "nothing" compares plain blocks with
others, and tells how far the rest can be trusted.
Recording alone is that of a run in which each jump is accepted (mode "jump"), or refused as noise ("auto"; where
they are accepted, it pauses its means, and costs what "jump" does).
With --parts: what a snapshot, a mean, all fits, a candidate and the direction along 50 secants take, in optimizer
steps, and what the budget assumes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from typing import TYPE_CHECKING

import torch
from timing import now
from torch import nn

import koopt
from koopt.live.budget import MEAN, SNAPSHOT, Costs
from koopt.live.candidates import FAMILIES, Proposer, moved
from koopt.live.guard import measure
from koopt.live.jumps import Found
from koopt.live.records import record
from koopt.live.secants import Secants, adaptive, gradients, newton
from koopt.live.window import BlockMeans, Snapshots

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = {
    "152": (4, 10, 8, 1),
    "9k": (64, 64, 64, 10),
    "26k": (64, 128, 128, 10),
    "118k": (784, 128, 128, 10),
    "932k": (784, 512, 512, 512, 10),
    "25M": (1024, 4096, 4096, 1024),
}
BLOCK = 100  # steps, the default cycle
PAIRS = 50  # of secants


class Run:
    """A network on one batch, trained slowly, so that its motion is smooth and no attempt ends early."""

    def __init__(self, sizes: tuple[int, ...], batch: int, device: str) -> None:
        torch.manual_seed(0)
        layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
        self.model = nn.Sequential(*layers[:-1]).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.x, self.y = (torch.randn(batch, size).to(device) for size in (sizes[0], sizes[-1]))

    def loss(self) -> torch.Tensor:
        return nn.functional.mse_loss(self.model(self.x), self.y)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def seconds(self, steps: int) -> float:
        started = now(self.x.device)
        for _ in range(steps):
            self.step()
        return now(self.x.device) - started

    def seconds_without_hooks(self, steps: int) -> float:
        held = [self.optimizer._optimizer_step_pre_hooks, self.optimizer._optimizer_step_post_hooks]
        kept = [dict(hooks) for hooks in held]
        for hooks in held:
            hooks.clear()
        try:
            return self.seconds(steps)
        finally:
            for hooks, own in zip(held, kept, strict=True):
                hooks.update(own)


def overhead(
    sizes: tuple[int, ...], mode: str, batch: int, steps: int, history: int, device: str, refused: bool
) -> tuple[float, int]:
    """The share that koopt adds, and how many attempts it made."""
    run = Run(sizes, batch, device)

    def guard() -> float:
        run.loss()
        return 1.0  # nothing is ever better

    koop = None
    if mode != "nothing":
        koop = koopt.attach(run.optimizer, run.model, None if mode == "forecast" else guard, mode, history=history)
    attempts = None if koop is None or refused else koop._attempts
    if attempts is not None:  # none are made: they succeed, or are refused as noise
        schedule = attempts.schedule
        then = schedule.look_again if mode == "auto" else functools.partial(schedule.succeed, secants=True)
        vain = schedule.in_vain if mode == "auto" else then
        attempts._jump = lambda steps, allowed: then(steps)  # type: ignore[assignment]  # in the place of attempts
        attempts._follow = lambda held, steps: vain(steps) or record(Found("not tried"), steps, 0, 0.0)
    pairs = []
    for block in range(steps // BLOCK):
        if block % 2:
            own, other = run.seconds_without_hooks(BLOCK), run.seconds(BLOCK)
        else:
            other, own = run.seconds(BLOCK), run.seconds_without_hooks(BLOCK)
        pairs.append((own, other))
    if refused:  # attempts are few and long
        share = sum(other for _, other in pairs) / sum(own for own, _ in pairs)
    else:
        share = statistics.median(other / own for own, other in pairs)
    return share - 1, sum(jump.evaluations > 0 for jump in koop.jumps) if koop is not None else 0


def parts(sizes: tuple[int, ...], batch: int, device: str) -> dict[str, tuple[float, float]]:
    """Measured and assumed, in steps."""
    run, place = Run(sizes, batch, device), (torch.float32, torch.device(device))
    median_seconds = functools.partial(median_of, place[1])
    run.seconds(200)
    parameters = list(run.model.parameters())
    tail, means = Snapshots(parameters, 30, *place), BlockMeans(parameters, 30, *place)
    for _ in range(94):
        run.step()
        tail.add(parameters)
    snapshots, saved = tail.ordered(), [p.detach().clone() for p in parameters]
    coefficients = Proposer(snapshots).coefficients(FAMILIES[0])
    displacements = snapshots - snapshots[-1]

    def candidate() -> None:
        torch._foreach_copy_(saved, moved(saved, displacements, coefficients))
        measure(run.loss, run.model)

    def fits() -> None:
        proposer = Proposer(tail.ordered())
        for family in FAMILIES:
            proposer.coefficients(family)

    pairs = Secants(parameters, PAIRS, *place)

    def along() -> None:
        pairs.begin(parameters)
        run.step()
        pairs.end(gradients(run.optimizer, parameters))
        newton(pairs, adaptive(run.optimizer, parameters))

    for _ in range(2 * PAIRS):
        along()
    step = median_seconds(run.step, 200)
    costs = Costs.of(sum(p.nbytes for p in parameters), tail.nbytes, pairs.nbytes)
    measured = {
        "snapshot": (median_seconds(lambda: tail.add(parameters), 100), SNAPSHOT),
        "mean": (median_seconds(lambda: means.take(parameters), 100), MEAN),
        "fit": (median_seconds(fits, 10), costs.fit),
        "candidate": (median_seconds(candidate, 20), costs.candidate),
        "secants": (median_seconds(along, 10) - step, costs.secants),
    }
    return {name: (seconds / step, assumed) for name, (seconds, assumed) in measured.items()}


def median_of(device: torch.device, call: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times):
        started = now(device)
        call()
        taken.append(now(device) - started)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES)[:5])
    parser.add_argument("--history", type=int, default=0, help="of attach: steps along secants")
    parser.add_argument("--device", default="cpu", help="as torch names it: cpu, cuda")
    parser.add_argument("--parts", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.sizes:
        if arguments.parts:
            found = parts(SIZES[name], arguments.batch, arguments.device)
            told = ", ".join(f"{part} {took:.3f} (assumed {assumed:.3f})" for part, (took, assumed) in found.items())
            print(f"{name} weights, in steps: {told}", flush=True)
            continue
        for refused, modes in ((False, ("nothing", "forecast", "jump", "auto")), (True, ("jump", "auto"))):
            for mode in modes:
                run = (arguments.batch, arguments.steps, arguments.history, arguments.device)
                given = (SIZES[name], mode, *run, refused)
                found = [overhead(*given) for _ in range(arguments.repeats)]
                low, middle, high = (100 * f(share for share, _ in found) for f in (min, statistics.median, max))
                what = f"{found[0][1]} attempts, all refused, and recording" if refused else "recording"
                cost = f"{middle:.1f} % ({low:.1f} to {high:.1f}) of {arguments.steps} steps"
                print(f"{name} weights, {mode}: {what} cost {cost}", flush=True)


if __name__ == "__main__":
    main()
