"""Koopman operators fitted to recorded weights: fit, advance, spectrum."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral, Real
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from koopt import least_squares, linalg

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Complex, Float, Int
    from torch import Tensor

FARTHEST = 2**62  # whole horizons are 64-bit integers to torch


@dataclass(frozen=True, eq=False)
class Operator:
    """Koopman operators, one a patch, as :func:`koopt.fit` returns them.

    An operator of rank r acts on r coordinates of a state, ``z = basis^T x``: ``z' = transition z``, and the state one
    step on is ``image z``. In state form the columns of `basis` and `image` are states; in snapshot form they are
    coefficients over the recorded snapshots, and no matrix as large as a state is held.

    Attributes:
        snapshots: `(*batch, time, state)`, what the operator was fitted to, held by reference.
        transition: `(*batch, r, r)` float64; with ``center`` the last coordinate is the constant 1 of the affine map.
        start: `(*batch, r)` float64, coordinates of the last snapshot (of the last increment with ``difference``).
        basis: `(*batch, state or time, r)` float64, the leading left singular directions that were kept; with
            ``center`` the last column is the mean that is removed before the coordinates are taken.
        image: `(*batch, state or time, r)` float64, what one step makes of them.
        rank: `(*batch)` int64, how many singular values each patch kept.
        residual: `(*batch)` float64, ``|B - U A| / |B|`` in Frobenius norm over the fitted pairs of snapshots: of
            increments with ``difference``, less the mean of the earlier ones with ``center``; resolved to about 1e-8
            where a Gram matrix served.
        snapshot_form: whether the operator lives in the span of the snapshots.
        projected: as given to :func:`koopt.fit`.
        center: as given to :func:`koopt.fit`.
        difference: as given to :func:`koopt.fit`.
    """

    snapshots: Float[Tensor, "*batch time state"]
    transition: Float[Tensor, "*batch r r"]
    start: Float[Tensor, "*batch r"]
    basis: Float[Tensor, "*batch frame r"]
    image: Float[Tensor, "*batch frame r"]
    rank: Int[Tensor, "*batch"]
    residual: Float[Tensor, "*batch"]
    snapshot_form: bool
    projected: bool
    center: bool
    difference: bool

    def forecast(self, horizon: float, max_modulus: float | None = None) -> Float[Tensor, "*batch state"]:
        """The state `horizon` snapshot steps after the last snapshot.

        Args:
            horizon: snapshot steps >= 0. Whole numbers go by powers (valid for defective operators), others by the
                principal branch (along a straight line below 1, and where the eigenvectors do not carry the state);
                ``math.inf`` is the fixed point.
            max_modulus: eigenvalues beyond this modulus are drawn in to it; None leaves them as they are.

        Returns:
            `(*batch, state)` in the dtype of the snapshots. A growing operator may overflow at a far horizon.

        Raises:
            TypeError: if the horizon is no number.
            ValueError: if the horizon is negative or NaN, or is infinite and a patch grows, turns or drifts for ever,
                or `max_modulus` is not positive.

        Source: Dogra & Redman (2020), Eq. 6 and Algorithm 1.

        >>> halving = torch.tensor([[8.0], [4.0], [2.0]])
        >>> koopt.fit(halving).forecast(2)
        tensor([0.5000])
        """
        return self._state(self._frame_forecast(horizon, max_modulus), self.snapshots.dtype)

    def advance(self, state: Float[Tensor, "*batch state"], horizon: float) -> Float[Tensor, "*batch state"]:
        """Apply the operator to any state: ``forecast(a + b)`` is ``advance(forecast(a), b)`` for whole a and b.

        Args:
            state: `(*batch, state)`, real floating point, one state a patch.
            horizon: snapshot steps, as in :meth:`forecast`.

        Returns:
            `(*batch, state)` in the dtype of `state`.

        Raises:
            TypeError: if `state` is not a real floating-point tensor.
            ValueError: if the shape is not the patches', the horizon is refused by :meth:`forecast`, or the operator
                was fitted with ``difference=True``: it acts on increments, and a state alone has none.

        Source: Dogra & Redman (2020), Eq. 6.

        >>> op = koopt.fit(torch.tensor([[8.0], [4.0], [2.0]]))
        >>> op.advance(torch.tensor([3.0]), 1)
        tensor([1.5000])
        """
        if self.difference:
            raise ValueError(
                "advance: this operator acts on increments (difference=True) and a state alone has none; "
                "fit with difference=False, or fit snapshots.diff(dim=-2) and advance an increment"
            )
        _require_real(state, "state", "(*batch, state)")
        last = self.snapshots[..., -1, :]
        if state.shape != last.shape:
            raise ValueError(
                f"state has shape {tuple(state.shape)}, the patches {tuple(last.shape)}; pass one state a patch"
            )
        exact = state.detach().to(torch.float64)
        away = exact - last  # a short way, so that the many digits of the last snapshot's coordinates are kept
        coordinates = _matvec(self.basis.mT, linalg.inner(self.snapshots, away) if self.snapshot_form else away)
        if self.center:
            coordinates[..., -1] = 0.0
        coordinates += self.start

        def step(n: float) -> Tensor:
            return self._state(_matvec(self.image, linalg.evolve(self.transition, coordinates, n - 1)), torch.float64)

        now = self._state(_matvec(self.basis, coordinates), torch.float64) if self.projected else exact
        return _at(horizon, now, step).to(state.dtype)

    def coefficients(self, horizon: float, max_modulus: float | None = None) -> Float[Tensor, "*batch time"]:
        """The forecast as coefficients over the snapshots: ``forecast = coefficients @ snapshots``.

        Args:
            horizon: snapshot steps, as in :meth:`forecast`.
            max_modulus: as in :meth:`forecast`.

        Returns:
            `(*batch, time)` float64.

        Raises:
            ValueError: as :meth:`forecast`, and for an operator in state form, which holds no coefficients.

        >>> op = koopt.fit(torch.tensor([[4.0, 0.0, 0.0], [2.0, 0.0, 0.0]]))
        >>> op.coefficients(1)
        tensor([0.0000, 0.5000], dtype=torch.float64)
        """
        if not self.snapshot_form:
            raise ValueError(
                "coefficients: this operator is in state form (patches no larger than the window is long); "
                "use forecast()"
            )
        return self._frame_forecast(horizon, max_modulus)

    @property
    def eigenvalues(self) -> Complex[Tensor, "*batch r"]:
        """Eigenvalues by falling modulus, `(*batch, r)` complex128, zeros where a patch's rank is lower.

        With ``center`` they include the 1 of the constant; with ``difference`` they belong to the increments.

        >>> koopt.fit(torch.tensor([[8.0], [4.0], [2.0]])).eigenvalues
        tensor([0.5000+0.j], dtype=torch.complex128)
        """
        return self._spectrum[0]

    @property
    def modes(self) -> Complex[Tensor, "*batch state r"]:
        """Koopman modes of unit norm, `(*batch, state, r)` complex128, zeros where the eigenvalue is zero.

        Where the eigenvectors are well conditioned, ``(modes * eigenvalues[..., None, :]**n) @ amplitudes`` is the
        forecast at every n >= 1 (with ``difference``, the increment n steps after the last).

        >>> koopt.fit(torch.tensor([[8.0], [4.0], [2.0]])).modes.abs()
        tensor([[1.]], dtype=torch.float64)
        """
        return self._spectrum[1]

    @property
    def amplitudes(self) -> Complex[Tensor, "*batch r"]:
        """The share of each mode in the last snapshot, `(*batch, r)` complex128.

        >>> koopt.fit(torch.tensor([[8.0], [4.0], [2.0]])).amplitudes.abs().round()
        tensor([2.], dtype=torch.float64)
        """
        return self._spectrum[2]

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        values, vectors = linalg.eig(self.transition)
        order = values.abs().argsort(dim=-1, descending=True, stable=True)
        values = values.gather(-1, order)
        vectors = vectors.gather(-1, order.unsqueeze(-2).expand_as(vectors))
        live = values.abs() > linalg.EPS * values.abs()[..., :1]
        modes = self.image.to(vectors.dtype) @ vectors
        if self.snapshot_form:
            modes = linalg.combine_columns(modes, self.snapshots)
        norms = modes.norm(dim=-2)
        live = live & (norms > 0)
        modes = torch.where(live.unsqueeze(-2), modes / norms.unsqueeze(-2), 0.0)
        # modes come from the image, one step after the start, hence the division by the eigenvalue
        shares = linalg.solve(vectors, self.start.to(vectors.dtype)) * norms / values
        return torch.where(live, values, 0.0), modes, torch.where(live, shares, 0.0)

    @property
    def _now(self) -> Tensor:
        """The last snapshot, or its projection, as a state or as coefficients."""
        if self.projected and not self.difference:
            return _matvec(self.basis, self.start)
        if not self.snapshot_form:
            return self.snapshots[..., -1, :].to(torch.float64)
        last = torch.zeros_like(self.basis[..., 0])
        last[..., -1] = 1.0
        return last

    def _state(self, frame: Tensor, dtype: torch.dtype) -> Tensor:
        """The state that a frame vector stands for."""
        return linalg.combine(frame, self.snapshots, dtype) if self.snapshot_form else frame.to(dtype)

    def _frame_forecast(self, horizon: float, max_modulus: float | None) -> Tensor:
        """The forecast as a state or as coefficients, by the form of the operator."""
        now = self._now
        transition, start = self.transition, self.start
        if max_modulus is not None:
            transition, start = self._clamped(max_modulus)

        def step(n: float) -> Tensor:
            if not self.difference:
                return _matvec(self.image, linalg.evolve(transition, start, n - 1))
            # sum_{j<n} transition^j start, as the affine iteration y' = transition y + start from y = 0
            summing = pad(transition, (0, 1, 0, 1))
            summing[..., :-1, -1] = start
            summing[..., -1, -1] = 1.0
            origin = torch.zeros_like(summing[..., 0])
            origin[..., -1] = 1.0
            return now + _matvec(self.image, linalg.evolve(summing, origin, n)[..., :-1])

        return _at(horizon, now, step)

    def _clamped(self, max_modulus: float) -> tuple[Tensor, Tensor]:
        if not isinstance(max_modulus, Real) or not max_modulus > 0:
            raise ValueError(
                f"max_modulus is {max_modulus!r}, expected a positive number; None leaves the eigenvalues alone"
            )
        if not self.center:
            factor = linalg.clamping_factor(self.transition, max_modulus)
        else:  # the constant of an affine map stays
            factor = pad(linalg.clamping_factor(self.transition[..., :-1, :-1], max_modulus), (0, 1, 0, 1))
            factor[..., -1, -1] = 1.0
        # on the start too, since the image is one more step of the operator
        return factor @ self.transition, _matvec(factor, self.start)


def fit(
    snapshots: Float[Tensor, "*batch time state"],
    rank: int | None = None,
    rtol: float | None = None,
    projected: bool = False,
    center: bool = False,
    difference: bool = False,
) -> Operator:
    """Fit one Koopman operator a patch to recorded snapshots: ``U = B A^+``, with A the earlier and B the later ones.

    Patches no larger than the window is long get the operator on states (state form); larger ones get it in the span
    of their snapshots (snapshot form), at a cost of O(state * time^2), with the same forecast.

    Args:
        snapshots: `(*batch, time, state)`, real floating point, evenly spaced in time, at least two (three with
            `difference`). The algebra is done in float64 whatever their dtype.
        rank: largest number of singular values to keep; None keeps all above `rtol`.
        rtol: singular values up to this share (and up to eps of float64) of a patch's largest are cut; default: eps of
            the snapshots' dtype, or eps of float64 times max(time, state) if that is more, and with `center` or
            `difference` also those within the rounding of the snapshots themselves.
        projected: project states (with `difference`: increments) and images on the kept directions (projected DMD),
            which removes noise.
        center: fit the affine map ``x' = mean(B) + U (x - mean(A))``.
        difference: fit the increments ``x_{i+1} - x_i`` and forecast by summing them up.

    Returns:
        An :class:`koopt.Operator` over the same batch.

    Raises:
        TypeError: if `snapshots` is not a real floating-point tensor.
        ValueError: if there are too few snapshots, NaN or Inf in a patch (named by index), or an option is out of
            range.

    Source: Dogra & Redman (2020), Eq. 5 and Algorithm 1, with the pseudo-inverse that exists for any shape; Schmid
    (2010) and Tu et al. (2014) for the two forms.

    >>> spiral = torch.tensor([[1.0, 0.0], [0.0, 0.5], [-0.25, 0.0]])
    >>> koopt.fit(spiral).forecast(1)
    tensor([ 0.0000, -0.1250])
    """
    return fit_in_form(
        snapshots,
        snapshot_form=None,
        rank=rank,
        rtol=rtol,
        projected=projected,
        center=center,
        difference=difference,
    )


def fit_in_form(
    snapshots: Float[Tensor, "*batch time state"],
    snapshot_form: bool | None,
    rank: int | None = None,
    rtol: float | None = None,
    projected: bool = False,
    center: bool = False,
    difference: bool = False,
) -> Operator:
    """:func:`koopt.fit` in the form asked for, whatever the shape; None chooses by it.

    >>> fit_in_form(torch.tensor([[8.0], [4.0], [2.0]]), snapshot_form=True).coefficients(1).shape
    torch.Size([3])
    """
    _check(snapshots, rank, rtol, difference)
    snapshots = snapshots.detach()
    *batch, time, state = snapshots.shape
    pairs = time - difference - 1
    options = least_squares.Options(
        rank=min(state, pairs) if rank is None else min(rank, state, pairs),
        rtol=rtol,
        snapshot_form=state > time if snapshot_form is None else snapshot_form,
        projected=projected,
        center=center,
        difference=difference,
        batch=tuple(batch),
    )
    data = snapshots.reshape(-1, time, state)
    with torch.no_grad():
        fitted = least_squares.fit(data, options)
    return Operator(
        snapshots=snapshots,
        **{name: tensor.reshape((*batch, *tensor.shape[1:])) for name, tensor in fitted._asdict().items()},
        snapshot_form=options.snapshot_form,
        projected=projected,
        center=center,
        difference=difference,
    )


def leading(operator: Operator, rank: int) -> Operator:
    """The operator that keeps only the first singular values: a block of one of higher rank, without another fit.

    Args:
        operator: fitted without `center`, whose mean is not among its directions.
        rank: how many to keep, at least one.

    Returns:
        A view; its residual is that of `operator`, which is lower than its own.

    >>> op = fit_in_form(torch.eye(4), snapshot_form=True)
    >>> leading(op, 2).transition.shape
    torch.Size([2, 2])
    """
    assert not operator.center
    transition, basis = operator.transition[..., :rank, :rank], operator.basis[..., :rank]
    return replace(
        operator,
        transition=transition,
        start=operator.start[..., :rank],
        basis=basis,
        image=basis @ transition if operator.projected else operator.image[..., :rank],
        rank=operator.rank.clamp_max(rank),
    )


def _at(horizon: float, now: Tensor, step: Callable[[float], Tensor]) -> Tensor:
    """`now` at 0, ``step(horizon)`` from 1 on, and a straight line between."""
    if isinstance(horizon, bool) or not isinstance(horizon, Real):
        raise TypeError(f"horizon is {horizon!r}, expected a number of snapshot steps, or math.inf")
    if not horizon >= 0 or FARTHEST <= horizon < math.inf:
        raise ValueError(
            f"horizon is {horizon}, expected 0 to 2^62 snapshot steps after the last snapshot, or math.inf"
        )
    if horizon == 0:
        return now.clone()
    if horizon < 1:
        return now + float(horizon) * (step(1) - now)
    return step(float(horizon)) if horizon % 1 or math.isinf(horizon) else step(int(horizon))


def _matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _require_real(tensor: object, name: str, shape: str) -> None:
    if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
        return
    given = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
    raise TypeError(f"{name}: expected a real floating-point tensor {shape}, got {given}; convert it first")


def _check(snapshots: Tensor, rank: int | None, rtol: float | None, difference: bool) -> None:
    _require_real(snapshots, "snapshots", "(*batch, time, state)")
    least = 3 if difference else 2
    if snapshots.dim() < 2 or snapshots.shape[-2] < least or snapshots.shape[-1] < 1:
        raise ValueError(
            f"snapshots has shape {tuple(snapshots.shape)}, expected (*batch, time, state) with time >= {least}"
            f"{' for difference=True' if difference else ''} and state >= 1; record more snapshots"
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1):
        raise ValueError(f"rank is {rank!r}, expected a whole number >= 1, or None for all singular values above rtol")
    if rtol is not None and (not isinstance(rtol, Real) or not 0 <= rtol < 1):
        raise ValueError(
            f"rtol is {rtol!r}, expected 0 <= rtol < 1, a share of the largest singular value, or None for the default"
        )


def algorithm_1(
    snapshots: Float[Tensor, "*batch time state"], horizon: int, rtol: float | None = None
) -> Float[Tensor, "*batch state"]:
    """Koopman training as the paper prints it, a patch at a time: the readable reference for :func:`koopt.fit`.

    Args:
        snapshots: `(*batch, time, state)`, floating point.
        horizon: whole snapshot steps >= 0.
        rtol: as in :func:`koopt.fit`.

    Returns:
        `(*batch, state)` in the dtype of the snapshots.

    Source: Dogra & Redman (2020), Algorithm 1. The paper prints ``A^+ = (A^T A)^-1 A^T``, whose inverse does not exist
    for windows longer than a patch is large; the pseudo-inverse does.

    >>> algorithm_1(torch.tensor([[8.0], [4.0], [2.0]]), 2)
    tensor([0.5000])
    """
    *batch, time, state = snapshots.shape
    default = max(torch.finfo(snapshots.dtype).eps, torch.finfo(torch.float64).eps * max(time, state))
    rtol = default if rtol is None else rtol
    forecasts = []
    for patch in snapshots.to(torch.float64).reshape(-1, time, state):
        earlier, later = patch[:-1].mT, patch[1:].mT
        koopman = later @ torch.linalg.pinv(earlier, rtol=rtol)
        weights = patch[-1]
        for _ in range(horizon):
            weights = koopman @ weights
        forecasts.append(weights)
    return torch.stack(forecasts).reshape(*batch, state).to(snapshots.dtype)
