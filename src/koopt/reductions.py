"""Sums over the recorded columns of all processes, each of which holds some."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from koopt import linalg
from koopt.exchange import all_reduce, answered, counted, first

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor

    from koopt.exchange import Ranks


def gram(
    rows: Float[Tensor, "time state"], ranks: Ranks | None, prepare: Callable[[Tensor], Tensor] | None = None
) -> Float[Tensor, "prepared prepared"]:
    """:func:`linalg.gram` over the columns of all processes, on the CPU.

    >>> gram(torch.tensor([[3.0, 4.0]]), None)
    tensor([[25.]], dtype=torch.float64)
    """
    if ranks is None:
        return linalg.gram(rows, prepare).cpu()
    own = torch.stack([linalg.gram(rows[:, part], prepare) for part in ranks.owned]).sum(dim=0)
    return all_reduce(own.cpu(), ranks)


def norm(vector: Float[Tensor, " state"], ranks: Ranks | None) -> float:
    """The norm in float64, over all processes.

    >>> norm(torch.tensor([3.0, 4.0]), None)
    5.0
    """
    return gram(vector[None], ranks).sqrt().item()


def norms(rows: Float[Tensor, "time state"], ranks: Ranks | None) -> Float[Tensor, " time"]:
    """The norm of each row, over all processes, in the precision of the rows.

    >>> norms(torch.tensor([[3.0, 4.0]]), None)
    tensor([5.], dtype=torch.float64)
    """
    if ranks is None:
        return torch.linalg.vector_norm(rows, dim=1).cpu().to(torch.float64)
    own = [torch.linalg.vector_norm(rows[:, part], dim=1).to(torch.float64).square() for part in ranks.owned]
    return all_reduce(torch.stack(own).sum(dim=0).cpu(), ranks).sqrt()


def products(
    left: Float[Tensor, "m state"], right: Float[Tensor, "k state"], ranks: Ranks | None
) -> Float[Tensor, "m k"]:
    """:func:`linalg.products` over the columns of all processes, on the CPU.

    >>> products(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 1.0]]), None)
    tensor([[7.]], dtype=torch.float64)
    """
    if ranks is None:
        return linalg.products(left, right).cpu()
    own = [linalg.products(left[:, part], right[:, part]) for part in ranks.owned]
    return all_reduce(torch.stack(own).sum(dim=0).cpu(), ranks)


def dot(left: Float[Tensor, " state"], right: Float[Tensor, " state"], ranks: Ranks | None) -> float:
    """The inner product of two vectors, over all processes, in float64.

    >>> dot(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 1.0]), None)
    7.0
    """
    return products(left[None], right[None], ranks).item()


def triangular_factor(rows: Float[Tensor, "time state"], ranks: Ranks | None) -> Float[Tensor, "time rank"]:
    """:func:`linalg.triangular_factor` over the columns of all processes, on the CPU.

    Source: Demmel, Grigori, Hoemmen & Langou (2012), parallel TSQR: factors merge in pairs, up a tree.

    >>> triangular_factor(torch.tensor([[3.0, 4.0]]), None).abs()
    tensor([[5.]], dtype=torch.float64)
    """
    if ranks is None:
        return linalg.triangular_factor(rows).cpu()
    own = torch.cat([rows[:, part] for part in ranks.owned], dim=1)
    return _merged(linalg.triangular_factor(own).cpu(), ranks)


def _merged(factor: Tensor, ranks: Ranks) -> Tensor:
    time = len(factor)
    factor = torch.nn.functional.pad(factor, (0, time - factor.shape[1])).contiguous()
    dist, rank, size, span = torch.distributed, ranks.group.rank(), ranks.group.size(), 1
    while span < size:
        if rank % (2 * span):
            with answered():
                dist.send(factor, group=ranks.group, group_dst=rank - span)
            counted(factor)
            break
        if rank + span < size:
            other = torch.empty_like(factor)
            with answered():
                dist.recv(other, group=ranks.group, group_src=rank + span)
            factor = linalg.triangular_factor(torch.cat([factor, counted(other)], dim=1)).contiguous()
        span *= 2
    return first(factor, ranks)


def sample(snapshots: Float[Tensor, "time state"], size: int, ranks: Ranks | None) -> Float[Tensor, "time sample"]:
    """Some columns, evenly spaced, in float64 on the CPU; of several processes in an orthonormal basis of their own.

    >>> sample(torch.arange(4.0)[None], 2, None)
    tensor([[0., 2.]], dtype=torch.float64)
    """
    every = -(-(snapshots.shape[1] if ranks is None else ranks.total) // size)
    if ranks is None:
        return snapshots[:, ::every].cpu().to(torch.float64)
    own = torch.cat([snapshots[:, part][:, ::every] for part in ranks.owned], dim=1)
    return _merged(linalg.triangular_factor(own).cpu(), ranks)
