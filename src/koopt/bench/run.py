"""One run of a trainer with those who observe it: the loss at each cost, counted and timed."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import koopt
from koopt import system
from koopt.live.guard import untouched

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from koopt.bench.method import Observer, Trainer
    from koopt.bench.task import Problem, Task

GUARD = 1 / 3  # what an evaluation costs, in closure calls
EVEN, EARLY = 1000, 500  # points of a long curve that are kept: evenly spaced, and by equal ratios


@dataclass(frozen=True, eq=False)
class Curve:
    """What was spent when a loss was reached; all `(time,)`.

    Attributes:
        steps: optimizer steps.
        calls: closure calls.
        guarded: guard evaluations.
        seconds: of the processor, on one thread, for all but validation; on an idle machine the clock says the same.
        loss: validation loss of the weights for evaluation; of a full-batch task the best training loss so far. Inf
            where it is not finite.
    """

    steps: np.ndarray
    calls: np.ndarray
    guarded: np.ndarray
    seconds: np.ndarray
    loss: np.ndarray

    @property
    def cost(self) -> np.ndarray:
        """In closure calls."""
        return self.calls + GUARD * self.guarded


@dataclass(frozen=True, eq=False)
class Record:
    """What came of a run.

    Attributes:
        curve: the loss at each cost.
        test: the loss on the test split at the end; None if it was not to be read.
        diverged: whether the run ended early, since its loss was not finite.
    """

    curve: Curve
    test: float | None
    diverged: bool

    @property
    def final(self) -> float:
        """The loss at the end; inf where the run diverged."""
        return math.inf if self.diverged else float(self.curve.loss[-1])


def run(
    task: Task,
    trainer: Trainer,
    setting: Mapping[str, Any],
    seed: int,
    observed: Sequence[tuple[Observer, Mapping[str, Any]]] = (),
    test: bool = False,
) -> list[Record]:
    """Train once, on one thread, until the task's steps are spent in closure calls.

    The loss at weights counts as reached with what was spent when they were made. Validation is not counted; making the
    weights for it is. What observers take is added to their own seconds alone.

    Args:
        task: what is trained.
        trainer: how.
        setting: of its grid.
        seed: of the problem and of torch.
        observed: observers, each with a setting of its grid.
        test: whether the test split is read at the end.

    Returns:
        The trainer's record, then one for each of `observed`.
    """
    with torch.random.fork_rng(devices=[]), system.one_thread():
        torch.manual_seed(seed)
        return _Run(task, trainer, setting, task.problem(seed, trainer.guard), observed).finish(test)


class _Run:
    def __init__(
        self,
        task: Task,
        trainer: Trainer,
        setting: Mapping[str, Any],
        problem: Problem,
        observed: Sequence[tuple[Observer, Mapping[str, Any]]],
    ) -> None:
        self.task, self.problem = task, problem
        self.steps = self.calls = 0
        self.excluded, self.started = 0.0, time.process_time()
        self.batch: Any = None
        self.points: list[tuple[float, ...]] = []
        self.sound = True  # whether a loss of the current step was finite
        self.running = trainer.start(problem, setting, task.steps)
        with self.pausing():
            self.watchers = [_Watcher(observer, problem, given, task.steps) for observer, given in observed]

    def finish(self, test: bool) -> list[Record]:
        due = [round(look * self.task.steps / self.task.looks) for look in range(self.task.looks)]
        diverged = False
        tested: list[float | None] = [None] * (1 + len(self.watchers))
        while self.calls < self.task.steps and self.steps < self.task.steps:
            if due and self.calls >= due[0]:
                due = [look for look in due if look > self.calls]
                self.look(test=False)
            diverged = not self.step()
            if diverged:
                break
        if not diverged:
            tested = self.look(test)
        best = self.task.full_batch
        curves = [_curve(self.points, best), *(_curve(watcher.points, best) for watcher in self.watchers)]
        return [Record(curve, read, diverged) for curve, read in zip(curves, tested, strict=True)]

    def step(self) -> bool:
        """One optimizer step; returns whether a loss in it was finite, of which a line search sees several."""
        self.batch, called, self.sound = self.problem.batch(), self.calls, False
        try:
            self.running.step(self.closure)
        except ValueError:
            if all(bool(parameter.isfinite().all()) for parameter in self.problem.model.parameters()):
                raise
            return False  # a guard that complains about weights that are lost anyway
        self.steps += 1
        with self.pausing():
            for watcher in self.watchers:
                watcher.record()
        return self.sound or self.calls == called

    def closure(self) -> Tensor:
        before = self.spent()
        with torch.enable_grad():
            self.problem.model.zero_grad()
            loss = self.problem.loss(self.batch)
            loss.backward()
        found = float(loss.detach())
        self.sound |= math.isfinite(found)
        self.calls += 1
        if self.task.full_batch:
            self.points.append((*before, found))
        return loss

    def look(self, test: bool) -> list[float | None]:
        """Validate at the weights for evaluation; with `test`, returns the losses on the test split."""
        with self.running.evaluating():
            spent = self.spent()
            with self.pausing():
                loss, tested = _looked(self.problem, test)
        self.points.append((*spent, loss))
        with self.pausing():
            return [tested, *(watcher.look(spent, test) for watcher in self.watchers)]

    def spent(self) -> tuple[float, ...]:
        """As a curve has it: steps, calls, guard evaluations, seconds."""
        seconds = time.process_time() - self.started - self.excluded
        return self.steps, self.calls, self.running.guarded, seconds

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        begin = time.process_time()
        try:
            yield
        finally:
            self.excluded += time.process_time() - begin


class _Watcher:
    """An observer with the time it took and its curve."""

    def __init__(self, observer: Observer, problem: Problem, setting: Mapping[str, Any], steps: int) -> None:
        begin = time.process_time()
        self.observing = observer.start(problem.model, problem, setting, steps)
        self.seconds = time.process_time() - begin
        self.problem = problem
        self.points: list[tuple[float, ...]] = []

    def record(self) -> None:
        begin = time.process_time()
        self.observing.record()
        self.seconds += time.process_time() - begin

    def look(self, spent: tuple[float, ...], test: bool) -> float | None:
        begin = time.process_time()
        weights = self.observing.weights()
        self.seconds += time.process_time() - begin
        with _loaded(self.problem.model, weights):
            loss, tested = _looked(self.problem, test)
        steps, calls, guarded, seconds = spent
        self.points.append((steps, calls, guarded + self.observing.guarded, seconds + self.seconds, loss))
        return tested


def _looked(problem: Problem, test: bool) -> tuple[float, float | None]:
    """Validation and test loss, with no trace left."""
    with untouched(problem.model):
        problem.refresh()
        return problem.validate(), problem.test() if test else None


@contextlib.contextmanager
def _loaded(model: torch.nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if name in weights}
    koopt.load_into(model, weights)
    try:
        yield
    finally:
        koopt.load_into(model, kept)


def _curve(points: list[tuple[float, ...]], best: bool) -> Curve:
    """Points as columns, of a long curve fewer; `best`: the loss is the lowest so far."""
    columns = dict(zip((field.name for field in fields(Curve)), np.array(points, float).reshape(-1, 5).T, strict=True))
    columns["loss"] = np.where(np.isfinite(columns["loss"]), columns["loss"], np.inf)
    if best:
        columns["loss"] = np.minimum.accumulate(columns["loss"])
    count = len(points)
    kept = np.arange(count)
    if count > EVEN + EARLY:
        places = np.concatenate([[0], np.linspace(1, count - 1, EVEN), np.geomspace(1, count - 1, EARLY)])
        kept = np.unique(places.round().astype(int))
    digits = {"seconds": 6, "loss": 9}
    return Curve(**{name: _rounded(column[kept], digits.get(name)) for name, column in columns.items()})


def _rounded(values: np.ndarray, digits: int | None) -> np.ndarray:
    """To significant digits, as it is kept."""
    return values if digits is None else np.array([float(f"{value:.{digits}g}") for value in values])
