"""What an optimizer does to each parameter, and where it moves nothing: skipped steps, parameters that stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Float
    from torch import Tensor


def flag(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """By which GradScaler tells a fused optimizer to skip its step, while that is called.

    >>> flag(torch.optim.SGD([torch.zeros(1)], lr=0.1)) is None
    True
    """
    found = getattr(optimizer, "found_inf", None)
    return found if isinstance(found, torch.Tensor) else None


def skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step that was just called moved nothing by design.

    Under GradScaler a fused optimizer skips inside, by a flag. On an accelerator reading it would stop the queue of
    kernels at each step, so there such a step is recorded, and left out by :func:`moving`.

    >>> skipped(torch.optim.SGD([torch.zeros(1)], lr=0.0))
    True
    """
    found = flag(optimizer)
    if found is not None and found.device.type == "cpu" and bool(found):
        return True
    # torch.distributed.checkpoint takes one step at rate 0 to create the optimizer's state
    for group in optimizer.param_groups:
        rate = group.get("lr")
        if (isinstance(rate, torch.Tensor) and rate.device.type != "cpu") or rate != 0:
            return False
    return True


def moving(optimizer: torch.optim.Optimizer, snapshots: Float[Tensor, "time state"]) -> list[int]:
    """Which snapshots are of steps that moved something; called within a step, while the flag is there."""
    found = flag(optimizer)
    if found is None or found.device.type == "cpu":
        return list(range(len(snapshots)))
    return [i for i in range(len(snapshots)) if i == 0 or not torch.equal(snapshots[i], snapshots[i - 1])]


def frozen(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> list[bool]:
    """Which parameters it does not move now: frozen, at rate 0, or in none of its groups.

    >>> parameter = torch.ones(1, requires_grad=True)
    >>> optimizer = torch.optim.SGD([parameter], lr=0.1)
    >>> frozen(optimizer, [parameter]), frozen(optimizer, [parameter.requires_grad_(False)])
    ([False], [True])
    """
    own = isinstance(optimizer, torch.optim.Rprop)  # its steps have sizes of their own after the first
    groups = [group for group in optimizer.param_groups if own or bool(group.get("lr", 1.0) != 0)]
    trained = {parameter for group in groups for parameter in group["params"] if parameter.requires_grad}
    return [parameter not in trained for parameter in parameters]


def groups_of(optimizer: torch.optim.Optimizer) -> dict[Any, dict[str, Any]]:
    """The settings of each parameter.

    >>> parameter = nn.Parameter(torch.ones(1))
    >>> groups_of(torch.optim.SGD([parameter], lr=0.1))[parameter]["lr"]
    0.1
    """
    return {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
