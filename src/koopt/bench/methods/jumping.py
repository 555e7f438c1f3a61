"""Jumps without operators: every few steps a straight line, or Anderson mixing, kept where the guard is lower."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from koopt import forecasters
from koopt.bench.methods.training import Counted, start_plain, weights_kept, weights_of, write
from koopt.live.budget import Schedule
from koopt.live.candidates import LONGEST, SHORTEST, moved
from koopt.live.guard import measure
from koopt.live.window import Snapshots

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from koopt.bench.methods.training import Run
    from koopt.bench.task import Problem

LINE = {"cycle": 100, "span": 30}
LINES = tuple({"cycle": cycle, "span": span} for cycle, span in ((50, 20), (50, 30), (100, 10), (100, 50)))
ANDERSON = {"cycle": 100, "memory": 30, "stride": 1}
ANDERSONS = (
    {"cycle": 50, "memory": 10, "stride": 1},
    {"cycle": 50, "memory": 20, "stride": 1},
    {"cycle": 100, "memory": 15, "stride": 2},
    {"cycle": 100, "memory": 10, "stride": 5},
)
REGULARIZATIONS = (1e-10, 1e-6, 1e-3)


def start_line(problem: Problem, setting: Mapping[str, Any], steps: int) -> Run:
    """The line through the weights `span` steps ago and now; its horizon doubles or halves while the loss falls."""
    options = LINE | dict(setting)
    horizon = 4.0  # in spans; learned

    def search(snapshots: Tensor, lower: Callable[[Tensor], bool]) -> None:
        nonlocal horizon

        def reaches(ahead: float) -> bool:
            return SHORTEST <= ahead <= LONGEST and lower(forecasters.line(snapshots, ahead))

        lower(forecasters.line(snapshots, horizon))
        start = horizon
        for factor in (2.0, 0.5):
            while reaches(factor * horizon):
                horizon *= factor
            if horizon != start:
                return

    return _start(problem, options, steps, (options["span"], 0), search)


def start_anderson(problem: Problem, setting: Mapping[str, Any], steps: int) -> Run:
    """Anderson mixing of `memory` snapshots, `stride` steps apart, by the regularization that the guard prefers."""
    options = ANDERSON | dict(setting)

    def search(snapshots: Tensor, lower: Callable[[Tensor], bool]) -> None:
        for regularization in REGULARIZATIONS:
            lower(forecasters.anderson(snapshots, math.inf, regularization))

    before = [options["stride"] * i for i in range(options["memory"])]
    return _start(problem, options, steps, before, search)


def _start(
    problem: Problem,
    setting: Mapping[str, Any],
    steps: int,
    before: Sequence[int],
    search: Callable[[Tensor, Callable[[Tensor], bool]], None],
) -> Run:
    run = start_plain(problem, setting, steps)
    run.guard = Counted(problem.guard)
    run.after = Jumping(problem.model, run.guard, setting["cycle"], before, search).after_step
    return run


class Jumping:
    """Moves the weights at the end of a cycle, if that lowers the guard; after a failure it waits three times as long.

    Args:
        model: whose weights are moved.
        guard: the loss at its weights.
        cycle: optimizer steps.
        before: how many steps before the end of the cycle snapshots are taken, 0 among them.
        search: tries coefficients; it is given the snapshots, and what tells whether some gave the lowest loss so far.
    """

    def __init__(
        self,
        model: nn.Module,
        guard: Callable[[], object],
        cycle: int,
        before: Sequence[int],
        search: Callable[[Tensor, Callable[[Tensor], bool]], None],
    ) -> None:
        self._model, self._guard, self._before, self._search = model, guard, frozenset(before), search
        self._parameters = weights_of(model)
        first = self._parameters[0]
        dtype = torch.promote_types(first.dtype, torch.float32)
        self._snapshots = Snapshots(self._parameters, len(self._before), dtype, first.device)
        self._schedule, self._steps = Schedule(cycle, 0.0), 0

    def after_step(self) -> None:
        self._steps += 1
        if self._schedule.due - self._steps in self._before:
            self._snapshots.add(self._parameters)
        if self._steps >= self._schedule.due:
            self._schedule.start(self._steps)
            weights = self._best()
            if weights is not None:
                write(self._parameters, weights)
                self._schedule.succeed(self._steps)
            self._snapshots.clear()

    def _best(self) -> list[Tensor] | None:
        """The weights of the lowest loss, if lower than now."""
        best, snapshots = None, self._snapshots.ordered()
        displacements = snapshots - snapshots[-1]
        with weights_kept(self._model) as saved:
            least = now = measure(self._guard, self._model)
            reached = math.inf

            def lower(coefficients: Tensor) -> bool:
                nonlocal best, least, reached
                weights = moved(saved, displacements, coefficients)
                if weights is None:
                    return False
                write(self._parameters, weights)
                loss = measure(self._guard, self._model)
                if not loss < reached:
                    return False
                reached = loss
                if loss < least:
                    best, least = weights, loss
                return True

            if math.isfinite(now):
                self._search(snapshots, lower)
        return best
