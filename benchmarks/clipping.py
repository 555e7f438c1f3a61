"""What koopt needs in full-batch loops that clip their gradients (`unseen_tasks.py` and `fresh_tasks.py`).

    python benchmarks/clipping.py
    python benchmarks/clipping.py poisson splats --seeds 2

All gradients are shortened to a share of the norm that they have at the start, by `clip_grad_norm_`. The target is the
lowest loss of the same loop without koopt, which clips as well; shares of that run's cost, medians of the seeds.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np
from reaching import geometric
from torch.nn.utils import clip_grad_norm_, get_total_norm
from unseen import TASKS as LOOPS
from unseen import as_it_stands
from unseen_report import number

from koopt.bench.method import Trainer
from koopt.bench.methods import attached
from koopt.bench.methods.training import Run, searched, start_plain, weights_of
from koopt.bench.run import run
from koopt.bench.statistics import crossing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from koopt.bench.task import Problem, Task

TASKS = {name: task for name, task in LOOPS.items() if task.full_batch}
NAMES = ("sines", "waves", "poisson", "digits", "running", "trajectories", "splats", "phases")
SHARES = (None, 0.1, 0.01)


def clipped(
    start: Callable[[Problem, Mapping[str, Any], int], Run],
    share: float | None,
    problem: Problem,
    setting: Mapping[str, Any],
    steps: int,
) -> Run:
    """A run whose gradients are shortened to that share of the norm of the first."""
    if share is None:
        return start(problem, setting, steps)
    parameters = weights_of(problem.model)
    problem.loss(problem.batch()).backward()
    largest = share * get_total_norm([parameter.grad for parameter in parameters]).item()
    found = start(problem, setting, steps)

    def around(closure: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def clipping() -> Tensor:
            loss = closure()
            clip_grad_norm_(parameters, largest)
            return loss

        return clipping

    found.around = around
    return found


def needed(task: Task, share: float | None, seed: int) -> tuple[float, float]:
    """What koopt needs to the lowest loss of the loop without it, as a share of its cost and of its seconds."""
    setting = as_it_stands("koopt", task).setting
    plain = Trainer("plain", partial(clipped, start_plain, share), searched)
    koop = Trainer("koopt", partial(clipped, attached.start(start_plain), share), searched)
    one, own = (run(task, way, setting, seed)[0] for way in (plain, koop))
    cost = crossing(own.curve.cost, own.curve.loss, one.final) / float(one.curve.cost[-1])
    return cost, crossing(own.curve.seconds, own.curve.loss, one.final) / float(one.curve.seconds[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}; else {', '.join(NAMES)}")
    parser.add_argument("--seeds", type=int, default=3, help="from 0 on")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    given = parser.parse_args()
    if unknown := set(given.tasks) - set(TASKS):
        parser.error(f"unknown tasks {', '.join(sorted(unknown))}, expected some of {', '.join(TASKS)}")
    print("| task | not clipped | to a tenth | to a hundredth |\n|---|---|---|---|", flush=True)
    columns: list[list[float]] = [[] for _ in SHARES]
    for name in given.tasks or NAMES:
        calls = [(share, seed) for share in SHARES for seed in range(given.seeds)]
        found = joblib.Parallel(given.jobs)(joblib.delayed(needed)(TASKS[name], *call) for call in calls)
        cells = np.median(np.reshape(found, (len(SHARES), given.seeds, 2)), axis=1)
        for column, (cost, _) in zip(columns, cells, strict=True):
            column.append(cost)
        print(f"| `{name}` | " + " | ".join("; ".join(map(number, cell)) for cell in cells) + " |", flush=True)
    print("| *geometric mean* | " + " | ".join(number(float(geometric(column))) for column in columns) + " |")


if __name__ == "__main__":
    main()
