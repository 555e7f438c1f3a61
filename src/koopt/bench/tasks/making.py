"""What the tasks make their problems of."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.func import functional_call

from koopt.bench.task import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jaxtyping import Float, Int
    from torch import Tensor

Network = TypeVar("Network", bound=nn.Module)


def initialized(make: Callable[[], Network], seed: int) -> Network:
    """The network that `make` gives under `seed`; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode within; each module's own mode is back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, before in modes:
            module.training = before


def full_batch(model: nn.Module, data: Any, loss: Callable[[Any], Tensor], test: Callable[[], float]) -> Problem:
    """A problem whose every step sees all `data`: guard and validation loss are the training loss.

    Args:
        model: what is trained.
        data: the one batch.
        loss: of a batch; needs no graph for its own derivatives, so that guard and validation run without gradients.
        test: as in :class:`koopt.bench.task.Problem`.
    """

    @torch.no_grad()
    def guard() -> Tensor:
        return loss(data)

    return Problem(
        model=model,
        batch=lambda: data,
        loss=loss,
        guard=guard,
        validate=lambda: guard().item(),
        test=test,
        refresh=lambda: None,
    )


def shuffled(count: int, size: int, seed: int) -> Iterator[Int[Tensor, " size"]]:
    """Batches of indices below `count` in an order that `seed` draws anew each epoch, without an incomplete one."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator)[: count - count % size].split(size)


def cross_entropy(logits: Float[Tensor, "*batch classes"], targets: Int[Tensor, "*batch"]) -> Float[Tensor, ""]:
    """The mean over all targets."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def mean_loss(model: nn.Module, inputs: Tensor, targets: Tensor, chunk: int = 250) -> float:
    """Mean cross-entropy in eval mode, with no trace left; small chunks stay in the processor's cache."""
    with mode(model, training=False), torch.no_grad():
        pairs = zip(inputs.split(chunk), targets.split(chunk), strict=True)
        total = sum(cross_entropy(model(some), wanted).item() * len(wanted) for some, wanted in pairs)
    return total / len(targets)


def batch_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in train mode, with BatchNorm's statistics of this batch; the running ones stay as they are."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with mode(model, training=True), torch.no_grad():
        return cross_entropy(functional_call(model, buffers, (inputs,)), targets)
