"""Does what koopt reaches hold on data that was not trained on? Full-batch loops of `unseen_tasks.py`, and burgers.

    python benchmarks/held_out.py --seeds 5          # all; rerunning it resumes
    python benchmarks/held_out.py sines poisson

The held-out loss is looked at 200 times a run: of other points, images, entries or nodes, and for `poisson` and
`burgers` the error of the solution. koopt has its defaults and guards by the training loss; the learning rate is that
of the loop. Beside it L-BFGS and, as a measure of chance, the same run from a first weight that is one rounding larger.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from reaching import geometric
from unseen import NUDGED, as_it_stands, records, title
from unseen_report import number
from unseen_tasks import FULL, LATER, LATEST

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
NAMES = ("sines", "root", "waves", "poisson", "logistic", "digits", "autoencoder", "completion", "graph", "moons")
LATER_NAMES = ("heat", "running", "hills", "mixture", "convolutions", "saddle", "deep", "trajectories")
TASKS = {task.name: task for task in (*FULL, *LATER, *LATEST, BURGERS)}


class Held:
    """A task's problem, whose loss for targets is that on what is held out."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, seed: int, guarded: bool) -> Problem:
        problem = self.task.problem(seed, guarded)
        return replace(problem, validate=problem.test)


def held_out(task: Task) -> Task:
    return replace(task, full_batch=False, looks=LOOKS, problem=Held(task))


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
        cells = ["; ".join(number(one[name]) for one in rows if one["task"] == task) for name in heads]
        lines.append(f"| `{task}` | " + " | ".join(cells) + " |")
    cells = []
    for name in heads:
        values = [[one[name] for one in rows if one["method"] == method] for method in methods]
        cells.append("; ".join(number(float(geometric(of_method))) for of_method in values))
    return "\n".join([*lines, "| *geometric mean* | " + " | ".join(cells) + " |", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*NAMES, *LATER_NAMES, BURGERS.name)
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
        ways = [as_it_stands(method, task) for method in ("optimizer", "koopt", "lbfgs")]
        ways.append(Way("rounding", NUDGED, ways[0].setting))
        with terminal.progress() as progress:
            trials.make([(way, seed) for way in ways for seed in seeds], name, progress)
        for line in trials.failed.values():
            print(line)
        plain = records(ways[0], trials, seeds)
        rows += [row(name, title(way.method), records(way, trials, seeds), plain) for way in ways[1:]]
    given.output.mkdir(parents=True, exist_ok=True)
    report.write_text(given.output / "tables.md", markdown(rows))
    report.write_result(given.output, "held-out", {"seeds": list(seeds)}, rows, [])
    print(markdown(rows))


if __name__ == "__main__":
    main()
