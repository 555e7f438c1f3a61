"""Rules that turn a window into coefficients over its snapshots; a forecast is their combination.

A rule sees the snapshots only through inner products, so it takes the snapshots themselves, `(*batch, time, state)`, or
their coordinates in any orthonormal basis, such as ``linalg.triangular_factor(snapshots)``, which is no larger than
time x time. Each returns `(*batch, time)` float64 coefficients; horizons are in snapshot steps after the last snapshot.
"""

from __future__ import annotations

import inspect
import math
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from koopt import linalg
from koopt.operator import fit, fit_in_form

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from jaxtyping import Float
    from torch import Tensor

RANKS = (2, 3)  # of an ensemble's operators
RESOLVED = 1e-7  # share of the largest singular value that a Gram matrix of snapshots still shows


def koopman(
    snapshots: Float[Tensor, "*batch time state"], horizon: float, max_modulus: float | None = None, **fit_options
) -> Float[Tensor, "*batch time"]:
    """The forecast of :func:`koopt.fit` as coefficients.

    Args:
        snapshots: `(*batch, time, state)`. Where it is a factor, give `rtol`: its default depends on the dtype and the
            shape of the snapshots themselves.
        horizon: snapshot steps >= 0, or ``math.inf`` for the fixed point.
        max_modulus: eigenvalues beyond this modulus are drawn in to it.
        fit_options: as :func:`koopt.fit` takes them.

    Raises:
        ValueError: as :func:`koopt.fit` and :meth:`koopt.Operator.forecast`.

    Source: Dogra & Redman (2020), Algorithm 1.

    >>> koopman(torch.tensor([[4.0], [2.0]]), 1)
    tensor([0.0000, 0.5000], dtype=torch.float64)
    """
    return fit_in_form(snapshots, snapshot_form=True, **fit_options).coefficients(horizon, max_modulus)


def ensemble(
    snapshots: Float[Tensor, "*batch time state"],
    horizon: float,
    ranks: Sequence[int] = RANKS,
    max_modulus: float | None = 1.0,
) -> Float[Tensor, "*batch time"]:
    """The mean of projected Koopman forecasts of several low ranks: for noisy windows, where no one rank is safe.

    Args:
        snapshots: `(*batch, time, state)`, in noisy training block means.
        horizon: snapshot steps >= 0.
        ranks: of the operators, each at least 1 and below the number of snapshots.
        max_modulus: as in :func:`koopman`; None lets modes grow.

    Raises:
        ValueError: if there are no ranks, and as :func:`koopman`.

    Source: Bates & Granger (1969), combined forecasts.

    >>> decay = 0.9 ** torch.arange(5.0)[:, None] * torch.tensor([1.0, 2.0])
    >>> ensemble(decay, 1, ranks=(1,)) @ decay.double() / decay[-1]
    tensor([0.9000, 0.9000], dtype=torch.float64)
    """
    if not ranks:
        raise ValueError("ranks is empty, expected at least one, such as (2, 3)")
    factor = linalg.factor_of_gram(linalg.gram(snapshots))  # the weights are read once for all ranks
    found = [koopman(factor, horizon, max_modulus, rank=rank, rtol=RESOLVED, projected=True) for rank in ranks]
    return torch.stack(found).mean(dim=0)


def last(snapshots: Float[Tensor, "*batch time state"], horizon: float) -> Float[Tensor, "*batch time"]:
    """No change: the last snapshot, whatever the horizon.

    >>> last(torch.zeros(3, 1), 5)
    tensor([0., 0., 1.], dtype=torch.float64)
    """
    return _everywhere(snapshots, (_ages(snapshots) == 0).to(torch.float64))


def mean(snapshots: Float[Tensor, "*batch time state"], horizon: float) -> Float[Tensor, "*batch time"]:
    """The mean of the window, whatever the horizon.

    Source: Izmailov et al. (2018), stochastic weight averaging; Kaddour (2022), latest weight averaging (LAWA).

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
    """The straight line through the last snapshot and the one `span` before it.

    Args:
        snapshots: `(*batch, time, state)`, at least two.
        horizon: finite, in snapshot steps, or in the unit of `times`.
        span: snapshots between the two.
        times: `(time,)`, when each snapshot was taken, where the spacing is uneven.

    Raises:
        ValueError: if the window is too short for `span`, `times` do not rise, or the horizon is not finite.

    >>> line(torch.zeros(3, 1), 2)
    tensor([ 0., -2.,  3.], dtype=torch.float64)
    """
    _require_finite(horizon)
    ages = _ages(snapshots, times)
    if isinstance(span, bool) or not isinstance(span, int) or not 1 <= span < len(ages):
        raise ValueError(
            f"span is {span!r}, expected a whole number >= 1 and below {len(ages)}, the number of snapshots"
        )
    share = horizon / ages[-1 - span]
    coefficients = torch.zeros_like(ages)
    coefficients[-1] = 1 + share
    coefficients[-1 - span] = -share
    return _everywhere(snapshots, coefficients)


def regression(
    snapshots: Float[Tensor, "*batch time state"], horizon: float, times: Float[Tensor, " time"] | None = None
) -> Float[Tensor, "*batch time"]:
    """The least-squares line through the window; of a single snapshot, that snapshot.

    Args:
        snapshots: `(*batch, time, state)`.
        horizon: finite, in snapshot steps, or in the unit of `times`.
        times: `(time,)`, when each snapshot was taken, where the spacing is uneven.

    Raises:
        ValueError: if `times` do not rise, or the horizon is not finite.

    >>> regression(torch.zeros(3, 1), 0)
    tensor([-0.1667,  0.3333,  0.8333], dtype=torch.float64)
    """
    _require_finite(horizon)
    ages = _ages(snapshots, times)
    centered = ages.mean() - ages
    spread = centered.square().sum()
    slope = centered / spread if spread > 0 else centered
    return _everywhere(snapshots, 1 / len(ages) + (horizon + ages.mean()) * slope)


def ema(
    snapshots: Float[Tensor, "*batch time state"], horizon: float, decay: float = 0.9
) -> Float[Tensor, "*batch time"]:
    """The exponential moving average of the window, whatever the horizon; weights normalized.

    Args:
        snapshots: `(*batch, time, state)`.
        horizon: not used.
        decay: between 0 and 1, what is left of a snapshot's weight after each later one.

    Raises:
        ValueError: if `decay` is out of range.

    >>> ema(torch.zeros(2, 1), 5, decay=0.5)
    tensor([0.3333, 0.6667], dtype=torch.float64)
    """
    weights = _decayed(snapshots, decay)
    return _everywhere(snapshots, weights / weights.sum())


def dema(
    snapshots: Float[Tensor, "*batch time state"], horizon: float, decay: float = 0.9
) -> Float[Tensor, "*batch time"]:
    """Double exponential smoothing: the line that an average and its own average lie on.

    In a long window it is ``2 E - EE + horizon (1 - decay) / decay (E - EE)``; in a short one the ages of both averages
    are the true ones, so that a straight line is always continued exactly.

    Args:
        snapshots: `(*batch, time, state)`.
        horizon: snapshot steps, finite.
        decay: as in :func:`ema`.

    Raises:
        ValueError: if `decay` is out of range or the horizon is not finite.

    Source: Brown & Meyer (1961), double smoothing.

    >>> dema(torch.zeros(2, 1), 1, decay=0.5).round()
    tensor([-1.,  2.], dtype=torch.float64)
    """
    _require_finite(horizon)
    ages = _ages(snapshots)
    once = _decayed(snapshots, decay)
    twice = once * (ages + 1)
    once, twice = once / once.sum(), twice / twice.sum()
    if len(ages) == 1:
        return _everywhere(snapshots, once)
    age, age_twice = once @ ages, twice @ ages
    return _everywhere(snapshots, once + (horizon + age) / (age_twice - age) * (once - twice))


def anderson(
    snapshots: Float[Tensor, "*batch time state"], horizon: float, regularization: float = 1e-8
) -> Float[Tensor, "*batch time"]:
    """Regularized Anderson mixing: the affine combination whose step is smallest, whatever the horizon.

    Args:
        snapshots: `(*batch, time, state)`, at least two.
        horizon: not used; the rule aims at the fixed point.
        regularization: added to the Gram matrix of the steps, as a share > 0 of its trace.

    Raises:
        ValueError: if there is one snapshot only, or `regularization` is not positive and finite.

    Source: Anderson (1965); Scieur, d'Aspremont & Bach (2016) for the regularization.

    >>> anderson(torch.tensor([[4.0], [2.0], [1.0]]), 5).round()
    tensor([ 0., -1.,  2.], dtype=torch.float64)
    """
    time = snapshots.shape[-2]
    if time < 2:
        raise ValueError(f"snapshots: anderson needs at least 2, got {time}; record more")
    if not 0 < regularization < math.inf:
        raise ValueError(f"regularization is {regularization}, expected a positive share, such as 1e-8")
    squared = linalg.gram(snapshots, lambda rows: rows.diff(dim=-2))
    scale = squared.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
    scale = torch.where(scale > 0, scale, 1.0)
    eye = torch.eye(time - 1, dtype=torch.float64, device=snapshots.device)
    weights = torch.linalg.solve(squared / scale + regularization * eye, torch.ones_like(squared[..., :1])).squeeze(-1)
    return pad(weights / weights.sum(dim=-1, keepdim=True), (1, 0))


METHODS: dict[str, Callable[..., Tensor]] = {
    "koopman": koopman,
    "last": last,
    "mean": mean,
    "line": line,
    "regression": regression,
    "ema": ema,
    "dema": dema,
    "anderson": anderson,
    "ensemble": ensemble,
}


@cache
def options_of(method: str) -> tuple[str, ...]:
    """The options that a method of ``METHODS`` takes from the user; when snapshots were taken is no option.

    >>> options_of("line"), options_of("koopman")
    (('span',), ('rank', 'rtol', 'projected', 'center', 'difference', 'max_modulus'))
    """
    names = inspect.signature(fit if method == "koopman" else METHODS[method]).parameters
    own = tuple(name for name in names if name not in ("snapshots", "horizon", "times"))
    return (*own, "max_modulus") if method == "koopman" else own


def require_options(method: str, options: Mapping[str, Any]) -> None:
    """Refuse a method that does not exist, and options that it does not take.

    Args:
        method: a name of ``METHODS``, if it is right.
        options: by name.

    Raises:
        ValueError: if there is no such method.
        TypeError: if the method has no option of that name.

    >>> require_options("line", {"span": 2})
    """
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    allowed = options_of(method)
    for name in options:
        if name not in allowed:
            raise TypeError(
                f'{name} is not an option of method "{method}", which takes {", ".join(allowed) or "no options"}'
            )


def _ages(snapshots: Tensor, times: Tensor | None = None) -> Tensor:
    """How long before the last snapshot each was taken."""
    time = snapshots.shape[-2]
    if times is None:
        return torch.arange(time - 1, -1, -1, dtype=torch.float64, device=snapshots.device)
    if times.shape != (time,):
        raise ValueError(f"times has shape {tuple(times.shape)}, expected ({time},): one time a snapshot")
    exact = times.to(snapshots.device, torch.float64)
    if not bool((exact.diff() > 0).all()):
        raise ValueError(f"times is {exact.tolist()}, expected strictly rising numbers: when each snapshot was taken")
    return exact[-1] - exact


def _decayed(snapshots: Tensor, decay: float) -> Tensor:
    if not 0 < decay < 1:
        raise ValueError(f"decay is {decay}, expected 0 < decay < 1: the share kept at each snapshot")
    return decay ** _ages(snapshots)


def _require_finite(horizon: float) -> None:
    if not math.isfinite(horizon):
        raise ValueError(f"horizon is {horizon}, but a line has no limit; pass a finite number of snapshot steps")


def _everywhere(snapshots: Tensor, coefficients: Tensor) -> Tensor:
    return coefficients.expand(*snapshots.shape[:-2], -1)
