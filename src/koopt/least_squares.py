"""The least-squares operator of a window, ``U = B A^+``, by singular values or by a Gram matrix."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from koopt import linalg

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

GRAM_RTOL = 1e-5  # cuts from here on leave nothing that squaring would lose


class Options(NamedTuple):
    """What :func:`koopt.fit` was asked for, with `rank` the most that the shapes allow and `batch` the leading axes."""

    rank: int
    rtol: float | None
    snapshot_form: bool
    projected: bool
    center: bool
    difference: bool
    batch: tuple[int, ...]

    def prepare(self, rows: Tensor) -> Tensor:
        """What is fitted: increments with `difference`, around the mean of the earlier ones with `center`."""
        rows = rows.diff(dim=-2) if self.difference else rows
        return rows - _earlier_mean(rows) if self.center else rows

    def share(self, data: Tensor) -> float:
        """Of a patch's largest singular value, up to which others are cut."""
        # what rounding the snapshots adds lies below their eps, whatever their number; the algebra's own grows with it
        default = max(torch.finfo(data.dtype).eps, linalg.EPS * max(data.shape[-2:]))
        return max(default if self.rtol is None else self.rtol, linalg.EPS)

    def kept(self, values: Tensor, data: Tensor) -> Tensor:
        """Which singular values of each patch are not cut."""
        cut = (self.share(data) * values[:, 0]).clamp_min(linalg.SQUARABLE)
        if self.rtol is None and (self.center or self.difference):
            ends = data[:, [0, -1]].to(torch.float64).norm(dim=-1).amax(dim=-1)
            cut = torch.maximum(cut, torch.finfo(data.dtype).eps * data.shape[-2] ** 0.5 * ends)
        return values > cut.unsqueeze(-1)


class Fit(NamedTuple):
    """The tensors of a :class:`koopt.Operator`, over one axis of patches."""

    transition: Tensor  # (patches, r, r)
    start: Tensor  # (patches, r)
    basis: Tensor  # (patches, state or time, r)
    image: Tensor  # (patches, state or time, r)
    rank: Tensor  # (patches,)
    residual: Tensor  # (patches,)


def fit(data: Tensor, options: Options) -> Fit:
    """The operator of each patch `(patches, time, state)`, by a Gram matrix where that is good enough.

    >>> options = Options(1, 0.0, False, False, False, False, ())
    >>> fit(torch.tensor([[[8.0], [4.0], [2.0]]]), options).transition
    tensor([[[0.5000]]], dtype=torch.float64)
    """
    few = 2 * (options.rank + linalg.OVERSAMPLING) <= min(data.shape[-1], data.shape[-2] - options.difference - 1)
    return from_gram(data, options) if few or options.share(data) >= GRAM_RTOL else from_svd(data, options)


def from_svd(data: Tensor, options: Options, width: int | None = None) -> Fit:
    """The operator from the singular value decomposition of the snapshots, or of their triangular factor.

    It is as wide as the highest rank that a patch turns out to have, or `width`.
    """
    if options.snapshot_form:
        rows = linalg.triangular_factor(data, options.prepare)
    else:
        rows = options.prepare(data.to(torch.float64))
    _require_finite(rows.square().sum(dim=(-2, -1)), data, options)
    left, values, directions = linalg.svd(rows[:, :-1])
    values = values[:, : options.rank]
    kept = options.kept(values, data)
    if width is None:
        width = max(1, int(kept.sum(dim=-1).max())) if len(kept) else 1
    kept, values, directions = kept[:, :width], values[:, :width], directions[..., :width] * kept[:, None, :width]
    gain = left[..., :width] * (kept / torch.where(kept, values, 1.0)).unsqueeze(-2)

    def residual(image: Tensor, z: Tensor) -> Tensor:
        return _residual(rows, rows.mT @ image if options.snapshot_form else image, z)

    return _assemble(gain, directions.mT @ rows.mT, kept, data, options, residual, rows, directions)


def from_gram(data: Tensor, options: Options) -> Fit:
    """The same from a Gram matrix: all eigenvectors if the cut is coarse, else the leading ones.

    Where these do not resolve the rank, it is taken from the SVD.
    """
    rows = squared = directions = None
    if options.snapshot_form:
        squared = linalg.gram(data, options.prepare)
        total, earlier = squared.diagonal(dim1=-2, dim2=-1).sum(dim=-1), squared[:, :-1, :-1]
        residual = partial(_residual_from_gram, squared)
    else:
        rows = options.prepare(data.to(torch.float64))
        earlier = rows[:, :-1].mT @ rows[:, :-1]
        total = earlier.diagonal(dim1=-2, dim2=-1).sum(dim=-1) + rows[:, -1].square().sum(dim=-1)
        residual = partial(_residual_from_moments, rows, total)
    _require_finite(total, data, options)
    coarse = options.share(data) >= GRAM_RTOL
    if coarse:
        squares, vectors = (found[..., : options.rank] for found in linalg.eigh(earlier))
        settled = torch.ones_like(squares[:, 0], dtype=torch.bool)
    else:
        squares, vectors, settled = linalg.leading_eigenvectors(earlier, options.rank)
    values = squares.clamp_min(0.0).sqrt()
    kept = options.kept(values, data)
    if coarse and len(kept):
        width = max(1, int(kept.sum(dim=-1).max()))
        values, vectors, kept = values[:, :width], vectors[..., :width], kept[:, :width]
    inverse = (kept / torch.where(kept, values, 1.0)).unsqueeze(-2)
    if squared is not None:
        gain = vectors * inverse
        coordinates = gain.mT @ squared[:, :-1]
    else:
        assert rows is not None
        directions = vectors * kept.unsqueeze(-2)
        coordinates = directions.mT @ rows.mT
        gain = coordinates[..., :-1].mT * inverse.square()
    fitted = _assemble(gain, coordinates, kept, data, options, residual, rows, directions)
    if bool(settled.all()):
        return fitted
    missed = (~settled).nonzero().squeeze(-1)
    exact = from_svd(data[missed], options, width=options.rank)
    return Fit(*(old.index_copy(0, missed, new) for old, new in zip(fitted, exact, strict=True)))


def _assemble(
    gain: Tensor,
    coordinates: Tensor,
    kept: Tensor,
    data: Tensor,
    options: Options,
    residual_of: Callable[[Tensor, Tensor], Tensor],
    rows: Tensor | None,
    directions: Tensor | None,
) -> Fit:
    """Put the operator together.

    `gain` `(patches, pairs, r)` maps the later rows to the image, `coordinates` `(patches, r, pairs + 1)` are the rows
    along the kept `directions` `(patches, columns, r)`. The rows are the prepared data, or their triangular factor, or
    None where their Gram matrix served.
    """
    if options.center:
        even = torch.full_like(gain[..., :1], 1.0 / gain.shape[-2])
        gain = torch.cat([gain - gain.mean(dim=-2, keepdim=True), even], dim=-1)
        coordinates = pad(coordinates, (0, 0, 0, 1), value=1.0)
    transition = coordinates[..., 1:] @ gain
    if options.snapshot_form:
        basis, image = pad(gain, (0, 0, 0, 1)), pad(gain, (0, 0, 1, 0))
    else:
        assert rows is not None
        assert directions is not None
        basis, image = pad(directions, (0, options.center)), rows[:, 1:].mT @ gain
    if options.center:
        transition[..., -1, :-1], transition[..., -1, -1] = 0.0, 1.0
    if options.projected:
        image = basis @ transition
    residual = residual_of(image, coordinates)
    if options.snapshot_form and options.difference:  # from coefficients over increments to those over snapshots
        basis, image = (pad(c, (0, 0, 1, 0)) - pad(c, (0, 0, 0, 1)) for c in (basis, image))
    if options.center and not options.snapshot_form:
        exact = data.to(torch.float64)
        mean = _earlier_mean(exact.diff(dim=-2) if options.difference else exact)[:, 0]
        basis[..., -1] += mean
        image[..., -1] += mean
    return Fit(transition, coordinates[..., -1], basis, image, kept.sum(dim=-1), residual)


def _residual(rows: Tensor, image: Tensor, coordinates: Tensor) -> Tensor:
    """``|B - U A| / |B|`` with the image in the frame of the rows."""
    size = rows[:, 1:].norm(dim=(-2, -1))
    error = (rows[:, 1:] - (image @ coordinates[..., :-1]).mT).norm(dim=(-2, -1))
    return torch.where(size > 0, error / size, error)


def _residual_from_gram(squared: Tensor, image: Tensor, coordinates: Tensor) -> Tensor:
    """The same with the image as coefficients over the rows, whose Gram matrix is known."""
    miss = -(image @ coordinates[..., :-1])
    miss[..., 1:, :] += torch.eye(miss.shape[-1], dtype=miss.dtype, device=miss.device)
    size = squared.diagonal(dim1=-2, dim2=-1)[:, 1:].sum(dim=-1).sqrt()
    error = (miss * (squared @ miss)).sum(dim=(-2, -1)).clamp_min(0.0).sqrt()
    return torch.where(size > 0, error / size, error)


def _residual_from_moments(rows: Tensor, total: Tensor, image: Tensor, coordinates: Tensor) -> Tensor:
    """The same with the image in the frame of the rows, whose sum of squares is known: no pass over a difference."""
    z = coordinates[..., :-1]
    size = total - rows[:, 0].square().sum(dim=-1)
    cross = ((rows[:, 1:].mT @ z.mT) * image).sum(dim=(-2, -1))
    error = size - 2 * cross + ((image.mT @ image) * (z @ z.mT)).sum(dim=(-2, -1))
    return torch.where(size > 0, (error.clamp_min(0.0) / size).sqrt(), 0.0)


def _earlier_mean(rows: Tensor) -> Tensor:
    """The mean of all but the last row, exact where the rows do not move."""
    last = rows[..., -1:, :]
    return last + (rows[..., :-1, :] - last).mean(dim=-2, keepdim=True)


def _require_finite(total: Tensor, data: Tensor, options: Options) -> None:
    """`total` is a sum of squares over each patch; the data themselves are searched only where it is not finite."""
    if bool(total.isfinite().all()):
        return
    bad = ~data.isfinite().all(dim=-1).all(dim=-1)
    if not bool(bad.any()):
        raise ValueError("snapshots: too large to square in float64; divide them by a constant and fit again")
    where = linalg.name_patches(bad.reshape(options.batch))
    raise ValueError(f"snapshots: NaN or Inf in {where}; drop these snapshots or these patches")
