"""What several runs need to reach losses, in one number a loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from koopt.bench import statistics
from koopt.bench.protocol import MISSED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from koopt.bench.run import Curve, Record


def mean_shares(
    curves: Sequence[Curve], losses: Sequence[Sequence[float]], budget: float, measure: str = "steps"
) -> np.ndarray:
    """The geometric mean over runs of the share of the budget to each loss; one that is missed counts `MISSED`.

    Args:
        curves: of the runs.
        losses: to be reached, by run.
        budget: in units of the measure.
        measure: "steps", "cost" or "seconds".
    """
    rows = [
        [statistics.crossing(getattr(curve, measure), curve.loss, loss) / budget for loss in aims]
        for curve, aims in zip(curves, losses, strict=True)
    ]
    return geometric(rows)


def cells(records: Sequence[Record], losses: Sequence[Sequence[float]], steps: int, seconds: float) -> str:
    """Of a table: the shares of steps and of processor time to each loss, and the final losses.

    Args:
        records: of the runs.
        losses: to be reached, by run.
        steps, seconds: of a whole run.
    """
    curves = [one.curve for one in records]
    found = mean_shares(curves, losses, steps), mean_shares(curves, losses, seconds, "seconds")
    shares = [" ".join(f"{share:.2f}" for share in row) for row in found]
    return " | ".join([*shares, " ".join(f"{one.final:.4g}" for one in records)])


def geometric(shares: Sequence[Any]) -> np.ndarray:
    """The geometric mean over the first axis; what is missed, and inf, counts `MISSED`.

    >>> float(geometric([1.0, 0.25]))
    0.5
    """
    return np.exp(np.log(np.where(np.isfinite(shares), shares, MISSED)).mean(axis=0))
