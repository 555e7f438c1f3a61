"""The ways to forecast that choosing.py compares: how weights are grouped, how a window is prepared and inverted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

import koopt
from koopt import linalg
from koopt.forecasters import METHODS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

RANKS = range(1, 9)  # that a rule may choose from


@dataclass(frozen=True)
class Setting:
    """One way to forecast; windows in optimizer steps.

    Attributes:
        tail: how far back it looks.
        stride: from snapshot to snapshot.
        average: means of blocks of `stride` steps in place of snapshots.
        by: "weight", "node", "layer", "network", or groups of the sizes of nodes: "similar motion",
            "unlike motion", "random".
        max_size: the q of quasi-nodes.
        delays: snapshots stacked into one state.
        inverse: "koopt" (``koopt.fit``) or a name of :data:`INVERSES`.
        rank: a number, None, or a rule: "threshold", "held out", "lowest loss".
        rtol, center, difference, projected, max_modulus: as ``koopt.fit`` and ``forecast`` take them.
        method: "koopman" or another name of ``koopt.forecasters.METHODS``.
    """

    tail: int
    stride: int
    average: bool = False
    by: str = "network"
    max_size: int | None = None
    delays: int = 1
    inverse: str = "koopt"
    rank: int | str | None = None
    rtol: float | None = None
    center: bool = False
    difference: bool = False
    projected: bool = False
    max_modulus: float | None = None
    method: str = "koopman"


def forecast(
    setting: Setting, snapshots: Tensor, horizon: float, parts: koopt.Partition, loss_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, float]:
    """Weights `horizon` snapshot steps after the last of `(time, weights)`, and the largest modulus (NaN for a line).

    The loss, of `(networks, weights)`, is looked at by the rule "lowest loss" alone.
    """
    if setting.method != "koopman":
        return linalg.combine(METHODS[setting.method](snapshots, horizon), snapshots), math.nan
    if isinstance(setting.rank, str):
        return _by_rule(setting, snapshots, horizon, parts, loss_of)
    continued, largest = [], 0.0
    for group in parts.gather_flat(snapshots):
        patches = group.transpose(0, 1)
        size = patches.shape[-1]
        if setting.delays > 1:
            patches = stacked(patches, setting.delays)
        if setting.inverse == "koopt":
            options = {"rank": setting.rank, "rtol": setting.rtol, "projected": setting.projected}
            op = koopt.fit(patches, center=setting.center, difference=setting.difference, **options)
            weights, values = op.forecast(horizon, setting.max_modulus), op.eigenvalues
        else:
            weights, values = by_inverse(patches, horizon, setting)
        continued.append(weights[..., :size])
        largest = max(largest, values.abs().max().item())
    return parts.scatter_flat(continued), largest


def stacked(patches: Tensor, delays: int) -> Tensor:
    """Each snapshot `(*batch, time, state)` with those before it, the newest first."""
    time = patches.shape[-2] - delays + 1
    return torch.cat([patches[..., delays - 1 - i : delays - 1 - i + time, :] for i in range(delays)], dim=-1)


# Groups of weights


def partition(model: nn.Module, setting: Setting, snapshots: Tensor, seed: int) -> koopt.Partition:
    """The patches of a setting; those by motion depend on the window `(time, weights)`, random ones on the seed."""
    if setting.by in ("weight", "node", "layer", "network"):
        return koopt.partition(model, setting.by, setting.max_size)
    sizes = [size for patches, size in koopt.partition(model, "node").groups for _ in range(patches)]
    if setting.by == "random":
        order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))
        labels = torch.empty_like(order)
        labels[order] = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    else:
        labels = groups_by_motion(snapshots.double().diff(dim=0), sizes, unlike=setting.by == "unlike motion")
    named = koopt.partition(model, "network").unflatten(labels)
    return koopt.partition(model, by=lambda name, _: named[name])


def groups_by_motion(increments: Tensor, sizes: Sequence[int], unlike: bool = False) -> Tensor:
    """Labels `(weights,)` of groups of these sizes whose weights move alike, up to sign and scale.

    Greedy: the weight that moved furthest of those left leads a group, and takes the ones most (or least) correlated.
    """
    norms = increments.norm(dim=0)
    unit = increments / torch.where(norms > 0, norms, 1.0)
    labels = torch.full(norms.shape, -1)
    free = torch.ones_like(norms, dtype=torch.bool)
    for label, size in enumerate(sorted(sizes, reverse=True)):
        leader = torch.where(free, norms, -1.0).argmax()
        alike = (unit[:, leader] @ unit).abs()
        score = torch.where(free, -alike if unlike else alike, -math.inf)
        score[leader] = math.inf
        members = score.topk(size).indices
        labels[members], free[members] = label, False
    return labels


# Ranks by rule


def optimal_threshold(values: Tensor, shape: tuple[int, int]) -> int:
    """How many singular values stand out of noise of unknown size (Gavish & Donoho, 2014); at least one."""
    ratio = min(shape) / max(shape)
    factor = 0.56 * ratio**3 - 0.95 * ratio**2 + 1.82 * ratio + 1.43
    return max(1, int((values > factor * values.median()).sum()))


def _by_rule(
    setting: Setting, snapshots: Tensor, horizon: float, parts: koopt.Partition, loss_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, float]:
    def with_rank(rank: int, window: Tensor, ahead: float) -> tuple[Tensor, float]:
        return forecast(replace(setting, rank=rank), window, ahead, parts, loss_of)

    if setting.rank == "threshold":  # one for all patches: of the network
        rows = snapshots.double().diff(dim=0) if setting.difference else snapshots.double()
        rank = optimal_threshold(torch.linalg.svdvals(rows[:-1]), (len(rows) - 1, rows.shape[1]))
        return with_rank(rank, snapshots, horizon)
    if setting.rank == "held out":
        ahead = max(1, min(round(horizon), len(snapshots) // 3))
        errors = [(with_rank(rank, snapshots[:-ahead], ahead)[0] - snapshots[-1]).norm() for rank in RANKS]
        return with_rank(RANKS[torch.stack(errors).nan_to_num(math.inf).argmin()], snapshots, horizon)
    found = [with_rank(rank, snapshots, horizon) for rank in RANKS]
    losses = loss_of(torch.stack([weights for weights, _ in found]))
    return found[int(losses.nan_to_num(math.inf).argmin())]


# Inverses: the pseudo-inverse of a matrix `(*batch, state, pairs)` as two factors, gain @ directions


def by_inverse(patches: Tensor, horizon: float, setting: Setting) -> tuple[Tensor, Tensor]:
    """``U^n x = B G (D B G)^(n-1) D x`` with ``A^+ = G D``, and the eigenvalues; with increments, x plus their sum."""
    exact = patches.double()
    rows = exact.diff(dim=-2) if setting.difference else exact
    earlier, later, last = rows[..., :-1, :].mT, rows[..., 1:, :].mT, rows[..., -1, :, None]
    assert not isinstance(setting.rank, str)  # rules have been applied
    gain, directions = INVERSES[setting.inverse](earlier, setting.rank, setting.rtol)
    image, start = later @ gain, (directions @ last).squeeze(-1)
    transition = directions @ image
    if setting.difference:  # the sum of the powers, as one power of an affine map
        summing = pad(transition, (0, 1, 0, 1))
        summing[..., :-1, -1], summing[..., -1, -1] = start, 1.0
        origin = pad(torch.zeros_like(start), (0, 1), value=1.0)
        reached = linalg.evolve(summing, origin, horizon)[..., :-1]
    else:
        reached = linalg.evolve(transition, start, horizon - 1)
    moved = (image @ reached.unsqueeze(-1)).squeeze(-1)
    weights = exact[..., -1, :] + moved if setting.difference else moved
    return weights.to(patches.dtype), torch.linalg.eigvals(transition)


def by_svd(matrix: Tensor, rank: int | None, rtol: float | None) -> tuple[Tensor, Tensor]:
    left, values, right = linalg.svd(matrix)
    return right * _inverted(values, rank, _cut(matrix, rtol)).unsqueeze(-2), left.mT


def multiplied_out(matrix: Tensor, rank: int | None, rtol: float | None) -> tuple[Tensor, Tensor]:
    """The SVD's pseudo-inverse as one matrix, so that the operator is U itself; of patches smaller than the window."""
    gain, directions = by_svd(matrix, rank, rtol)
    return gain @ directions, torch.eye(len(matrix[0])).to(matrix)


def by_pivoted_qr(matrix: Tensor, rank: int | None, rtol: float | None) -> tuple[Tensor, Tensor]:
    """Columns taken one by one, the largest remainder first, orthogonalized twice; within their span exact."""
    rest, basis = matrix, matrix.new_zeros((*matrix.shape[:-1], 0))
    cut = _cut(matrix, rtol) * matrix.norm(dim=(-2, -1))
    for _ in range(min(rank or len(matrix[0]), *matrix.shape[-2:])):
        left = rest.norm(dim=(-2, -1)) > cut
        if not bool(left.any()):
            break
        at = rest.norm(dim=-2).argmax(dim=-1)[..., None, None].expand(*rest.shape[:-1], 1)
        column = _unit(rest.gather(-1, at))
        column = _unit(column - basis @ (basis.mT @ column)) * left[..., None, None]
        rest = rest - column @ (column.mT @ rest)
        basis = torch.cat([basis, column], dim=-1)
    return torch.linalg.pinv(basis.mT @ matrix, rtol=linalg.EPS), basis.mT


def by_qr(matrix: Tensor, rank: int | None, rtol: float | None) -> tuple[Tensor, Tensor]:
    """Nothing is cut."""
    if matrix.shape[-2] > matrix.shape[-1]:
        q, r = torch.linalg.qr(matrix)
        return torch.linalg.solve_triangular(r, torch.eye(len(r[0])).to(r), upper=True), q.mT
    q, r = torch.linalg.qr(matrix.mT)
    return q, torch.linalg.solve_triangular(r.mT, torch.eye(len(r[0])).to(r), upper=False)


def by_cholesky(matrix: Tensor, rank: int | None, rtol: float | None) -> tuple[Tensor, Tensor]:
    """Of the normal equations, as the paper prints them; `rtol` is the ridge, as a share of their trace."""
    wide = matrix.shape[-2] <= matrix.shape[-1]
    squared = matrix @ matrix.mT if wide else matrix.mT @ matrix
    eye = torch.eye(len(squared[0])).to(squared)
    ridge = (rtol or 0.0) * squared.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    lower = torch.linalg.cholesky(squared + ridge[..., None, None] * eye)  # refuses a singular one
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    return (matrix.mT @ inverse.mT, inverse) if wide else (inverse.mT, inverse @ matrix.mT)


def by_gram(matrix: Tensor, rank: int | None, rtol: float | None) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the normal equations, cut: squared singular values, so half of the digits."""
    wide = matrix.shape[-2] <= matrix.shape[-1]
    squares, vectors = torch.linalg.eigh(matrix @ matrix.mT if wide else matrix.mT @ matrix)
    values, vectors = squares.clamp_min(0.0).sqrt().flip(-1), vectors.flip(-1)
    gain = _inverted(values, rank, max(_cut(matrix, rtol), linalg.EPS**0.5)).unsqueeze(-2)
    if wide:
        return matrix.mT @ (vectors * gain.square()), vectors.mT
    return vectors * gain, gain.mT * (vectors.mT @ matrix.mT)


MULTIPLIED_OUT = "SVD, multiplied out"
INVERSES = {
    "SVD": by_svd,
    MULTIPLIED_OUT: multiplied_out,
    "pivoted QR": by_pivoted_qr,
    "QR, no cut": by_qr,
    "Gram, cut": by_gram,
    "Cholesky": by_cholesky,
}


def _unit(column: Tensor) -> Tensor:
    return column / column.norm(dim=-2, keepdim=True).clamp_min(linalg.SQUARABLE)


def _cut(matrix: Tensor, rtol: float | None) -> float:
    return linalg.EPS * max(matrix.shape[-2:]) if rtol is None else rtol


def _inverted(values: Tensor, rank: int | None, cut: float) -> Tensor:
    """Reciprocals of the leading singular values, zeros for those that are cut."""
    kept = values > cut * values[..., :1]
    if rank is not None:
        kept[..., rank:] = False
    return kept / torch.where(kept, values, 1.0)
