"""The user's guard: a loss at the model's current weights, measured without leaving a trace."""

from __future__ import annotations

import contextlib
import random
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn


def measure(guard: Callable[[], object], model: nn.Module) -> float:
    """The guard's loss; buffers, gradients, modes and random state are afterwards as they were.

    Args:
        guard: called without arguments, with gradients enabled as they are now.
        model: the module whose state is kept.

    Returns:
        The loss; NaN and Inf pass.

    Raises:
        TypeError: if it is not a number or a 0-d tensor.

    >>> model = nn.Linear(1, 1)
    >>> measure(lambda: nn.init.ones_(model.weight).sum(), model)
    1.0
    """
    with untouched(model):
        loss = guard()
        if isinstance(loss, torch.Tensor) and loss.dim() == 0 and not loss.is_complex():
            return float(loss.detach())
    if isinstance(loss, Real) and not isinstance(loss, bool):
        return float(loss)
    given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)[:60]
    raise TypeError(f"guard returned {given}, expected the loss as a float or a 0-d tensor; reduce it, as by .mean()")


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Everything but the parameters' values is put back: buffers, ``.grad``, train or eval mode, random state.

    >>> model = nn.BatchNorm1d(1)
    >>> with untouched(model):
    ...     _ = model(torch.ones(4, 1)), model.eval()
    >>> model.running_mean, model.training
    (tensor([0.]), True)
    """
    with buffers_kept(model), undisturbed(model):
        yield


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Like :func:`untouched`, but buffers stay as they were made within."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    enabled = torch.is_grad_enabled()
    with _random_kept():
        try:
            for parameter, gradient in gradients:
                if gradient is not None:
                    parameter.grad = None  # so that backward() makes another one
            yield
        finally:
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


@contextlib.contextmanager
def _random_kept() -> Iterator[None]:
    own, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002, the user's own state
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpys)  # noqa: NPY002
