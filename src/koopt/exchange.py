"""What the processes that train one model tell each other: k x k matrices and single numbers, never weights.

They go over a gloo group of koopt's own, on the CPU: so they do not mix with the collectives of a guard, and a process
that is gone is an error, not a hanging kernel.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from torch.distributed import ProcessGroup

_counters: list[Traffic] = []


class Ranks(NamedTuple):
    """The processes that train one model together; None in its place: this process alone.

    Attributes:
        group: of koopt's own, for small tensors on the CPU.
        owned: the recorded columns that this process contributes to sums, so that each weight is counted once: all
            columns of a shard, an equal share of what several processes hold.
        total: columns of all processes.
    """

    group: ProcessGroup
    owned: tuple[slice, ...]
    total: int


class Traffic:
    """What was exchanged: calls, and the bytes that went through this process."""

    def __init__(self) -> None:
        self.calls, self.bytes = 0, 0


@contextlib.contextmanager
def counting() -> Iterator[Traffic]:
    """Count all that koopt exchanges within.

    >>> with counting() as traffic:
    ...     first(torch.ones(2), None)
    tensor([1., 1.])
    >>> traffic.bytes
    0
    """
    traffic = Traffic()
    _counters.append(traffic)
    try:
        yield traffic
    finally:
        _counters.remove(traffic)


def all_reduce(tensor: Tensor, ranks: Ranks, operation: str = "SUM") -> Tensor:
    """The sum over all processes, or another of torch's reductions, in place."""
    with answered():
        torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, operation), group=ranks.group)
    return counted(tensor)


def first(tensor: Tensor, ranks: Ranks | None) -> Tensor:
    """A tensor of the first process."""
    if ranks is None:
        return tensor
    tensor = tensor.contiguous()
    with answered():
        torch.distributed.broadcast(tensor, group=ranks.group, group_src=0)
    return counted(tensor)


def counted(tensor: Tensor) -> Tensor:
    """The tensor that was exchanged, noted by all who count."""
    for traffic in _counters:
        traffic.calls, traffic.bytes = traffic.calls + 1, traffic.bytes + tensor.nbytes
    return tensor


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Name the cause where others do not answer."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "another process of this run has ended or did not take part in time: jumps, forecast() and "
            f"load_state_dict() are for all processes at once ({str(error)[:200]})"
        ) from error
