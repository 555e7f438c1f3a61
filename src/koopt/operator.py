"""Koopman operators fitted to recorded weights: fit, advance, spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from koopt import linalg

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Complex, Float, Int
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Operator:
    """Koopman operators, one a patch, as :func:`koopt.fit` returns them.

    An operator of rank r acts on r coordinates of a state, ``z = basis^T (x - mean)``: ``z' = transition z``, and the
    state one step on is ``image z``. In state form the columns of `basis` and `image` are states; in snapshot form
    they are coefficients over the recorded snapshots, and no matrix as large as a state is held.

    Attributes:
        snapshots: `(*batch, time, state)`, what the operator was fitted to, held by reference.
        transition: `(*batch, r, r)` float64; with ``center`` the last coordinate is the constant 1 of the affine map.
        start: `(*batch, r)` float64, coordinates of the last snapshot (of the last increment with ``difference``).
        basis: `(*batch, state or time, r)` float64, the leading left singular directions that were kept.
        image: `(*batch, state or time, r)` float64, what one step makes of them.
        mean: `(*batch, state)` float64, removed before the coordinates are taken, or None without ``center``.
        rank: `(*batch)` int64, how many singular values each patch kept.
        residual: `(*batch)` float64, ``|B - U A| / |B|`` in Frobenius norm over the fitted pairs of snapshots (of
            increments with ``difference``); resolved to about 1e-8 where a Gram matrix served.
        snapshot_form: whether the operator lives in the span of the snapshots.
        projected: as given to :func:`koopt.fit`.
        difference: as given to :func:`koopt.fit`.
    """

    snapshots: Float[Tensor, "*batch time state"]
    transition: Float[Tensor, "*batch r r"]
    start: Float[Tensor, "*batch r"]
    basis: Float[Tensor, "*batch frame r"]
    image: Float[Tensor, "*batch frame r"]
    mean: Float[Tensor, "*batch state"] | None
    rank: Int[Tensor, "*batch"]
    residual: Float[Tensor, "*batch"]
    snapshot_form: bool
    projected: bool
    difference: bool

    def forecast(self, horizon: float, max_modulus: float | None = None) -> Float[Tensor, "*batch state"]:
        """The state `horizon` snapshot steps after the last snapshot.

        Args:
            horizon: snapshot steps >= 0. Whole numbers go by powers (valid for defective operators), others by the
                principal branch, between 0 and 1 along a straight line; ``math.inf`` is the fixed point.
            max_modulus: eigenvalues beyond this modulus are drawn in to it; None leaves them as they are.

        Returns:
            `(*batch, state)` in the dtype of the snapshots. A growing operator may overflow at a far horizon.

        Raises:
            ValueError: if the horizon is negative or NaN, or is infinite and a patch grows, turns or drifts for ever.

        Source: Dogra & Redman (2020), Eq. 6 and Algorithm 1.

        >>> halving = torch.tensor([[8.0], [4.0], [2.0]])
        >>> koopt.fit(halving).forecast(2)
        tensor([0.5000])
        """
        frame = self._frame_forecast(horizon, max_modulus, self._now)
        return frame.to(self.snapshots.dtype) if not self.snapshot_form else linalg.combine(frame, self.snapshots)

    def advance(self, state: Float[Tensor, "*batch state"], horizon: float) -> Float[Tensor, "*batch state"]:
        """Apply the operator to any state: ``forecast(a + b)`` is ``advance(forecast(a), b)`` for whole a and b.

        Args:
            state: `(*batch, state)`, floating point, one state a patch.
            horizon: snapshot steps, as in :meth:`forecast`.

        Returns:
            `(*batch, state)` in the dtype of `state`.

        Raises:
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
        shape = self.snapshots[..., -1, :].shape
        if state.shape != shape:
            raise ValueError(
                f"state has shape {tuple(state.shape)}, the patches {tuple(shape)}; pass one state a patch"
            )
        exact = state.to(torch.float64)
        coordinates = self._coordinates(exact)

        def lifted(columns: Tensor, z: Tensor) -> Tensor:
            frame = _matvec(columns, z)
            return linalg.combine(frame, self.snapshots.to(torch.float64)) if self.snapshot_form else frame

        now = lifted(self.basis, coordinates) if self.projected else exact
        step = lambda n: lifted(self.image, linalg.evolve(self.transition, coordinates, n - 1))  # noqa: E731
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
                "coefficients: this operator is in state form (patches no larger than the window is long); use forecast()"
            )
        return self._frame_forecast(horizon, max_modulus, self._now)

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
            modes = self.snapshots.to(modes.dtype).mT @ modes
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

    def _frame_forecast(self, horizon: float, max_modulus: float | None, now: Tensor) -> Tensor:
        """The forecast as a state or as coefficients, by the form of the operator."""
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
        if not max_modulus > 0:
            raise ValueError(
                f"max_modulus is {max_modulus}, expected a positive number; None leaves the eigenvalues alone"
            )
        if self.mean is None:
            return linalg.clamp_modulus(self.transition, self.start, max_modulus)
        # the constant of an affine map stays: only the linear part is clamped
        linear, first = linalg.clamp_modulus(self.transition[..., :-1, :-1], self.start[..., :-1], max_modulus)
        transition, start = self.transition.clone(), self.start.clone()
        transition[..., :-1, :-1], start[..., :-1] = linear, first
        return transition, start

    def _coordinates(self, state: Tensor) -> Tensor:
        frame = state if self.mean is None else state - self.mean
        if self.snapshot_form:
            frame = _matvec(self.snapshots.to(torch.float64), frame)
        coordinates = _matvec(self.basis.mT, frame)
        if self.mean is not None:
            coordinates[..., -1] = 1.0
        return coordinates


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
        rtol: singular values up to this share of a patch's largest are cut; default: eps of the snapshots' dtype
            times max(time, state).
        projected: project states and images on the kept directions (projected DMD), which removes noise.
        center: fit the affine map ``x' = mean(B) + U (x - mean(A))``.
        difference: fit the increments ``x_{i+1} - x_i`` and forecast by summing them up.

    Returns:
        An :class:`koopt.Operator` over the same batch.

    Raises:
        TypeError: if `snapshots` is not a real floating-point tensor.
        ValueError: if there are too few snapshots, NaN or Inf in a patch (named by index), or an option is out of range.

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
    """:func:`koopt.fit` in the form asked for, whatever the shape; None chooses by it."""
    _check(snapshots, rank, rtol, difference)
    snapshots = snapshots.detach()
    *batch, time, state = snapshots.shape
    if snapshot_form is None:
        snapshot_form = state > time
    data = (snapshots.diff(dim=-2) if difference else snapshots).reshape(-1, time - difference, state)
    mean = None
    if center:
        mean = data[:, :-1].mean(dim=-2, dtype=torch.float64)
        data = data.to(torch.float64) - mean.unsqueeze(-2)
    options = _Options(
        rank=min(state, data.shape[-2] - 1) if rank is None else min(rank, state, data.shape[-2] - 1),
        rtol=torch.finfo(snapshots.dtype).eps * max(time, state) if rtol is None else rtol,
        snapshot_form=snapshot_form,
        affine=center,
        projected=projected,
    )

    with torch.no_grad():
        if rank is not None and 2 * (options.rank + linalg.OVERSAMPLING) <= min(state, data.shape[-2] - 1):
            fitted = _fit_from_gram(data, options)
        else:
            fitted = _fit_from_svd(data, options)
    basis, image = fitted.basis, fitted.image
    if snapshot_form and difference:
        basis, image = (pad(c, (0, 0, 1, 0)) - pad(c, (0, 0, 0, 1)) for c in (basis, image))
    if mean is not None and not snapshot_form:
        basis, image = basis.clone(), image.clone()
        basis[..., -1] += mean
        image[..., -1] += mean

    def shaped(tensor: Tensor) -> Tensor:
        return tensor.reshape((*batch, *tensor.shape[1:]))

    return Operator(
        snapshots=snapshots,
        transition=shaped(fitted.transition),
        start=shaped(fitted.start),
        basis=shaped(basis),
        image=shaped(image),
        mean=None if mean is None else shaped(mean),
        rank=shaped(fitted.rank),
        residual=shaped(fitted.residual),
        snapshot_form=snapshot_form,
        projected=projected,
        difference=difference,
    )


class _Options(NamedTuple):
    rank: int
    rtol: float
    snapshot_form: bool
    affine: bool
    projected: bool


class _Fit(NamedTuple):
    transition: Tensor  # (patches, r, r)
    start: Tensor  # (patches, r)
    basis: Tensor  # (patches, state or time, r)
    image: Tensor  # (patches, state or time, r)
    rank: Tensor  # (patches,)
    residual: Tensor  # (patches,)


def _fit_from_svd(data: Tensor, options: _Options) -> _Fit:
    """The operator from the singular value decomposition of the snapshots, or of their triangular factor."""
    rows = linalg.triangular_factor(data) if options.snapshot_form else data.to(torch.float64)
    _require_finite(rows.sum(dim=(-2, -1)), data)
    left, values, directions = linalg.thin_svd(rows[:, :-1])
    values = values[:, : options.rank]
    kept = _kept(values, options)
    width = max(1, int(kept.sum(dim=-1).max())) if len(kept) else 1  # columns that no patch keeps are not carried along
    kept, values, directions = kept[:, :width], values[:, :width], directions[..., :width] * kept[:, None, :width]
    gain = left[..., :width] * (kept / torch.where(kept, values, 1.0)).unsqueeze(-2)
    coordinates = directions.mT @ rows.mT
    return _assemble(gain, coordinates, kept, options, None if options.snapshot_form else directions, rows)


def _fit_from_gram(data: Tensor, options: _Options) -> _Fit:
    """The same from a Gram matrix and its leading eigenvectors, where these resolve the rank; else from the SVD."""
    rows = None if options.snapshot_form else data.to(torch.float64)
    squared = linalg.gram(data) if rows is None else rows[:, :-1].mT @ rows[:, :-1]
    _require_finite(squared.diagonal(dim1=-2, dim2=-1).sum(dim=-1) + data[:, -1].sum(dim=-1), data)
    squares, vectors, settled = linalg.leading_eigenvectors(
        squared[:, :-1, :-1] if rows is None else squared, options.rank
    )
    values = squares.clamp_min(0.0).sqrt()
    kept = _kept(values, options)
    inverse = kept / torch.where(kept, values, 1.0)
    if rows is None:
        gain = vectors * inverse.unsqueeze(-2)
        fitted = _assemble(gain, gain.mT @ squared[:, :-1], kept, options, squared=squared)
    else:
        directions = vectors * kept.unsqueeze(-2)
        coordinates = directions.mT @ rows.mT
        gain = coordinates[..., :-1].mT * inverse.square().unsqueeze(-2)
        fitted = _assemble(gain, coordinates, kept, options, directions, rows, squared)
    if bool(settled.all()):
        return fitted
    missed = (~settled).nonzero().squeeze(-1)
    exact = _fit_from_svd(data[missed], options)
    return _Fit(*(_replaced(old, missed, new) for old, new in zip(fitted, exact, strict=True)))


def _assemble(
    gain: Tensor,
    coordinates: Tensor,
    kept: Tensor,
    options: _Options,
    directions: Tensor | None = None,
    rows: Tensor | None = None,
    squared: Tensor | None = None,
) -> _Fit:
    """Put the operator together.

    `gain` `(patches, time - 1, r)` maps later snapshots to the image, `coordinates` `(patches, r, time)` are the
    snapshots along the kept directions; `directions` where the form is of states, and the data or their Gram matrix.
    """
    later = None if directions is None or rows is None else rows[:, 1:].mT
    basis = pad(gain, (0, 0, 0, 1)) if directions is None else directions
    image = pad(gain, (0, 0, 1, 0)) if later is None else later @ gain
    transition = coordinates[..., 1:] @ gain
    if options.affine:
        drift = coordinates[..., 1:].mean(dim=-1, keepdim=True)
        transition = pad(torch.cat([transition, drift], dim=-1), (0, 0, 0, 1))
        transition[..., -1, -1] = 1.0
        coordinates = pad(coordinates, (0, 0, 0, 1), value=1.0)
        if later is None:
            even = torch.full_like(gain[..., :1], 1.0 / gain.shape[-2])
            centered = gain - gain.mean(dim=-2, keepdim=True)
            basis = pad(torch.cat([centered, even], dim=-1), (0, 0, 0, 1))
            image = pad(torch.cat([centered, even], dim=-1), (0, 0, 1, 0))
        else:
            basis = pad(basis, (0, 1))
            image = torch.cat([image, later.mean(dim=-1, keepdim=True)], dim=-1)
    if options.projected:
        image = basis @ transition
    if later is not None and squared is not None:
        z = coordinates[..., :-1]
        power = (
            squared.diagonal(dim1=-2, dim2=-1).sum(dim=-1) - rows[:, 0].square().sum(-1) + rows[:, -1].square().sum(-1)
        )
        error = (
            power - 2 * (image * (later @ z.mT)).sum(dim=(-2, -1)) + ((image.mT @ image) * (z @ z.mT)).sum(dim=(-2, -1))
        )
        size, error = power.sqrt(), error.clamp_min(0).sqrt()
    elif later is not None:
        predicted = image @ coordinates[..., :-1]
        size, error = later.norm(dim=(-2, -1)), (later - predicted).norm(dim=(-2, -1))
    else:
        predicted = image @ coordinates[..., :-1]
        miss = -predicted  # as coefficients over the snapshots, like the later snapshots themselves
        miss[..., 1:, :] += torch.eye(miss.shape[-1], dtype=miss.dtype, device=miss.device)
        if rows is not None:
            size, error = rows[:, 1:].norm(dim=(-2, -1)), (rows.mT @ miss).norm(dim=(-2, -1))
        else:
            assert squared is not None
            size = squared.diagonal(dim1=-2, dim2=-1)[:, 1:].sum(dim=-1).sqrt()
            error = (miss * (squared @ miss)).sum(dim=(-2, -1)).clamp_min(0.0).sqrt()
    residual = torch.where(size > 0, error / size, error)
    return _Fit(transition, coordinates[..., -1], basis, image, kept.sum(dim=-1), residual)


def _kept(values: Tensor, options: _Options) -> Tensor:
    return (values > options.rtol * values[:, :1]) & (values > 0)


def _replaced(tensor: Tensor, where: Tensor, new: Tensor) -> Tensor:
    """`tensor` with the patches `where` replaced by `new`, whose rank may be lower."""
    for dim in range(1, tensor.dim()):
        if new.shape[dim] < tensor.shape[dim]:
            shape = list(new.shape)
            shape[dim] = tensor.shape[dim] - new.shape[dim]
            new = torch.cat([new, new.new_zeros(shape)], dim=dim)
    return tensor.index_copy(0, where, new)


def _at(horizon: float, now: Tensor, step: Callable[[float], Tensor]) -> Tensor:
    """`now` at 0, ``step(horizon)`` from 1 on, and a straight line between."""
    if isinstance(horizon, bool) or not isinstance(horizon, (int, float)):
        raise TypeError(f"horizon is {type(horizon).__name__}, expected an int or a float: snapshot steps, or math.inf")
    if not horizon >= 0:
        raise ValueError(f"horizon is {horizon}, expected snapshot steps >= 0 after the last snapshot")
    if horizon == 0:
        return now.clone()
    return now + horizon * (step(1) - now) if horizon < 1 else step(horizon)


def _matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _check(snapshots: Tensor, rank: int | None, rtol: float | None, difference: bool) -> None:
    if not isinstance(snapshots, torch.Tensor) or not snapshots.is_floating_point():
        given = snapshots.dtype if isinstance(snapshots, torch.Tensor) else type(snapshots).__name__
        raise TypeError(
            f"snapshots: expected a real floating-point tensor (*batch, time, state), got {given}; convert it first"
        )
    least = 3 if difference else 2
    if snapshots.dim() < 2 or snapshots.shape[-2] < least or snapshots.shape[-1] < 1:
        raise ValueError(
            f"snapshots has shape {tuple(snapshots.shape)}, expected (*batch, time, state) with time >= {least}"
            f"{' for difference=True' if difference else ''} and state >= 1; record more snapshots"
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank is {rank!r}, expected a whole number >= 1, or None for all singular values above rtol")
    if rtol is not None and not 0 <= rtol < 1:
        raise ValueError(f"rtol is {rtol}, expected 0 <= rtol < 1: a share of the largest singular value")


def _require_finite(total: Tensor, data: Tensor) -> None:
    """`total` is a sum over each patch's data that NaN and Inf do not leave finite; the data are searched only then."""
    if bool(total.isfinite().all()):
        return
    bad = ~data.isfinite().all(dim=-1).all(dim=-1)
    if not bool(bad.any()):
        raise ValueError("snapshots are too large to square in float64; divide them by a constant and fit again")
    raise ValueError(
        f"snapshots: NaN or Inf in patch {linalg.name_patches(bad)}; drop these snapshots or these patches"
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
    rtol = torch.finfo(snapshots.dtype).eps * max(time, state) if rtol is None else rtol
    forecasts = []
    for patch in snapshots.to(torch.float64).reshape(-1, time, state):
        earlier, later = patch[:-1].mT, patch[1:].mT
        koopman = later @ torch.linalg.pinv(earlier, rtol=rtol)
        weights = patch[-1]
        for _ in range(horizon):
            weights = koopman @ weights
        forecasts.append(weights)
    return torch.stack(forecasts).reshape(*batch, state).to(snapshots.dtype)
