"""Optimizers that precondition a step with matrices, whose motion jumps do not help."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from koopt import exchange

if TYPE_CHECKING:
    from koopt.exchange import Ranks


def by_matrices(optimizer: torch.optim.Optimizer, ranks: Ranks | None = None) -> bool:
    """Whether an optimizer holds matrices of its own, as SOAP and Shampoo do, beside what has a parameter's shape.

    Known once it has taken a step. Adafactor's rows and columns are no matrices.

    Args:
        optimizer: any.
        ranks: the processes that train together; what the first has is what counts.

    >>> parameter = torch.ones(2, 3, requires_grad=True)
    >>> optimizer = torch.optim.Adam([parameter])
    >>> parameter.sum().backward(), optimizer.step()
    (None, None)
    >>> by_matrices(optimizer)
    False
    >>> optimizer.state[parameter]["GG"] = [torch.eye(2), torch.eye(3)]
    >>> by_matrices(optimizer)
    True
    """
    held = any(_has_matrix(parameter, state) for parameter, state in optimizer.state.items() if isinstance(state, dict))
    return bool(exchange.first(torch.tensor(float(held), device="cpu"), ranks)) if ranks is not None else held


def _has_matrix(parameter: torch.Tensor, state: dict[str, Any]) -> bool:
    single = [value for value in state.values() if isinstance(value, torch.Tensor) and value.shape != parameter.shape]
    listed = chain.from_iterable(value for value in state.values() if isinstance(value, list | tuple))
    return any(isinstance(v, torch.Tensor) and v.dim() == 2 and 1 < len(v) == v.shape[1] for v in chain(single, listed))
