"""Recorded weights in bounded memory: a window of snapshots, and means of blocks that double as a run grows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxtyping import Float
    from torch import Tensor

SAMPLES = 4  # of a block; momentum makes closer ones nearly alike


class Snapshots:
    """The last `length` snapshots of some tensors, each the mean of `block` successive steps.

    Args:
        tensors: what is recorded; their number and shapes do not change.
        length: how many are kept.
        dtype, device: of the snapshots.
        block: how many steps are averaged; :meth:`clear` may change it.

    >>> held = Snapshots([torch.tensor([1.0])], 2, torch.float32, torch.device("cpu"))
    >>> for value in (1.0, 2.0, 3.0):
    ...     held.add([torch.tensor([value])])
    >>> held.ordered()
    tensor([[2.],
            [3.]])
    """

    def __init__(
        self, tensors: Sequence[Tensor], length: int, dtype: torch.dtype, device: torch.device, block: int = 1
    ) -> None:
        self.rows = torch.zeros(length, sum(tensor.numel() for tensor in tensors), dtype=dtype, device=device)
        self._cut = [cut(row, tensors) for row in self.rows]
        self.length, self.block, self.taken = length, block, 0

    def add(self, tensors: Sequence[Tensor]) -> None:
        """One more step."""
        full, open_ = divmod(self.taken, self.block)
        place = full % self.length
        record(self._cut[place], tensors, add=open_ > 0)
        self.taken += 1
        if 1 < self.block == open_ + 1:
            self.rows[place].div_(self.block)

    def clear(self, block: int | None = None) -> None:
        """Begin anew, with means of so many steps; None: of as many as before."""
        self.taken, self.block = 0, block or self.block

    def ordered(self) -> Float[Tensor, "time state"]:
        """The snapshots in order of time: a view until the window is full, then a copy.

        >>> pairs = Snapshots([torch.tensor([1.0])], 2, torch.float32, torch.device("cpu"), block=2)
        >>> for value in (1.0, 2.0, 3.0, 4.0, 5.0):
        ...     pairs.add([torch.tensor([value])])
        >>> pairs.ordered(), pairs.age  # the open block has taken the place of the oldest
        (tensor([[3.5000]]), 1.5)
        """
        full, open_ = divmod(self.taken, self.block)
        if full + (open_ > 0) <= self.length:
            return self.rows[:full]
        return self.rows.roll(-full % self.length, dims=0)[open_ > 0 :]

    @property
    def steps(self) -> int:
        """How many steps a full window is made from."""
        return self.block * self.length

    @property
    def age(self) -> float:
        """Steps since the middle of the last snapshot."""
        return self.taken % self.block + (self.block - 1) / 2

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "taken": self.taken, "block": self.block}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows.copy_(state["rows"])
        self.taken, self.block = int(state["taken"]), int(state["block"])


class BlockMeans:
    """Means of consecutive blocks of steps; when `window` of them are held, pairs merge and the block length doubles.

    So between half a window and a window of means covers all steps since the start, however many they are. Of a long
    block only 4 steps, evenly spaced, are added up: successive weights differ little, and each costs a pass.

    Args:
        tensors: what is averaged; their number and shapes do not change.
        window: even, the largest number of means held.
        dtype, device: of the means; sums are kept in float32 at least.

    >>> means = BlockMeans([torch.tensor([1.0])], 4, torch.float32, torch.device("cpu"))
    >>> for value in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
    ...     means.add([torch.tensor([value])])
    >>> means.ordered().flatten(), means.block
    (tensor([1.5000, 3.5000, 5.5000]), 2)
    """

    def __init__(self, tensors: Sequence[Tensor], window: int, dtype: torch.dtype, device: torch.device) -> None:
        size = sum(tensor.numel() for tensor in tensors)
        self.rows = torch.zeros(window, size, dtype=dtype, device=device)
        self.sum = torch.zeros(size, dtype=torch.promote_types(dtype, torch.float32), device=device)
        self._sums = cut(self.sum, tensors)
        self.clear()

    def add(self, tensors: Sequence[Tensor]) -> None:
        """One more step."""
        if self.is_due():
            self.take(tensors)

    def is_due(self) -> bool:
        """One more step; whether it is one of those that are added up: then :meth:`take` has to follow."""
        self.open += 1
        return not self.open % self.stride

    def take(self, tensors: Sequence[Tensor]) -> None:
        record(self._sums, tensors, add=self.open > self.stride)
        if self.open < self.block:
            return
        torch.div(self.sum, self.block // self.stride, out=self.rows[self.held])
        self.held, self.open = self.held + 1, 0
        if self.held == len(self.rows):
            for i in range(self.held // 2):
                self.rows[i] = (self.rows[2 * i].to(self.sum.dtype) + self.rows[2 * i + 1]) / 2
            self._begin(self.held // 2, 2 * self.block, 0)

    def clear(self) -> None:
        self._begin(0, 1, 0)

    def _begin(self, held: int, block: int, opened: int) -> None:
        self.held, self.block, self.open = held, block, opened
        self.stride = max(1, block // SAMPLES)  # steps from one that is added up to the next

    def ordered(self) -> Float[Tensor, "time state"]:
        """The means in order of time, a view."""
        return self.rows[: self.held]

    @torch.no_grad()
    def with_open(self) -> Float[Tensor, "time state"]:
        """The means and, once half of the next block has passed, the mean of what there is of it: a view.

        >>> means = BlockMeans([torch.tensor([1.0])], 4, torch.float32, torch.device("cpu"))
        >>> for value in (1.0, 2.0, 3.0, 4.0, 9.0):
        ...     means.add([torch.tensor([value])])
        >>> means.with_open().flatten()
        tensor([1.5000, 3.5000, 9.0000])
        """
        added = self.open // self.stride
        if not added or 2 * self.open < self.block:
            return self.ordered()
        torch.div(self.sum, added, out=self.rows[self.held])  # the last row is free until this block is full
        return self.rows[: self.held + 1]

    @property
    def age(self) -> float:
        """Steps since the middle of the last mean.

        >>> means = BlockMeans([torch.tensor([1.0])], 4, torch.float32, torch.device("cpu"))
        >>> for value in range(32):
        ...     means.add([torch.tensor([float(value)])])
        >>> means.ordered()[-1].item(), means.age
        (24.0, 7.0)
        """
        merged = self.block > 1 and 2 * self.held == len(self.rows)  # of the blocks before, with their stride
        stride = max(1, self.block // 2 // SAMPLES) if merged else self.stride
        return self.open + (self.block - stride) / 2

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.sum.nbytes

    def state_dict(self) -> dict[str, Any]:
        counts = {"held": self.held, "block": self.block, "open": self.open}
        return {"rows": self.rows, "sum": self.sum, **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows.copy_(state["rows"])
        self.sum.copy_(state["sum"])
        self._begin(*(int(state[name]) for name in ("held", "block", "open")))


def cut(rows: Tensor, tensors: Sequence[Tensor]) -> list[Any]:
    """Views of a row, or of several, in the shapes of the tensors.

    >>> [piece.shape for piece in cut(torch.zeros(3, 5), [torch.zeros(2, 2), torch.zeros(1)])]
    [torch.Size([3, 2, 2]), torch.Size([3, 1])]
    """
    pieces = rows.split([tensor.numel() for tensor in tensors], dim=-1)
    lead = rows.shape[:-1]
    return [piece.view(*lead, *tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def record(targets: Sequence[Tensor], sources: Sequence[Tensor], add: bool = False) -> None:
    """Copy each source into its target, or add it, without a gradient.

    On the CPU one by one, and best from detached tensors, without ``torch.no_grad()``: between two steps of an
    optimizer neither that nor torch's operations on lists are in the processor's caches.

    >>> record([target := torch.ones(2)], [nn.Parameter(torch.ones(2))], add=True)
    >>> target
    tensor([2., 2.])
    """
    if targets[0].is_cpu:
        for target, source in zip(targets, sources, strict=True):
            near = source.detach() if source.requires_grad else source
            if add:
                target.add_(near if near.is_cpu else near.cpu())
            else:
                target.copy_(near)
        return
    in_place = torch._foreach_add_ if add else torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage], as torch.optim
    with torch.no_grad():
        in_place(list(targets), on(targets[0].device, sources))


def flattened(tensors: Sequence[Tensor], like: Tensor) -> Float[Tensor, " state"]:
    """The tensors as one row in the dtype of others, and where they are.

    >>> flattened([torch.ones(1, 2, dtype=torch.float64), torch.zeros(1)], torch.zeros(0))
    tensor([1., 1., 0.])
    """
    row = torch.empty(sum(tensor.numel() for tensor in tensors), dtype=like.dtype, device=like.device)
    record(cut(row, tensors), tensors)
    return row


def on(device: torch.device, tensors: Sequence[Tensor]) -> list[Any]:
    """The tensors there, which is a copy only of those that are elsewhere."""
    return [tensor if tensor.device == device else tensor.to(device) for tensor in tensors]


def nbytes_of(tensors: Sequence[Tensor], snapshots: int, means: int, dtype: torch.dtype) -> int:
    """What so many snapshots and block means of some tensors take, before any of it is taken."""
    sums = torch.promote_types(dtype, torch.float32).itemsize if means else 0
    return sum(tensor.numel() for tensor in tensors) * ((snapshots + means) * dtype.itemsize + sums)
