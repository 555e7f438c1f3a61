"""Time to target over seeds: first crossing, censored medians with intervals, ratios, performance profiles."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxtyping import Float

RESAMPLES = 10_000
LEVEL = 0.95


def crossing(along: Float[np.ndarray, " time"], loss: Float[np.ndarray, " time"], target: float) -> float:
    """Where a loss first is at or below a target; straight between what is known.

    Args:
        along: `(time,)` steps, cost or seconds, ascending.
        loss: `(time,)` losses there; inf where there is none.
        target: a loss.

    Returns:
        The place, inf where the target is not reached (censored).

    >>> crossing(np.array([0.0, 10.0, 20.0]), np.array([4.0, 2.0, 3.0]), 2.5)
    7.5
    >>> crossing(np.array([0.0, 10.0, 20.0]), np.array([4.0, 2.0, 3.0]), 1.0)
    inf
    """
    reached = np.flatnonzero(loss <= target)
    if not len(reached):
        return math.inf
    at = reached[0]
    if at == 0:
        return float(along[0])
    drop = loss[at - 1] - loss[at]
    share = (loss[at - 1] - target) / drop if math.isfinite(drop) else 1.0
    return float(along[at - 1] + share * (along[at] - along[at - 1]))


def reached_by_half(losses: Sequence[float]) -> float:
    """The lowest loss that at least half of the runs are at or below, and more than half of an even number.

    So the median of the runs' own costs of this loss is known.

    >>> reached_by_half([4.0, 1.0, 2.0, 3.0])
    3.0
    """
    return sorted(losses)[len(losses) // 2]


def median(values: Sequence[float]) -> float:
    """The mean of the two middle values; a run that is censored counts as inf.

    >>> median([1.0, 2.0, 4.0, math.inf])
    3.0
    """
    return float(np.median(np.asarray(values, float)))


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median over seeds, and its 95 % percentile bootstrap interval; censored runs are inf.

    Args:
        values: one a seed.

    Returns:
        Median, lower and upper end.

    >>> median_interval([1.0, 1.0, 1.0])
    (1.0, 1.0, 1.0)
    """
    given = np.asarray(values, float)
    low, high = _ends(np.median(given[_resamples(len(given))], axis=1))
    return median(values), low, high


def ratio_interval(
    values: Sequence[float], others: Sequence[float], ends: Sequence[float]
) -> tuple[float, float, float]:
    """The ratio of two methods' medians over the same seeds, and its 95 % interval; seeds are resampled in pairs.

    A run of the other method that does not reach the target counts with all that it spent: the ratio is an upper bound.

    Args:
        values: cost of the first method, one a seed; inf where it is censored.
        others: of the second, for the same seeds.
        ends: what the second spent in all.

    Returns:
        Ratio, lower and upper end; inf where the first does not get there.

    >>> ratio_interval([1.0, 1.0], [2.0, math.inf], [4.0, 2.0])
    (0.5, 0.5, 0.5)
    """
    first, second = np.asarray(values, float), np.minimum(np.asarray(others, float), np.asarray(ends, float))
    picked = _resamples(len(first))
    low, high = _ends(np.median(first[picked], axis=1) / np.median(second[picked], axis=1))
    return float(np.median(first) / np.median(second)), low, high


def profile(costs: Mapping[str, Sequence[float]]) -> dict[str, Float[np.ndarray, " problems"]]:
    """How many times the cost of the best method each takes, problem by problem, ascending.

    Args:
        costs: method -> its cost on each problem; inf where it does not solve it.

    Returns:
        Method -> ratios; the share of them at or below t is the performance profile at t. Problems that no method
        solves are inf for all.

    Source: Dolan & Moré (2002), Benchmarking optimization software with performance profiles.

    >>> profile({"a": [1.0, 4.0], "b": [2.0, 2.0]})["a"].tolist()
    [1.0, 2.0]
    """
    table = np.array(list(costs.values()), float)
    best = table.min(axis=0, initial=math.inf)
    ratios = np.divide(table, best, out=np.full_like(table, math.inf), where=np.isfinite(table))
    return {method: np.sort(row) for method, row in zip(costs, ratios, strict=True)}


@functools.cache
def _resamples(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(count, size=(RESAMPLES, count))


def _ends(resampled: np.ndarray) -> tuple[float, float]:
    """The percentiles, outwards to values that occur: between a number and inf there is nothing."""
    tail = (1 - LEVEL) / 2
    low = np.quantile(resampled, tail, method="lower")
    return float(low), float(np.quantile(resampled, 1 - tail, method="higher"))
