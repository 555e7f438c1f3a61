"""Weights for evaluation: what is made of the block means of a live run, by a fixed rule or by a guard."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from koopt.live.candidates import FAMILIES, FEWEST, Candidate, Proposer, combined
from koopt.live.window import BlockMeans, Snapshots

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

ENOUGH = 28  # block means for a rank-2 operator; with fewer the average does better
SLOW = {"rank": 2, "projected": True, "max_modulus": 1.0}
RULE = Candidate("koopman", 1 / 3, SLOW, 0.75)
AVERAGE = Candidate("mean", 0.0, {}, 0.25)
FORECASTS = (
    AVERAGE,
    *(Candidate("mean", 0.0, {}, share) for share in (1 / 16, 1 / 8, 1 / 2)),
    *(Candidate("koopman", horizon, SLOW, 0.75) for horizon in (0.1, 1 / 3, 0.6, 1.0)),
    *(Candidate("regression", horizon, {}, 0.5) for horizon in (0.0, 0.3, 0.6)),
    *(Candidate("dema", horizon, {}, 0.75) for horizon in (0.0, 0.3, 0.6)),
)
FROM_TAIL = tuple(family._replace(horizon=horizon) for horizon in (2 / 3, 4 / 3, 8 / 3) for family in FAMILIES[:5])


def by_rule(window: Snapshots | BlockMeans, steps: float | None, now: list[Tensor]) -> list[Tensor]:
    """The forecast without a guard.

    Args:
        window: what is recorded.
        steps: optimizer steps ahead; None: as the rule has it.
        now: the weights as they are, which serve where nothing better is found.
    """
    snapshots = window.ordered()
    if len(snapshots) < 2:
        return now
    proposer = Proposer(snapshots)
    for candidate in _rules(window, steps, len(snapshots)):
        coefficients = proposer.coefficients(candidate)
        weights = None if coefficients is None else combined(now, snapshots, coefficients)
        if weights is not None:
            return weights
    return now


def by_guard(
    window: Snapshots | BlockMeans, now: list[Tensor], evaluate: Callable[[Sequence[Tensor]], float]
) -> list[Tensor]:
    """The best of all candidates, and of the weights as they are.

    Args:
        window: what is recorded.
        now: the weights as they are.
        evaluate: the guard's loss at weights.
    """
    snapshots = window.ordered()
    best, least = now, math.inf
    if len(snapshots) < 2:
        return best
    least = evaluate(now)
    proposer = Proposer(snapshots)
    for candidate in FORECASTS if isinstance(window, BlockMeans) else FROM_TAIL:
        coefficients = proposer.coefficients(candidate)
        weights = None if coefficients is None else combined(now, snapshots, coefficients)
        if weights is None:
            continue
        loss = evaluate(weights)
        if loss < least or (math.isnan(least) and not math.isnan(loss)):
            best, least = weights, loss
    return best


def _rules(window: Snapshots | BlockMeans, steps: float | None, held: int) -> list[Candidate]:
    """What serves, the first that can."""
    if isinstance(window, Snapshots):
        rule = Candidate("koopman", (steps or 0.0) / (held - 1), {"rank": 4, "difference": True})
        return [rule] if held >= FEWEST else []
    if held < ENOUGH:
        return [AVERAGE]
    if steps is None:
        return [RULE, AVERAGE]
    fitted = max(2, round(RULE.share * held))
    return [RULE._replace(horizon=(steps + window.age) / window.block / (fitted - 1)), AVERAGE]
