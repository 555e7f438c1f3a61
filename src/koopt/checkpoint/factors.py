"""The small factor of each patch: its snapshots in an orthonormal basis of their span, streamed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from koopt import linalg
from koopt.checkpoint import streaming
from koopt.forecasters import RESOLVED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float
    from torch import Tensor

    from koopt.checkpoint.groups import Slab
    from koopt.checkpoint.stored import Checkpoint

WIDE = 65_536  # numbers of one snapshot that are squared at a time, so that they stay in cache


class Factor(NamedTuple):
    """What the rules need to know of a slab's patches.

    Attributes:
        rows: `(patches, time, r)` float64, the snapshots in an orthonormal basis, without the tensors that are still.
        eps: `(patches,)` spacing of the stored numbers relative to their size.
        state: how many weights a patch has.
        still: tensors that are the same in all checkpoints.
    """

    rows: Float[Tensor, "patches time r"]
    eps: Float[Tensor, " patches"]
    state: int
    still: tuple[str, ...]


def needs_qr(dtype: torch.dtype, rtol: float | None) -> bool:
    """Whether tensors of a dtype need an orthogonal factor; else the Gram matrix of their increments will do.

    A Gram matrix shows singular values down to some 2e-8 of the largest increment. The rounding of numbers stored in
    float32 or less is 3e-8 of the weights themselves, which move less than they are large.

    >>> needs_qr(torch.float32, None), needs_qr(torch.float32, 1e-9), needs_qr(torch.float64, None)
    (False, True, True)
    """
    return dtype == torch.float64 or (rtol is not None and rtol < RESOLVED)


class Part(NamedTuple):
    """What one block adds to its tensor.

    Attributes:
        small: `(patches, time, r)`, its :func:`moments`, or a triangular factor; None for a mask that never changes.
        moved: whether it is not the same in all checkpoints.
        bad: the first checkpoint in which it holds NaN or Inf, if any does.
    """

    small: Tensor | None
    moved: bool
    bad: int | None


def measure(rows: Float[Tensor, "patches time width"], qr: bool) -> Part:
    """The small matrices of one block in the stored dtype.

    >>> measure(torch.ones(1, 2, 5), qr=False).moved
    False
    """
    small = linalg.triangular_factor(rows) if qr else moments(rows)
    if qr:
        moved = not bool((rows[:, 1:] == rows[:, :-1]).all())
    else:
        moved = bool((small[:, :-1].diagonal(dim1=-2, dim2=-1) != 0).any())
    if bool((small.square() if qr else small).sum().isfinite()):
        return Part(small, moved, None)
    finite = rows.isfinite().all(dim=-1).all(dim=0)
    if bool(finite.all()):
        raise OverflowError
    bits = rows.transpose(0, 1).contiguous().flatten(1).view(torch.uint8)
    moved = not bool((bits[1:] == bits[:-1]).all())
    return Part(small if moved else None, moved, int((~finite).int().argmax()))


class Accumulator:
    """Adds up the factors of one slab, block by block.

    Args:
        slab: whose blocks come.
        checkpoints: in order of time.
        rtol: as in :func:`koopt.fit`.
    """

    def __init__(self, slab: Slab, checkpoints: Sequence[Checkpoint], rtol: float | None) -> None:
        self.slab = slab
        self._checkpoints = checkpoints
        self._entries = checkpoints[-1].entries
        self._rtol = rtol
        self._shape = (slab.patches, len(checkpoints), len(checkpoints))
        self._gram = torch.zeros(self._shape, dtype=torch.float64)
        self._triangular: Tensor | None = None
        self._rounding = torch.zeros(slab.patches, dtype=torch.float64)  # sum of (eps |x|)^2
        self._size = torch.zeros(slab.patches, dtype=torch.float64)
        self._state = 0
        self._still: list[str] = []
        self._name: str | None = None
        self._begin()

    def _begin(self) -> None:
        self._part = torch.zeros(self._shape, dtype=torch.float64)
        self._moved = False
        self._bad: int | None = None

    def add(self, block: streaming.Block, part: Part) -> None:
        """Take what the next block was measured to be."""
        if block.name != self._name:
            self._finish_tensor()
            self._name = block.name
        self._moved |= part.moved
        self._bad = part.bad if self._bad is None else self._bad
        if part.small is None:
            return
        place = slice(block.first, block.first + block.patches)
        if needs_qr(self._entries[block.name].dtype, self._rtol):
            if part.bad is None:
                self._part[place] = linalg.triangular_factor(torch.cat([self._part[place], part.small], dim=-1))
        else:
            self._part[place] += part.small

    def _finish_tensor(self) -> None:
        if self._name is None:
            return
        entry = self._entries[self._name]
        if not self._moved:
            self._still.append(self._name)
        elif self._bad is not None:
            file = self._checkpoints[self._bad].entries[self._name].file
            raise ValueError(
                f"{file}: tensor {self._name!r} holds NaN or Inf; give checkpoints from before, or --exclude it"
            )
        else:
            if needs_qr(entry.dtype, self._rtol):
                held = self._part if self._triangular is None else torch.cat([self._triangular, self._part], dim=-1)
                self._triangular = linalg.triangular_factor(held)
                square = self._part[:, -1].square().sum(dim=-1)
            else:
                self._gram += self._part
                square = self._part[:, -1, -1]
            self._size += square
            self._rounding += torch.finfo(entry.dtype).eps ** 2 * square
            self._state += entry.size // self.slab.group.patches
        self._begin()

    def finish(self) -> Factor:
        """The factor of all blocks."""
        self._finish_tensor()
        rows = rows_of(self._gram)
        if self._triangular is not None:
            rows = linalg.triangular_factor(torch.cat([rows, self._triangular], dim=-1))
        eps = torch.where(self._size > 0, (self._rounding / self._size).sqrt(), 0.0)
        return Factor(rows, eps, self._state, tuple(self._still))


def moments(rows: Float[Tensor, "patches time width"]) -> Float[Tensor, "patches time time"]:
    """The Gram matrix of the increments, and of the last snapshot as one more row, in float64.

    >>> moments(torch.tensor([[[1.0], [3.0], [4.0]]]))
    tensor([[[ 4.,  2.,  8.],
             [ 2.,  1.,  4.],
             [ 8.,  4., 16.]]], dtype=torch.float64)
    """
    exact = torch.promote_types(rows.dtype, torch.float32)  # differences of close numbers have no rounding in it
    patches, time, width = rows.shape
    wide = max(1, WIDE // patches)
    total = torch.zeros(patches, time, time, dtype=torch.float64)
    work = torch.empty(patches, time, min(wide, width), dtype=torch.float64)
    for piece in rows.split(wide, dim=-1):
        piece = piece.to(exact)
        held = work[..., : piece.shape[-1]]
        torch.sub(piece[:, 1:], piece[:, :-1], out=held[:, :-1])
        held[:, -1] = piece[:, -1]
        if patches == 1:
            total[0].addmm_(held[0], held[0].mT)
        else:
            total.baddbmm_(held, held.mT)
    return total


def rows_of(squared: Float[Tensor, "patches time time"]) -> Float[Tensor, "patches time time"]:
    """Snapshots with these :func:`moments`, the last along the first axis of an orthonormal basis.

    Only what the increments have across the last snapshot goes through the root of a Gram matrix, so that motion that
    is small beside the weights keeps its digits.

    >>> rows_of(moments(torch.tensor([[[1.0], [3.0], [4.0]]]))).norm(dim=-1)
    tensor([[1., 3., 4.]], dtype=torch.float64)
    """
    last = squared[:, -1:, -1].clamp_min(0.0).sqrt()
    along = torch.where(last > 0, squared[:, :-1, -1] / last, 0.0)
    across = squared[:, :-1, :-1] - along.unsqueeze(-1) * along.unsqueeze(-2)
    increments = torch.cat([along.unsqueeze(-1), linalg.factor_of_gram(across)], dim=-1)
    back = increments.flip(1).cumsum(dim=1).flip(1)
    end = torch.cat([last, torch.zeros_like(increments[:, 0, 1:])], dim=-1).unsqueeze(1)
    return torch.cat([end - back, end], dim=1)


def resolution(
    factor: Factor,
) -> tuple[Float[Tensor, " patches"], Float[Tensor, " patches"], Bool[Tensor, " patches"]]:
    """The motion of one step (root mean square) and of the whole window, in roundings of the stored numbers.

    The third is whether a patch moves at all.
    """
    rounding = ROUNDING * factor.eps * factor.rows[:, -1].norm(dim=-1)
    increments = factor.rows.diff(dim=1)
    step = increments.square().sum(dim=-1).mean(dim=-1).sqrt()
    window = (factor.rows[:, -1] - factor.rows[:, 0]).norm(dim=-1)
    return _share(step, rounding), _share(window, rounding), step > 0


ROUNDING = 0.213  # root mean square error of rounding in eps of the size, of normally distributed numbers


def _share(motion: Tensor, rounding: Tensor) -> Tensor:
    return torch.where(rounding > 0, motion / rounding, torch.where(motion > 0, torch.inf, 0.0))
