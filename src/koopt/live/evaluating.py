"""Weights for evaluation: what is made of the block means of a live run, by a fixed rule or by a guard."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import pad

from koopt import exchange, linalg, reductions
from koopt.forecasters import METHODS, RESOLVED
from koopt.live.candidates import FAMILIES, FEWEST, Candidate, Proposer, combined, finite, gain
from koopt.live.window import BlockMeans, Snapshots

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from jaxtyping import Float
    from torch import Tensor

    from koopt.exchange import Ranks

ENOUGH = 8  # block means for an operator; with fewer the average does better
SLOW = {"rank": 2, "projected": True, "max_modulus": 1.0}
AHEAD = Candidate("koopman", 1 / 3, SLOW, 0.75)  # to a given step


class Part(NamedTuple):
    """A share of a blend: a method on the last `share` of the block means, its horizon in lengths of these."""

    weight: float
    method: str
    share: float
    horizon: float = 0.0


def _operators(weight: float) -> tuple[Part, ...]:
    """No one window of an operator is safe under noise, their mean is."""
    return tuple(Part(weight / 3, "koopman", share, 1 / 3) for share in (0.75, 0.9, 1.0))


# the errors of a forecast, which looks too far, and of a short average, which lags, are unlike: their mean has less
AVERAGE = (Part(1.0, "mean", 1 / 4),)
RULE = (Part(0.5, "dema", 1.0), Part(0.5, "mean", 1 / 4))  # operators may fail, and nothing would tell
TRUST = 0.03  # the first is left only for what the guard says is so much better: a small batch errs by more
FORECASTS = (
    (*_operators(0.5), Part(0.5, "mean", 1 / 16)),
    (Part(1.0, "mean", 1 / 8),),
    (Part(1.0, "mean", 1 / 3),),  # much noise
    (Part(1 / 3, "koopman", 0.9, 0.6), Part(1 / 3, "regression", 0.75), Part(1 / 3, "mean", 1 / 16)),
    (Part(0.5, "koopman", 1.0, 1 / 3), Part(0.5, "mean", 3 / 16)),
)
FROM_TAIL = tuple(
    family._replace(horizon=horizon)
    for horizon in (2 / 3, 4 / 3, 8 / 3)
    for family in FAMILIES
    if family.method in ("koopman", "line") and math.isfinite(family.horizon)
)


def blended(factor: Float[Tensor, "time rank"], blend: Sequence[Part]) -> Float[Tensor, " time"]:
    """The coefficients of a blend over the block means.

    Args:
        factor: `(time, rank)`, the means in an orthonormal basis, finite.
        blend: its parts.

    >>> blended(torch.zeros(8, 1), AVERAGE)
    tensor([0.0000, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000, 0.5000, 0.5000],
           dtype=torch.float64)
    """
    total = factor.new_zeros(len(factor), dtype=torch.float64)
    for part in blend:
        tail = max(1, round(part.share * len(factor)))
        options: dict[str, Any] = SLOW | {"rtol": RESOLVED} if part.method == "koopman" else {}
        if part.method == "dema":
            options["decay"] = math.exp(-4 / tail)  # over a quarter of them
        found = METHODS[part.method](factor[-tail:], part.horizon * (tail - 1), **options)
        total += part.weight * pad(found, (len(factor) - tail, 0))
    return total


class Taste:
    """How well each of `FORECASTS` did by the guard, at all looks so far; later ones weigh more, by their step.

    A held-out batch is small, and the best of several by one look at it is often the luckiest.

    >>> taste = Taste()
    >>> taste.learn(100, [0.0, 0.1, 0.2, 0.0, 0.0])
    >>> taste.learn(100, [9.0, 0.0, 0.0, 0.0, 0.0])  # the same look again
    >>> taste.order()
    [2, 1, 0, 3, 4]
    """

    def __init__(self) -> None:
        self.scores = [0.0] * len(FORECASTS)
        self._looked = 0

    def learn(self, steps: int, gains: Sequence[float]) -> None:
        if steps > self._looked:
            ahead = [TRUST, *(0.0 for _ in gains[1:])]
            self.scores = [s + steps * (g + a) for s, g, a in zip(self.scores, gains, ahead, strict=True)]
            self._looked = steps

    def order(self) -> list[int]:
        return sorted(range(len(self.scores)), key=lambda i: -self.scores[i])

    def state_dict(self) -> dict[str, Any]:
        return {"scores": list(self.scores), "looked": self._looked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scores, self._looked = list(state["scores"]), int(state["looked"])


def by_rule(
    window: Snapshots | BlockMeans, steps: float | None, now: list[Tensor], ranks: Ranks | None = None
) -> list[Tensor]:
    """The forecast without a guard.

    Args:
        window: what is recorded.
        steps: optimizer steps ahead; None: as the rule has it.
        now: the weights as they are, which serve where nothing better is found.
        ranks: the processes that hold the other columns.
    """
    if isinstance(window, Snapshots) or steps is not None:
        return _to_step(window, steps or 0.0, now, ranks)
    rows = window.with_open()
    weights = _made(rows, now, _of_blends(rows, [RULE] if len(rows) >= ENOUGH else [AVERAGE], ranks)[0], ranks)
    return now if weights is None else weights


def by_guard(
    window: Snapshots | BlockMeans,
    now: list[Tensor],
    evaluate: Callable[[Sequence[Tensor]], float],
    taste: Taste,
    steps: int,
    ranks: Ranks | None = None,
) -> list[Tensor]:
    """The forecast that did best by the guard so far, if it is better than the weights as they are; else the best now.

    Args:
        window: what is recorded.
        now: the weights as they are.
        evaluate: the guard's loss at weights.
        taste: what earlier looks have taught; learns from this one.
        steps: optimizer steps so far.
        ranks: the processes that hold the other columns.
    """
    if isinstance(window, Snapshots):
        rows = window.ordered()
        found = _from_tail(rows, ranks)
    else:
        rows = window.with_open()
        found = _of_blends(rows, FORECASTS if len(rows) >= ENOUGH else [AVERAGE], ranks)

    def loss_of(coefficients: Tensor | None) -> float:
        """Each is made, evaluated and dropped, as memory is not to grow with their number; the best is made again."""
        weights = _made(rows, now, coefficients, ranks)
        return math.inf if weights is None else finite(evaluate(weights))

    least = finite(evaluate(now))
    losses = [loss_of(coefficients) for coefficients in found]
    order = sorted(range(len(found)), key=lambda i: losses[i])
    if len(found) == len(FORECASTS) and isinstance(window, BlockMeans):
        taste.learn(steps, [_clipped(least, loss) for loss in losses])
        order = [taste.order()[0], *order]
    best = next((found[index] for index in order if losses[index] < least), None)
    weights = _made(rows, now, best, ranks)
    return now if weights is None else weights


def _made(
    rows: Float[Tensor, "time state"], now: Sequence[Tensor], coefficients: Tensor | None, ranks: Ranks | None
) -> list[Tensor] | None:
    """The weights with these coefficients; None where there are none, or one of the weights is not finite."""
    return None if coefficients is None else combined(now, rows, coefficients, ranks)


def _of_blends(
    rows: Float[Tensor, "time state"], blends: Sequence[Sequence[Part]], ranks: Ranks | None
) -> Sequence[Tensor | None]:
    """The coefficients of each blend; None where the rows are not finite."""
    squared = reductions.gram(rows, ranks) if len(rows) else None
    if squared is None or not bool(squared.isfinite().all()):
        return [None] * len(blends)
    factor = linalg.factor_of_gram(squared)
    return list(exchange.first(torch.stack([blended(factor, blend) for blend in blends]), ranks))


def _from_tail(snapshots: Float[Tensor, "time state"], ranks: Ranks | None) -> Sequence[Tensor | None]:
    if len(snapshots) < 2:
        return []
    proposer = Proposer(snapshots, ranks)
    return [proposer.coefficients(candidate) for candidate in FROM_TAIL]


def _clipped(before: float, after: float) -> float:
    """The gain of one look, bounded so that no look decides for ever."""
    if not math.isfinite(after):
        return -1.0
    return max(-1.0, min(gain(before, after), 3.0)) if math.isfinite(before) else 0.0


def _to_step(window: Snapshots | BlockMeans, steps: float, now: list[Tensor], ranks: Ranks | None) -> list[Tensor]:
    """The weights so many steps ahead, by an operator where there is enough for one."""
    snapshots = window.ordered()
    held, ahead = len(snapshots), (steps + window.age) / window.block
    if isinstance(window, Snapshots):
        candidate = Candidate("koopman", ahead / max(1, held - 1), {"rank": 4, "difference": True})
        enough = held >= FEWEST
    else:
        fitted = max(2, round(AHEAD.share * held))
        candidate = AHEAD._replace(horizon=ahead / (fitted - 1))
        enough = held >= ENOUGH
    weights = _made(snapshots, now, Proposer(snapshots, ranks).coefficients(candidate) if enough else None, ranks)
    if weights is None and isinstance(window, BlockMeans):
        weights = _made(snapshots, now, _of_blends(snapshots, [AVERAGE], ranks)[0], ranks)
    return now if weights is None else weights
