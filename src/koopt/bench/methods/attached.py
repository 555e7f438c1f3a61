"""koopt beside an optimizer, as a user attaches it: all defaults."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import koopt
from koopt.bench.methods.training import Counted, Run, searched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from koopt.bench.task import Problem, Task

    Start = Callable[[Problem, Mapping[str, Any], int], Run]
    Grid = Callable[[Task], list[dict[str, Any]]]


def grid(of: Grid = searched) -> Grid:
    """The search of the optimizer alone; full-batch tasks are about the trained weights, others about the forecast."""
    return lambda task: [setting | {"evaluated": _evaluated(task)} for setting in of(task)]


def start(of: Start, guarded: bool = True, **options: Any) -> Start:
    """Training as `of` starts it, with koopt attached to its optimizer, by its defaults but for `options`."""

    def attached(problem: Problem, setting: Mapping[str, Any], steps: int) -> Run:
        run = of(problem, setting, steps)
        run.guard = Counted(problem.guard) if guarded else None
        koop = koopt.attach(run.optimizer, problem.model, guard=run.guard, **options)
        swapped = run.swapped

        @contextlib.contextmanager
        def forecast() -> Iterator[None]:
            with swapped(), koop.forecast_weights():
                yield

        if setting["evaluated"] == "forecast":
            run.swapped = forecast
        return run

    return attached


def _evaluated(task: Task) -> str:
    return "trained" if task.full_batch else "forecast"
