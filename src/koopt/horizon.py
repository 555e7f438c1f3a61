"""How far a forecast may be trusted, from the recorded window alone: held-out error and the unit circle.

Every forecaster that is tried is translation invariant and linear in the snapshots, so all of it happens in the small
factor of the snapshots relative to the last one; the weights are read once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from koopt import linalg
from koopt.forecasters import METHODS
from koopt.operator import fit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float
    from torch import Tensor

LEAST = 4  # snapshots: two for a line, one to hold out, and one for a second origin
SHARES = (2, 4, 8, 16)  # a candidate looks at the last 1/2, 1/4 ... of the window, so that the rest can be held out
POINTS = 10  # snapshots of a candidate, about; a longer piece is strided
RANKS = (1, 2, 4, 8)
ORIGINS = 5  # held-out forecasts at each lag, at most
GROWTH = 2.0  # no further than until the fastest mode has grown so much
NOISE = 3.0  # drift below so many times that of a random walk with the same noise is called noise
SCALES = 8  # increments that are needed to tell drift from noise


@dataclass(frozen=True)
class Plan:
    """What :func:`koopt.plan` found in a window of snapshots.

    Attributes:
        horizon: snapshot steps ahead that may be trusted; 0 if refused.
        expected_error: ``|error| / |motion|`` in Euclidean norm at that horizon, the worst of the held-out forecasts
            that far; if refused, one snapshot step ahead.
        reason: "ok"; "shorter: ..." where less is offered than was wanted; "noise: ...", "not yet in a basin: ..." or
            "no motion: ..." if refused.
        start, stop, stride: the snapshots that the forecast is made from, ``snapshots[start : stop + 1 : stride]``:
            t1 is `start`, t2 is `stop`.
        method: "koopman" or "line".
        options: of the method, as :func:`koopt.fit` or the rule in ``koopt.forecasters`` takes them.
        max_modulus: largest modulus of the eigenvalues, of one of its strides; 1 for a line.
        drift_over_noise: how far the window moved over how far a random walk with the noise of its increments would
            have; about 1 for noise alone, infinite on a straight line, NaN with too few snapshots to tell.
    """

    horizon: float
    expected_error: float
    reason: str
    start: int
    stop: int
    stride: int
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    max_modulus: float = 1.0
    drift_over_noise: float = math.nan

    def forecast(self, snapshots: Float[Tensor, "time state"], horizon: float | None = None) -> Float[Tensor, " state"]:
        """The state `horizon` snapshot steps after the last snapshot.

        Args:
            snapshots: `(time, state)`, those that were planned with, or as many of another state.
            horizon: snapshot steps >= 0; None: the plan's own, and so the last snapshot where it refused.

        Returns:
            `(state,)` in the dtype of the snapshots.

        Raises:
            ValueError: if the number of snapshots is not the plan's.

        >>> window = torch.arange(9.0)[:, None]
        >>> koopt.plan(window).forecast(window, 10)
        tensor([18.])
        """
        if len(snapshots) != self.stop + 1:
            raise ValueError(
                f"snapshots: the plan was made from {self.stop + 1}, got {len(snapshots)}; plan again with these"
            )
        horizon = self.horizon if horizon is None else horizon
        window = snapshots.detach()[self.start :: self.stride]
        return linalg.combine(METHODS[self.method](window, horizon / self.stride, **self.options), window)


class Candidate(NamedTuple):
    """A forecaster and what it looks at: every `stride`-th of the last `tail` snapshots and of the last one."""

    method: str
    tail: int
    stride: int
    options: dict[str, Any]


class Trial(NamedTuple):
    """What came of a candidate: expected errors at each lag, infinite where not verified or not to be trusted."""

    candidate: Candidate
    errors: Tensor
    max_modulus: float
    longest: int


def plan(snapshots: Float[Tensor, "time state"], horizon: float | None = None, tolerance: float = 0.1) -> Plan:
    """Choose from a window alone how far to forecast, from which part of it and by which forecaster.

    Candidates (Koopman operators of the increments, straight lines; several pieces, strides and ranks) forecast the
    newer part of the window from the older one. At each lag h a candidate counts for the worst of up to five forecasts
    of h steps that start in the last 2h, or for a shorter lag's if that was worse; it is trusted no further than it was
    held out, and than its fastest mode doubles. The plan goes as far as the best candidate's error stays within the
    tolerance.

    Args:
        snapshots: `(time, state)`, real floating point, evenly spaced in time, at least 4: all weights of one network.
        horizon: snapshot steps wanted; None: as far as may be trusted, at most 0.44 of the window.
        tolerance: largest expected ``|error| / |motion|``, above 0 and below 1.

    Returns:
        A :class:`koopt.Plan`. Under mini-batch noise, where the distance in weight space says nothing about the loss,
        it refuses with "noise: ..." and has drift against noise.

    Raises:
        TypeError: if `snapshots` is not a real floating-point tensor, or `horizon` not a number.
        ValueError: if there are fewer than 4 snapshots, one is not finite, or an argument is out of range.

    Source: Dogra & Redman (2020), Section 5, the first open question; Tashman (2000) for the rolling origins.

    >>> decay = 0.9 ** torch.arange(40.0)[:, None] * torch.tensor([1.0, 2.0])
    >>> found = koopt.plan(decay, horizon=10)
    >>> found.horizon, found.reason, found.method
    (10, 'ok', 'koopman')
    >>> koopt.plan(torch.randn(40, 100)).reason[:5]
    'noise'
    """
    _check(snapshots, horizon, tolerance)
    snapshots = snapshots.detach()
    time = len(snapshots)
    path = linalg.triangular_factor(snapshots, lambda rows: rows - rows[..., -1:, :]).cpu()
    if not bool(path.isfinite().all()):
        raise ValueError(f"snapshots: NaN or Inf in {_first_not_finite(snapshots)}; record a new window after it")
    against_noise = _drift_over_noise(path)
    rounding = torch.finfo(snapshots.dtype).eps * snapshots[-1].to(torch.float64).norm().item()
    if path[time // 2 :].norm(dim=-1).max() <= rounding:
        still = "no motion: the newer half of the window moved no further than rounding does"
        return Plan(0, 0.0, still, time - 2, time - 1, 1, "line", drift_over_noise=against_noise)

    lags = _lags(time, horizon)
    trials = [_trial(path, candidate, lags, rounding) for candidate in _candidates(time)]
    errors = torch.stack([trial.errors for trial in trials])
    least = errors.amin(dim=0)
    trusted = (least <= tolerance).nonzero().flatten().tolist()
    at = max(trusted, default=0)
    blur = min(torch.finfo(snapshots.dtype).eps ** 0.5, tolerance)  # below it rounding would decide
    alike = max(least[at].item(), blur)
    chosen = trials[int((errors[:, at] <= alike).nonzero()[0])]  # the simplest of the best
    offered = 0 if not trusted else lags[at] if horizon is None else min(lags[at], horizon)
    if not trusted:
        reason = _refusal(chosen, against_noise, tolerance)
    elif horizon is not None and offered < horizon:
        longest = max(trial.longest for trial in trials)
        beyond = (
            f"the window of {time} snapshots verifies up to {longest}; record more"
            if horizon > longest
            else f"beyond, more than {tolerance:g} of the motion was missed, or a mode grows too fast"
        )
        reason = f"shorter: {offered} of {horizon:g} snapshot steps; {beyond}"
    else:
        reason = "ok"
    method, tail, stride, options = chosen.candidate
    return Plan(
        horizon=offered,
        expected_error=chosen.errors[at].item(),
        reason=reason,
        start=time - 1 - tail,
        stop=time - 1,
        stride=stride,
        method=method,
        options=options | ({"rtol": _rtol(path, chosen.candidate, rounding)} if method == "koopman" else {}),
        max_modulus=chosen.max_modulus,
        drift_over_noise=against_noise,
    )


def _candidates(time: int) -> Iterator[Candidate]:
    """What is tried, the simplest first."""
    tails = sorted({(time - 1) // share for share in SHARES} - {0})
    for tail in sorted({1, *tails}):
        yield Candidate("line", tail, tail, {})
    for rank in RANKS:
        for tail in tails:
            stride = max(1, tail // POINTS)
            increments = tail // stride
            if rank < increments:
                yield Candidate("koopman", increments * stride, stride, {"difference": True, "rank": rank})


def _lags(time: int, horizon: float | None) -> list[int]:
    """Lags that are held out: dense where short, up to the wanted horizon, which is one of them."""
    last = time - 1
    longest = max(1, (last - max(2, last // 8)) // 2)  # where operators, too, can be held out, not a line alone
    top = longest if horizon is None else min(longest, math.ceil(horizon))
    lags = {top}
    lag = 1
    while lag < top:
        lags.add(lag)
        lag += max(1, lag // 2)
    return sorted(lags)


def _trial(path: Tensor, candidate: Candidate, lags: list[int], rounding: float) -> Trial:
    """Forecast the newer part of the window from its older parts, several times at each lag."""
    method, tail, stride, options = candidate
    last = len(path) - 1
    origins = {lag: _origins(last, lag) for lag in lags if last - 2 * lag >= tail}
    ends = sorted({last}.union(*origins.values()))
    window = path[torch.tensor(ends, device="cpu")[:, None] - torch.arange(tail, -1, -stride, device="cpu")]
    if method == "koopman":
        operator = fit(window, **options, rtol=_rtol(path, candidate, rounding))
        max_modulus = linalg.eig(operator.transition[-1])[0].abs().max().item()
    else:
        operator, max_modulus = None, 1.0
    errors = torch.full((len(lags),), math.inf, dtype=torch.float64, device="cpu")
    worst = 0.0
    for i, (lag, held_out) in enumerate(origins.items()):
        if max_modulus ** (lag / stride) > GROWTH:
            break
        if operator is not None and lag < stride:
            continue  # within a stride a forecast is a straight line
        rows = torch.tensor([ends.index(origin) for origin in held_out], device="cpu")
        if operator is not None:
            ahead = operator.forecast(lag / stride)[rows]
        else:
            ahead = linalg.combine(METHODS[method](window[rows], lag / stride, **options), window[rows])
        start = torch.tensor(held_out, device="cpu")
        truth = path[start + lag]
        missed = (ahead - truth).norm(dim=-1).clamp_min(rounding)  # no snapshot is known better than that
        ratio = (missed / (truth - path[start]).norm(dim=-1)).nan_to_num(nan=math.inf)
        worst = max(worst, ratio.max().item())
        errors[i] = worst
    return Trial(candidate, errors, max_modulus, max(origins, default=0))


def _origins(last: int, lag: int) -> list[int]:
    """Where held-out forecasts of `lag` steps start: evenly from 2 lags to 1 lag before the last snapshot."""
    count = min(ORIGINS, lag + 1)
    return sorted({round(last - 2 * lag + i * lag / (count - 1)) for i in range(count)})


def _rtol(path: Tensor, candidate: Candidate, rounding: float) -> float:
    """Singular values that are cut: those within the rounding of the snapshots, which the factor does not show."""
    tail, stride = candidate.tail, candidate.stride
    moved = path[-1 - tail :: stride].diff(dim=0).norm().item()
    return linalg.share_of_rounding(rounding, tail / stride, moved)


def _drift_over_noise(path: Tensor) -> float:
    """Motion over that of a random walk with the same noise, the least over strides: momentum correlates noise.

    The noise is that of successive differences of increments (von Neumann, 1941), in which a drift cancels.
    """
    last = len(path) - 1
    found, stride = math.nan, 1
    while last // stride >= SCALES:
        steps = path[last % stride :: stride].diff(dim=0)
        moved, changes = steps.sum(dim=0).norm().item(), steps.diff(dim=0)
        walked = (changes.square().sum() / (2 * len(changes)) * len(steps)).sqrt().item()
        ratio = moved / walked if walked > 0 else math.inf if moved > 0 else math.nan
        found = ratio if math.isnan(found) else min(found, ratio)
        stride *= 2
    return found


def _refusal(best: Trial, against_noise: float, tolerance: float) -> str:
    if against_noise < NOISE:
        return (
            f"noise: the window moved {against_noise:.2g} times as far as a random walk with its noise would, "
            f"expected at least {NOISE:g}; average more optimizer steps in a snapshot"
        )
    return (
        f"not yet in a basin: one snapshot ahead the best forecaster ({best.candidate.method}, largest |eigenvalue| "
        f"{best.max_modulus:.4g}) missed {best.errors[0].item():.2g} of the motion, tolerance {tolerance:g}; train on"
    )


def _first_not_finite(snapshots: Tensor) -> str:
    bad = (~snapshots.isfinite().all(dim=-1)).nonzero().flatten().tolist()
    return f"snapshot {bad[0]}" if bad else "their differences, which are too large"


def _check(snapshots: object, horizon: float | None, tolerance: float) -> None:
    if not isinstance(snapshots, torch.Tensor) or not snapshots.is_floating_point():
        given = snapshots.dtype if isinstance(snapshots, torch.Tensor) else type(snapshots).__name__
        raise TypeError(f"snapshots: expected a real floating-point tensor (time, state), got {given}; convert it")
    if snapshots.dim() != 2 or snapshots.shape[0] < LEAST or snapshots.shape[1] < 1:
        raise ValueError(
            f"snapshots has shape {tuple(snapshots.shape)}, expected (time, state) with time >= {LEAST}: "
            "the weights of one network; record more snapshots"
        )
    if horizon is not None:
        if isinstance(horizon, bool) or not isinstance(horizon, Real):
            raise TypeError(f"horizon is {horizon!r}, expected a number of snapshot steps, or None")
        if not 0 < horizon < math.inf:
            raise ValueError(f"horizon is {horizon}, expected snapshot steps above 0, or None for as far as possible")
    if isinstance(tolerance, bool) or not isinstance(tolerance, Real) or not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance!r}, expected a share of the motion above 0 and below 1, such as 0.1")
