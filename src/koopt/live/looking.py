"""Whether gradients are noise, asked along the optimizer's own move where there are no steps along secants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from koopt import reductions
from koopt.live.budget import INTERVAL, at_doubling
from koopt.live.secants import Step, gradients
from koopt.live.window import flattened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from koopt.exchange import Ranks


def is_due(step: int) -> bool:
    """Whether it is asked at a step: as early as with steps along secants, then rarer and rarer.

    >>> [step for step in range(200) if is_due(step)]
    [20, 40, 80, 160]
    """
    return step % INTERVAL == 0 and at_doubling(step // INTERVAL)


@torch.no_grad()
def own_move(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Any],
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    factor: float,
    like: Tensor,
    ranks: Ranks | None,
) -> Step:
    """The move that an optimizer has just made, and the slope along it by the gradient that it was made from.

    Args:
        optimizer: of the gradients that are still there.
        parameters: the trained ones.
        before, after: what this process holds of their weights.
        factor: by which gradients had been clipped.
        like: of the dtype and on the device that the step is to have.
        ranks: the processes that hold other columns.

    >>> parameter = nn.Parameter(torch.ones(1))
    >>> parameter.grad = torch.tensor([4.0])
    >>> optimizer = torch.optim.SGD([parameter], lr=0.25)
    >>> own_move(optimizer, [parameter], [torch.ones(1)], [torch.zeros(1)], 1.0, torch.ones(0), None)
    Step(origin=tensor([1.]), direction=tensor([-1.]), pairs=0, slope=-4.0, longest=1.0)
    """
    origin = flattened(before, like)
    direction = flattened(after, like).sub_(origin)
    gradient = flattened(gradients(optimizer, parameters, factor, decayed=False), like)
    return Step(origin, direction, 0, reductions.dot(gradient, direction, ranks))
