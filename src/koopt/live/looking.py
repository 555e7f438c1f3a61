"""When it is asked whether gradients are noise, along which move, and how many answers it takes to believe it."""

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
    from koopt.live.jumps import Jump


ALWAYS = 4  # steps along secants that follow one another before each of which it is asked, a power of two
TRUST = 6  # looks that have to find no noise for each that finds some; in a lucky streak as many do
FALLEN = 1e-3  # share of the loss that no luck leads to: what looks like noise there is rounding


def is_doubtful(tries: int) -> bool:
    """Whether it is asked before a step along secants: rarer and rarer, as what is smooth seldom turns noisy.

    >>> [tries for tries in range(40) if is_doubtful(tries)]
    [1, 2, 3, 4, 8, 16, 32]
    """
    return 1 <= tries <= ALWAYS or at_doubling(tries)


def agreed(jump: Jump) -> int:
    """How many looks found no noise, as a record tells; each move is one where they led far down.

    >>> from koopt.live.jumps import Jump
    >>> def streak(moves, after):
    ...     return Jump(20, "secants", 4, None, 1.0, after, moves > 0, "", 9, 0.01, moves)
    >>> [agreed(streak(moves, after=0.5)) for moves in (0, 1, 4, 7, 8, 31, 32)]
    [0, 1, 4, 4, 5, 6, 7]
    >>> agreed(streak(32, after=1e-6))
    32
    """
    if jump.before is not None and jump.after is not None and 0 <= jump.after <= FALLEN * jump.before:
        return jump.moves
    return min(jump.moves, ALWAYS) + max(0, jump.moves.bit_length() - ALWAYS.bit_length())


def is_due(step: int) -> bool:
    """Whether it is asked along the optimizer's own move: as early as along secants, then rarer and rarer.

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
