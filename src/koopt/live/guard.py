"""The user's guard: a loss at the model's current weights, measured without leaving a trace."""

from __future__ import annotations

import contextlib
import random
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn


class RandomState(NamedTuple):
    """The state of all global random numbers: Python's, NumPy's, and torch's on the CPU and on CUDA.

    >>> state = RandomState.now()
    >>> first = torch.rand(1)
    >>> state.restore()
    >>> torch.equal(torch.rand(1), first)
    True
    """

    own: Any
    numpys: Any
    cpu: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> RandomState:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)  # noqa: NPY002, the user's own

    def restore(self) -> None:
        random.setstate(self.own)
        np.random.set_state(self.numpys)  # noqa: NPY002, the user's own
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


def measure(guard: Callable[[], object], model: nn.Module, random_state: RandomState | None = None) -> float:
    """The guard's loss; buffers, gradients, modes and random state are afterwards as they were.

    Args:
        guard: called without arguments, with gradients enabled as they are now.
        model: the module whose state is kept.
        random_state: as it is now, where that is known: for several calls in a row it is read once.

    Returns:
        The loss; NaN and Inf pass.

    Raises:
        TypeError: if it is not a number or a 0-d tensor.

    >>> model = nn.Linear(1, 1)
    >>> measure(lambda: nn.init.ones_(model.weight).sum(), model)
    1.0
    """
    with untouched(model, random_state):
        loss = guard()
        if isinstance(loss, torch.Tensor) and loss.dim() == 0 and not loss.is_complex():
            return float(loss.detach())
    if isinstance(loss, Real) and not isinstance(loss, bool):
        return float(loss)
    given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)[:60]
    raise TypeError(f"guard returned {given}, expected the loss as a float or a 0-d tensor; reduce it, as by .mean()")


@contextlib.contextmanager
def untouched(model: nn.Module, random_state: RandomState | None = None) -> Iterator[None]:
    """Everything but the parameters' values is put back: buffers, ``.grad``, train or eval mode, random state.

    >>> model = nn.BatchNorm1d(1)
    >>> with untouched(model):
    ...     _ = model(torch.ones(4, 1)), model.eval()
    >>> model.running_mean, model.training
    (tensor([0.]), True)
    """
    with buffers_kept(model), undisturbed(model, random_state):
        yield


@contextlib.contextmanager
def undisturbed(model: nn.Module, random_state: RandomState | None = None) -> Iterator[None]:
    """Like :func:`untouched`, but buffers stay as they were made within."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    enabled = torch.is_grad_enabled()
    kept = random_state or RandomState.now()
    try:
        for parameter, gradient in gradients:
            if gradient is not None:
                parameter.grad = None  # so that backward() makes another one
        yield
    finally:
        kept.restore()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
        torch.set_grad_enabled(enabled)


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers are afterwards the same tensors with the same values."""
    kept = [
        (module._buffers, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffers, name, buffer, values in kept:
                buffers[name] = buffer
                buffer.copy_(values)
