"""Weights for evaluation under mini-batch noise: steps to the plain run's losses, koopt's forecasts beside averages.

    python benchmarks/live_noise.py mnist-mlp --rates 1e-3 2e-3 --seeds 2000 2001

One plain run a seed, rate and schedule; every rule looks at the same weights, 40 times. The validation loss is that of
the tasks of `koopt bench`. Targets are the medians of the best plain rate and schedule at 50, 75 and 100 % of the
steps, and each rule has the rate, schedule and setting of its own that come first to them, by its mean share of the
budget. The guard's evaluations count as a third of a step each; rules with a guard do not train on its split.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from koopt.bench.methods.training import write
from koopt.bench.tasks import TASKS
from koopt.live import evaluating
from koopt.live.candidates import Candidate, Proposer, combined
from koopt.live.guard import buffers_kept, measure
from koopt.live.window import BlockMeans, cut

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

SHARES = (0.5, 0.75, 1.0)
MISSED = 1.5
EVALUATIONS = 1 + len(evaluating.FORECASTS)
DECAYS = (0.97, 0.99, 0.997, 0.999)
FIRST_RULE = (  # the rule of the first version, whose guard chose among all of these and more at each look
    Candidate("mean", 0.0, {}, 0.25),
    *(Candidate("koopman", horizon, evaluating.SLOW, 0.75) for horizon in (1 / 3, 0.1, 0.6, 1.0)),
    *(Candidate("mean", 0.0, {}, share) for share in (1 / 16, 1 / 8, 1 / 2)),
    *(Candidate("regression", horizon, {}, 0.5) for horizon in (0.0, 0.3, 0.6)),
    *(Candidate("dema", horizon, {}, 0.75) for horizon in (0.0, 0.3, 0.6)),
)


class Averages:
    """EMA and double EMA of several decays, without bias at the start."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        size = sum(p.numel() for p in parameters)
        self.once, self.twice, self.steps = torch.zeros(len(DECAYS), size), torch.zeros(len(DECAYS), size), 0
        self.rates = 1 - torch.tensor(DECAYS)[:, None]

    def add(self, flat: Tensor) -> None:
        self.steps += 1
        self.once += self.rates * (flat - self.once)
        self.twice += self.rates * (self.once - self.twice)

    def weights(self) -> dict[str, Tensor]:
        found = {}
        for i, decay in enumerate(DECAYS):
            left = decay**self.steps
            once = self.once[i] / (1 - left)
            twice = self.twice[i] / (1 - left - self.steps * left * (1 - decay))
            found[f"EMA {decay}"] = once
            found |= {f"double EMA {decay} {ahead}": once + ahead * (once - twice) for ahead in (0.5, 1.0)}
        return found


def run(task: Any, rate: float, schedule: str, seed: int, guarded: bool) -> dict[str, list[float]]:
    """The validation loss of each rule at each look."""
    problem = task.problem(seed, guarded)
    model = problem.model
    parameters: list[Any] = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps) if schedule == "cosine" else None
    means = BlockMeans(parameters, 56, torch.float32, torch.device("cpu"))
    averages, taste = Averages(parameters), evaluating.Taste()
    recent: list[Tensor] = []
    looks = [round((i + 1) * task.steps / task.looks) for i in range(task.looks)]
    curves: dict[str, list[float]] = {}

    def loss_of(weights: Sequence[Tensor], by: Callable[[], float]) -> float:
        write(parameters, list(weights))
        return by()

    def validated() -> float:
        with buffers_kept(model):
            problem.refresh()
            return problem.validate()

    for step in range(1, task.steps + 1):
        batch = problem.batch()
        optimizer.zero_grad()
        problem.loss(batch).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        means.add(parameters)
        flat = torch.cat([p.detach().flatten() for p in parameters])
        averages.add(flat)
        if step % (task.steps // 200) == 0:
            recent = [*recent[-39:], flat]
        if step not in looks:
            continue
        now = [p.detach().clone() for p in parameters]
        guard = lambda weights: loss_of(weights, lambda: measure(problem.guard, model))  # noqa: E731, it refers to this look
        if guarded:
            found = {
                "koopt, guard": evaluating.by_guard(means, now, guard, taste, step),
                "koopt, guard, first version": _best(means, now, guard),
            }
        else:
            found = {"last": now, "koopt, no guard": evaluating.by_rule(means, None, now)}
            first = FIRST_RULE[1:2] if means.held >= 28 else FIRST_RULE[:1]
            found["koopt, no guard, first version"] = _made(means, now, first)[0]
            found |= {name: cut(value, parameters) for name, value in averages.weights().items()}
            for count in (4, 12, 40):
                found[f"LAWA {count / 200:g} of the run"] = cut(torch.stack(recent[-count:]).mean(dim=0), parameters)
            for share in (1 / 8, 1 / 4):
                found[f"LAWA {share:g}"] = _made(means, now, [Candidate("mean", 0.0, {}, share)])[0]
            for share, horizon in product((1 / 4, 1 / 2), (0.0, 0.3, 0.6)):
                line = Candidate("regression", horizon, {}, share)
                found[f"regression {share:g} {horizon}"] = _made(means, now, [line])[0]
        for name, weights in found.items():
            curves.setdefault(name, []).append(loss_of(weights, validated))
        with torch.no_grad():
            write(parameters, now)
    return curves


def _made(means: BlockMeans, now: list[Tensor], candidates: Sequence[Candidate]) -> list[list[Tensor]]:
    rows = means.ordered()
    proposer = Proposer(rows) if len(rows) > 1 else None
    coefficients = [None if proposer is None else proposer.coefficients(candidate) for candidate in candidates]
    return [now if c is None else combined(now, rows, c) or now for c in coefficients]


def _best(means: BlockMeans, now: list[Tensor], guard: Callable[[Sequence[Tensor]], float]) -> list[Tensor]:
    made = [now, *_made(means, now, FIRST_RULE)]
    losses = [guard(weights) for weights in made]
    return made[min(range(len(made)), key=lambda i: losses[i])]


def share(curve: list[float], target: float, evaluations: int, steps: int) -> float:
    """The share of the budget until a target, between looks on a straight line."""
    spent = evaluations / 3 * len(curve) / steps  # at the end
    for i, loss in enumerate(curve):
        if loss <= target:
            before = curve[i - 1] if i else loss
            part = (before - target) / (before - loss) if before > loss else 1.0
            return (i + part) / len(curve) * (1 + spent)
    return MISSED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[name for name, task in TASKS.items() if not task.full_batch])
    parser.add_argument("--rates", type=float, nargs="+", default=None, help="default: the task's")
    parser.add_argument("--schedules", nargs="+", default=["cosine", "constant"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[2000, 2001])
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--output", type=Path, default=None, help="keep the curves here, and go on from them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[arguments.task]
    if arguments.steps:
        task = type(task)(**{**vars(task), "steps": arguments.steps})
    known: dict[str, dict[str, list[float]]] = {}
    if arguments.output and arguments.output.is_file():
        known = json.loads(arguments.output.read_text())
    curves: dict[str, dict[tuple[float, str], list[list[float]]]] = {}
    rates, seeds = arguments.rates or task.rates, arguments.seeds
    runs = [(r, s, seed, g) for r in rates for s in arguments.schedules for seed in seeds for g in (False, True)]
    for rate, schedule, seed, guarded in runs:
        key = f"{task.name} {task.steps} {rate:g} {schedule} {seed} {guarded}"
        if key not in known:
            known[key] = run(task, rate, schedule, seed, guarded)
            if arguments.output:
                arguments.output.write_text(json.dumps(known))
        for name, curve in known[key].items():
            curves.setdefault(name, {}).setdefault((rate, schedule), []).append(curve)
    report(task, curves)


def report(task: Any, curves: dict[str, dict[tuple[float, str], list[list[float]]]]) -> None:
    """Print one line a rule, with its own best setting."""
    plain = min(curves["last"].values(), key=lambda runs: statistics.median(curve[-1] for curve in runs))
    targets = [statistics.median(curve[round(at * task.looks) - 1] for curve in plain) for at in SHARES]
    print("targets", *(f"{target:.4f}" for target in targets))
    lines: dict[str, tuple[float, list[float], str]] = {}
    for name, settings in curves.items():
        family = name.split(" 0.")[0]
        evaluations = {"koopt, guard": EVALUATIONS, "koopt, guard, first version": 1 + len(FIRST_RULE)}.get(name, 0)
        for setting, runs in settings.items():
            found = [
                statistics.median(share(curve, target, evaluations, task.steps) for curve in runs) for target in targets
            ]
            lowest = statistics.median(min(curve) for curve in runs)
            mean = statistics.mean(found)
            if family not in lines or mean < lines[family][0]:
                lines[family] = (mean, found, f"{name}, {setting[1]} {setting[0]:g}, lowest {lowest:.4f}")
    for family, (mean, found, setting) in sorted(lines.items(), key=lambda item: item[1][0]):
        print(f"{family:32s} {mean:.3f} | " + " ".join(f"{value:.3f}" for value in found) + f" | {setting}")


if __name__ == "__main__":
    main()
