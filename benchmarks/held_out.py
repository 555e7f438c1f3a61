"""Does what koopt reaches hold on data that was not trained on? Full-batch loops of `unseen_tasks.py`, and burgers.

    python benchmarks/held_out.py --seeds 5          # all; rerunning it resumes
    python benchmarks/held_out.py sines poisson

The held-out loss is looked at 200 times a run: of other points, images, entries or nodes, and for `poisson` and
`burgers` the error of the solution. koopt has its defaults; its guard is the training loss, then, where there are data,
the loss on as many others that were held out for that. The learning rate is that of the loop. Beside it L-BFGS and, as
a measure of chance, the same run from a first weight that is one rounding larger.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from reaching import geometric
from unseen import NUDGED, as_it_stands, records
from unseen_report import CHANCE, number
from unseen_tasks import FULL, LATER, LATEST, Split

from koopt import report, terminal
from koopt.bench.statistics import crossing
from koopt.bench.tasks.burgers import TASK as BURGERS
from koopt.bench.trials import Trials, Way

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from koopt.bench.run import Record
    from koopt.bench.task import Problem, Task

    Row = Mapping[str, Any]

LOOKS = 200
HELD = "koopt, its guard held out"
DATA = (
    "logistic",
    "digits",
    "convolutions",
    "graph",
    "moons",
    "mixture",
    "waves",
    "running",
    "autoencoder",
    "completion",
)
NAMES = (*DATA, "saddle", "sines", "root", "hills", "deep", "trajectories", "poisson", "heat")
TASKS = {task.name: task for task in (*FULL, *LATER, *LATEST, BURGERS)}


def held(task: Task, guard: bool, seed: int, guarded: bool) -> Problem:
    """A task's problem, whose loss for targets is that on what is held out."""
    problem = task.problem(seed, guarded)
    found = replace(problem, validate=problem.test)
    if not guard:
        return found
    assert isinstance(found, Split)
    return replace(found, guard=found.beside)


def held_out(task: Task, guard: bool = False) -> Task:
    """The task with the loss on what is held out as its target, and, if asked for, on the rest of that as its guard."""
    return replace(task, full_batch=False, looks=LOOKS, problem=partial(held, task, guard))


def row(task: str, method: str, found: Sequence[Record], plain: Sequence[Record]) -> dict[str, Any]:
    """Medians over seeds: what is needed to the optimizer's lowest held-out loss, and losses over the optimizer's.

    Both the lowest on the way and the last are those until the optimizer's own cost is spent.
    """
    shares, lowest, last = [], [], []
    for own, other in zip(found, plain, strict=True):
        whole, least = other.curve.cost[-1], other.curve.loss.min()
        within = own.curve.loss[own.curve.cost <= whole]
        shares.append(crossing(own.curve.cost, own.curve.loss, least) / whole)
        lowest.append(within.min() / least)
        last.append(math.inf if own.diverged else within[-1] / other.curve.loss[-1])
    medians = {"share": shares, "lowest": lowest, "last": last}
    return {"task": task, "method": method} | {name: float(np.median(values)) for name, values in medians.items()}


def markdown(rows: Sequence[Row]) -> str:
    """A line a task, as in docs/when-it-helps.md."""
    methods = list(dict.fromkeys(one["method"] for one in rows))
    heads = {"share": "to the optimizer's lowest", "lowest": "lowest on the way", "last": "at the end"}
    lines = [f"In each column: {'; '.join(methods)}.", "", "| task | " + " | ".join(heads.values()) + " |"]
    lines.append("|---" * (1 + len(heads)) + "|")
    for task in dict.fromkeys(one["task"] for one in rows):
        found = {one["method"]: one for one in rows if one["task"] == task}
        cells = [
            "; ".join(number(found[method][name]) if method in found else "-" for method in methods) for name in heads
        ]
        lines.append(f"| `{task}` | " + " | ".join(cells) + " |")
    cells = []
    for name in heads:
        values = [[one[name] for one in rows if one["method"] == method] for method in methods]
        cells.append("; ".join(number(float(geometric(of_method))) for of_method in values))
    return "\n".join([*lines, "| *geometric mean* | " + " | ".join(cells) + " |", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*NAMES, BURGERS.name)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(names)}; else all of them")
    parser.add_argument("--seeds", type=int, default=5, help="from 0 on")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--output", type=Path, default=Path("results/held-out"), metavar="DIR")
    given = parser.parse_args()
    if unknown := set(given.tasks) - set(names):
        parser.error(f"unknown tasks {', '.join(sorted(unknown))}, expected some of {', '.join(names)}")
    seeds = range(given.seeds)
    rows: list[dict[str, Any]] = []
    for name in given.tasks or names:
        task = held_out(TASKS[name])
        trials = Trials(task, given.output / name, given.jobs)
        plain, koop, lbfgs = (as_it_stands(method, task) for method in ("optimizer", "koopt", "lbfgs"))
        nudged = Way("rounding", NUDGED, plain.setting)
        found, wanted = {"koopt": (trials, koop)}, {name: (trials, [plain, koop, lbfgs, nudged])}
        if name in DATA:
            beside = Trials(held_out(TASKS[name], guard=True), given.output / name / "guard-held-out", given.jobs)
            found[HELD], wanted[f"{name}, guard held out"] = (beside, koop), (beside, [koop])
        found |= {"L-BFGS": (trials, lbfgs), CHANCE: (trials, nudged)}
        for stage, (made, ways) in wanted.items():
            with terminal.progress() as progress:
                made.make([(way, seed) for way in ways for seed in seeds], stage, progress)
            for line in made.failed.values():
                print(line)
        known = records(plain, trials, seeds)
        rows += [row(name, method, records(way, made, seeds), known) for method, (made, way) in found.items()]
    given.output.mkdir(parents=True, exist_ok=True)
    report.write_text(given.output / "tables.md", markdown(rows))
    report.write_result(given.output, "held-out", {"seeds": list(seeds)}, rows, [])
    print(markdown(rows))


if __name__ == "__main__":
    main()
