"""What becomes of an optimizer's momentum when the weights are moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from koopt.live.candidates import displaced, moved
from koopt.sharding import local

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor

    from koopt.exchange import Ranks

POLICIES = ("keep", "reset", "scale", "combine")
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")  # as torch.optim names them


def first_moments(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The momentum of each parameter; None where there is none.

    >>> model = nn.Linear(1, 1)
    >>> first_moments(torch.optim.SGD(model.parameters(), lr=0.1), list(model.parameters()))
    [None, None]
    """
    found: list[Tensor | None] = []
    for parameter in parameters:
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        moments = (state.get(name) for name in FIRST_MOMENTS)
        found.append(next((local(moment) for moment in moments if isinstance(moment, torch.Tensor)), None))
    return found


@torch.no_grad()
def scale(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], factor: float) -> None:
    """Multiply all momentum by a factor, 0 to start anew."""
    for moment in first_moments(optimizer, parameters):
        if moment is not None:
            moment.zero_() if factor == 0 else moment.mul_(factor)


def restart_curvature(optimizer: torch.optim.Optimizer) -> None:
    """L-BFGS compares gradients of successive points, and across a jump that means nothing: it starts anew."""
    for state in optimizer.state.values():
        if isinstance(state, dict) and "prev_flat_grad" in state:
            state["n_iter"] = 0


@torch.no_grad()
def combine(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    snapshots: Float[Tensor, "time state"],
    coefficients: Float[Tensor, " time"],
    ranks: Ranks | None = None,
) -> None:
    """Give momentum the coefficients of the weights.

    Args:
        optimizer: whose momentum is changed.
        parameters: in the order of the columns.
        snapshots: `(time, state)`, the recorded momentum, the last of which is now; zero where none is; overwritten.
        coefficients: `(time,)`, those of the jump.
        ranks: the processes that hold the other columns.
    """
    values = moved(recorded(optimizer, parameters), displaced(snapshots), coefficients, ranks)
    if values is None:
        return
    for moment, value in zip(first_moments(optimizer, parameters), values, strict=True):
        if moment is not None:
            moment.copy_(value)


def recorded(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The momentum of each parameter, zeros where there is none."""
    found = first_moments(optimizer, parameters)
    return [
        torch.zeros_like(local(p)) if moment is None else moment for moment, p in zip(found, parameters, strict=True)
    ]
