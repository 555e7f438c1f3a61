"""Rules that turn a window into coefficients over its snapshots; a forecast is their combination.

A rule sees the snapshots only through inner products, so it takes the snapshots themselves, `(*batch, time, state)`, or
their coordinates in any orthonormal basis, such as ``linalg.triangular_factor(snapshots)``, which is no larger than time x
time. Each returns `(*batch, time)` float64 coefficients; horizons are in snapshot steps after the last snapshot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from koopt import linalg
from koopt.operator import fit_in_form

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor


def koopman(
    snapshots: Float[Tensor, "*batch time state"], horizon: float, max_modulus: float | None = None, **fit_options
) -> Float[Tensor, "*batch time"]:
    """The forecast of :func:`koopt.fit` with the same options; source: Dogra & Redman (2020), Algorithm 1.

    >>> koopman(torch.tensor([[4.0], [2.0]]), 1)
    tensor([0.0000, 0.5000], dtype=torch.float64)
    """
    return fit_in_form(snapshots, snapshot_form=True, **fit_options).coefficients(horizon, max_modulus)


def last(snapshots: Float[Tensor, "*batch time state"], horizon: float) -> Float[Tensor, "*batch time"]:
    """No change: the last snapshot.

    >>> last(torch.zeros(3, 1), 5)
    tensor([0., 0., 1.], dtype=torch.float64)
    """
    return _everywhere(snapshots, (_ages(snapshots) == 0).to(torch.float64))


def mean(snapshots: Float[Tensor, "*batch time state"], horizon: float) -> Float[Tensor, "*batch time"]:
    """The mean of the window, whatever the horizon (LAWA, stochastic weight averaging).

    >>> mean(torch.zeros(4, 1), 5)
    tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """
    ages = _ages(snapshots)
    return _everywhere(snapshots, torch.full_like(ages, 1 / len(ages)))


def line(
    snapshots: Float[Tensor, "*batch time state"],
    horizon: float,
    span: int = 1,
    times: Float[Tensor, " time"] | None = None,
) -> Float[Tensor, "*batch time"]:
    """The straight line through the last snapshot and the one `span` before it; `times` where the spacing is uneven.

    >>> line(torch.zeros(3, 1), 2)
    tensor([ 0., -2.,  3.], dtype=torch.float64)
    """
    ages = _ages(snapshots, times)
    if not 1 <= span < len(ages):
        raise ValueError(f"span is {span}, expected 1 to {len(ages) - 1} for a window of {len(ages)} snapshots")
    share = horizon / ages[-1 - span]
    coefficients = torch.zeros_like(ages)
    coefficients[-1] = 1 + share
    coefficients[-1 - span] = -share
    return _everywhere(snapshots, coefficients)


def regression(
    snapshots: Float[Tensor, "*batch time state"], horizon: float, times: Float[Tensor, " time"] | None = None
) -> Float[Tensor, "*batch time"]:
    """The least-squares line through the window; `times` where the spacing is uneven.

    >>> regression(torch.zeros(3, 1), 0)
    tensor([-0.1667,  0.3333,  0.8333], dtype=torch.float64)
    """
    ages = _ages(snapshots, times)
    centered = ages.mean() - ages
    spread = centered.square().sum()
    slope = centered / spread if spread > 0 else centered
    return _everywhere(snapshots, 1 / len(ages) + (horizon + ages.mean()) * slope)


def ema(
    snapshots: Float[Tensor, "*batch time state"], horizon: float, decay: float = 0.9
) -> Float[Tensor, "*batch time"]:
    """The exponential moving average of the window, whatever the horizon; `decay` a snapshot, weights normalized.

    >>> ema(torch.zeros(2, 1), 5, decay=0.5)
    tensor([0.3333, 0.6667], dtype=torch.float64)
    """
    weights = _decayed(snapshots, decay)
    return _everywhere(snapshots, weights / weights.sum())


def dema(
    snapshots: Float[Tensor, "*batch time state"], horizon: float, decay: float = 0.9
) -> Float[Tensor, "*batch time"]:
    """Double exponential smoothing: the line that an average and its own average lie on; source: Brown (1956).

    In a long window it is ``2 E - EE + horizon (1 - decay) / decay (E - EE)``; in a short one the ages of both averages
    are the true ones, so that a straight line is always continued exactly.

    >>> dema(torch.zeros(2, 1), 1, decay=0.5)
    tensor([-1.,  2.], dtype=torch.float64)
    """
    ages = _ages(snapshots)
    once = _decayed(snapshots, decay)
    twice = once * (ages + 1)
    once, twice = once / once.sum(), twice / twice.sum()
    age, age_twice = once @ ages, twice @ ages
    if len(ages) == 1:
        return _everywhere(snapshots, once)
    return _everywhere(snapshots, once + (horizon + age) / (age_twice - age) * (once - twice))


def anderson(
    snapshots: Float[Tensor, "*batch time state"], horizon: float, regularization: float = 1e-8
) -> Float[Tensor, "*batch time"]:
    """Regularized Anderson mixing: the affine combination whose step is smallest, whatever the horizon.

    Args:
        snapshots: at least two.
        horizon: not used; the rule aims at the fixed point.
        regularization: added to the Gram matrix of the steps, as a share > 0 of its trace.

    Source: Anderson (1965); Scieur, d'Aspremont & Bach (2016) for the regularization.

    >>> anderson(torch.tensor([[4.0], [2.0], [1.0]]), 5).round()
    tensor([ 0., -1.,  2.], dtype=torch.float64)
    """
    time = snapshots.shape[-2]
    if time < 2:
        raise ValueError(f"snapshots: anderson needs at least 2, got {time}; record more")
    if not regularization > 0:
        raise ValueError(f"regularization is {regularization}, expected a positive share, such as 1e-8")
    squared = linalg.gram(snapshots.diff(dim=-2))
    scale = squared.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
    scale = torch.where(scale > 0, scale, 1.0)
    eye = torch.eye(time - 1, dtype=torch.float64, device=snapshots.device)
    weights = torch.linalg.solve(squared / scale + regularization * eye, torch.ones_like(squared[..., :1])).squeeze(-1)
    return torch.nn.functional.pad(weights / weights.sum(dim=-1, keepdim=True), (1, 0))


METHODS: dict[str, Callable[..., Tensor]] = {
    "koopman": koopman,
    "last": last,
    "mean": mean,
    "line": line,
    "regression": regression,
    "ema": ema,
    "dema": dema,
    "anderson": anderson,
}


def _ages(snapshots: Tensor, times: Tensor | None = None) -> Tensor:
    """How long before the last snapshot each was taken."""
    time = snapshots.shape[-2]
    if times is None:
        return torch.arange(time - 1, -1, -1, dtype=torch.float64, device=snapshots.device)
    if times.shape != (time,) or bool((times.diff() <= 0).any()):
        raise ValueError(
            f"times has shape {tuple(times.shape)}, expected ({time},), strictly rising: one time a snapshot"
        )
    exact = times.to(snapshots.device, torch.float64)
    return exact[-1] - exact


def _decayed(snapshots: Tensor, decay: float) -> Tensor:
    if not 0 < decay < 1:
        raise ValueError(f"decay is {decay}, expected 0 < decay < 1: the share kept at each snapshot")
    return decay ** _ages(snapshots)


def _everywhere(snapshots: Tensor, coefficients: Tensor) -> Tensor:
    return coefficients.expand(*snapshots.shape[:-2], -1)
