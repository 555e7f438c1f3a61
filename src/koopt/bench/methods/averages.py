"""Weights for evaluation that are made beside a run: averages, lines through them, and the guard's choice of some."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from koopt.bench.methods.training import Counted, weights_kept, weights_of, write
from koopt.live.candidates import Candidate, Proposer, combined
from koopt.live.guard import measure
from koopt.live.window import BlockMeans, Snapshots
from koopt.partitions import trainable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from koopt.bench.task import Problem

WINDOW = 56  # block means, as koopt holds
DECAYS = tuple({"decay": decay} for decay in (0.9, 0.97, 0.99, 0.997, 0.999))
DOUBLES = tuple({"decay": decay, "ahead": ahead} for decay in (0.97, 0.99, 0.997, 0.999) for ahead in (0.5, 1.0))
LATEST = (*({"span": span} for span in (0.02, 0.06, 0.2)), *({"share": share} for share in (1 / 8, 1 / 4)))
LINES = tuple({"share": share, "horizon": horizon} for share in (1 / 4, 1 / 2) for horizon in (0.0, 0.3, 0.6))
SHARES = tuple({"share": share} for share in (1 / 8, 1 / 4, 1 / 2))
HORIZONS = (0.0, 0.1, 0.3, 0.6, 1.0)  # in lengths of the line
REGULARIZATIONS = (1e-4, 1e-2, 1.0, 100.0)
SNAPSHOTS = 10  # that the mean over a span is taken of


class Average:
    """The exponential moving average E of all steps, or beyond it by E minus its own average; both start unbiased.

    Args:
        model: what is trained.
        decay: what is left of a step's weight after each later one.
        ahead: 0 for the average; else double EMA, E + ahead (E - EE).
    """

    guarded = 0

    def __init__(self, model: nn.Module, decay: float, ahead: float = 0.0) -> None:
        self._names, self._parameters = list(trainable(model)), weights_of(model)
        self._decay, self._ahead, self._steps = decay, ahead, 0
        self._once: Any = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._twice: Any = [torch.zeros_like(parameter) for parameter in self._parameters] if ahead else []

    @torch.no_grad()
    def record(self) -> None:
        self._steps += 1
        lerp: Any = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage], as torch's own averages take it
        lerp(self._once, self._parameters, 1 - self._decay)
        if self._twice:
            lerp(self._twice, self._once, 1 - self._decay)

    def weights(self) -> dict[str, Tensor]:
        if not self._steps:
            return {n: p.detach().clone() for n, p in zip(self._names, self._parameters, strict=True)}
        left = self._decay**self._steps
        once = [total / (1 - left) for total in self._once]
        if self._twice:  # what began at zero weighs as much less as its coefficients sum to less than 1
            weight = 1 - left - self._steps * left * (1 - self._decay)
            pairs = zip(once, self._twice, strict=True)
            once = [average + self._ahead * (average - total / weight) for average, total in pairs]
        return dict(zip(self._names, once, strict=True))


class Combination:
    """A combination of recorded weights: the first candidate that can be made, or the one that the guard prefers.

    Args:
        model: what is trained.
        window: what is recorded.
        every: steps between those that are recorded.
        candidates: how they are combined.
        guard: chooses among all of them and the weights as they are; None: the first is taken.
    """

    def __init__(
        self,
        model: nn.Module,
        window: Snapshots | BlockMeans,
        every: int,
        candidates: Sequence[Candidate],
        guard: Counted | None = None,
    ) -> None:
        self._model, self._names, self._parameters = model, list(trainable(model)), weights_of(model)
        self._window, self._every, self._candidates, self._guard = window, every, candidates, guard
        self._steps = 0

    @property
    def guarded(self) -> int:
        return 0 if self._guard is None else self._guard.calls

    def record(self) -> None:
        self._steps += 1
        if self._steps % self._every == 0:
            self._window.add(self._parameters)

    def weights(self) -> dict[str, Tensor]:
        with weights_kept(self._model) as now:
            return dict(zip(self._names, self._made(now), strict=True))

    def _made(self, now: list[Tensor]) -> list[Tensor]:
        snapshots = self._window.ordered()
        if len(snapshots) < 2:
            return now
        proposer, best, least = Proposer(snapshots), now, math.inf
        if self._guard is not None:
            least = measure(self._guard, self._model)
        for candidate in self._candidates:
            coefficients = proposer.coefficients(candidate)
            weights = None if coefficients is None else combined(now, snapshots, coefficients)
            if weights is None:
                continue
            if self._guard is None:
                return weights
            write(self._parameters, weights)
            loss = measure(self._guard, self._model)
            if loss < least:
                best, least = weights, loss
        return best


def start_ema(model: nn.Module, problem: Problem, setting: Mapping[str, Any], steps: int) -> Average:
    return Average(model, setting["decay"])


def start_dema(model: nn.Module, problem: Problem, setting: Mapping[str, Any], steps: int) -> Average:
    return Average(model, setting["decay"], setting["ahead"])


def start_lawa(model: nn.Module, problem: Problem, setting: Mapping[str, Any], steps: int) -> Combination:
    """The mean of the last ten snapshots over a span of the whole run, or of the last share of the run so far."""
    if "share" in setting:
        return Combination(model, _block_means(model), 1, [Candidate("mean", 0.0, {}, setting["share"])])
    every = max(1, round(setting["span"] * steps / SNAPSHOTS))
    latest = Snapshots(weights_of(model), SNAPSHOTS, *_kind(model))
    return Combination(model, latest, every, [Candidate("mean", 0.0, {})])


def start_regression(model: nn.Module, problem: Problem, setting: Mapping[str, Any], steps: int) -> Combination:
    """The least-squares line through the last share of the block means, ahead by a horizon in its lengths."""
    rule = Candidate("regression", setting["horizon"], {}, setting["share"])
    return Combination(model, _block_means(model), 1, [rule])


def start_line_copy(model: nn.Module, problem: Problem, setting: Mapping[str, Any], steps: int) -> Combination:
    """The line through the last block mean and one before it, as far ahead as the guard prefers."""
    rules = [Candidate("line", horizon, {"span": WINDOW}, setting["share"]) for horizon in HORIZONS]
    return Combination(model, _block_means(model), 1, rules, Counted(problem.guard))


def start_anderson_copy(model: nn.Module, problem: Problem, setting: Mapping[str, Any], steps: int) -> Combination:
    """Anderson mixing of the last share of the block means, by the regularization that the guard prefers."""
    options = ({"regularization": regularization} for regularization in REGULARIZATIONS)
    rules = [Candidate("anderson", math.inf, option, setting["share"]) for option in options]
    return Combination(model, _block_means(model), 1, rules, Counted(problem.guard))


def _block_means(model: nn.Module) -> BlockMeans:
    return BlockMeans(weights_of(model), WINDOW, *_kind(model))


def _kind(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    first = weights_of(model)[0]
    return torch.promote_types(first.dtype, torch.float32), first.device
