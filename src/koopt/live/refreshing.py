"""BatchNorm's statistics, and other buffers, at weights that training did not come by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from koopt.live.guard import stored_once, undisturbed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn


def refreshed(refresh: Callable[[], object], model: nn.Module) -> dict[str, Tensor]:
    """The buffers that `refresh` makes at the model's current weights, which stay in the model.

    Gradients, modes and random state are afterwards as they were.

    >>> model = nn.BatchNorm1d(1)
    >>> refreshed(lambda: model(torch.ones(4, 1)), model)["running_mean"]
    tensor([0.1000])
    """
    with undisturbed(model):
        refresh()
    return {name: stored_once(buffer).clone() for name, buffer in model.named_buffers()}


@torch.no_grad()
def write_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        if name in values:
            stored_once(buffer).copy_(values[name])
