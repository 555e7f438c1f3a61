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
    from collections.abc import Callable, Iterable, Iterator

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


class Buffer(NamedTuple):
    """A buffer of a module, and the values that it had."""

    buffers: dict[str, Tensor | None]
    name: str
    buffer: Tensor
    values: Tensor


class Surroundings(NamedTuple):
    """What a guard may change beside the parameters' values, as it is now: to be put back after each call of it.

    >>> model = nn.BatchNorm1d(1)
    >>> now = Surroundings.of(model)
    >>> _ = model(torch.ones(4, 1)), model.eval()
    >>> now.restore()
    >>> model.running_mean, model.training
    (tensor([0.]), True)
    """

    modes: list[tuple[nn.Module, bool]]
    gradients: list[tuple[nn.Parameter, Tensor | None]]
    buffers: list[Buffer]
    grad_enabled: bool
    random: RandomState

    @classmethod
    def of(cls, model: nn.Module, buffers: bool = True) -> Surroundings:
        """Those of a model; without `buffers` these stay as they are made."""
        return cls(
            [(module, module.training) for module in model.modules()],
            [(parameter, parameter.grad) for parameter in model.parameters()],
            buffers_of(model) if buffers else [],
            torch.is_grad_enabled(),
            RandomState.now(),
        )

    def clear_gradients(self) -> None:
        """So that backward() makes others."""
        for parameter, gradient in self.gradients:
            if gradient is not None:
                parameter.grad = None

    def restore(self) -> None:
        self.random.restore()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        for module, training in self.modes:
            if module.training != training:
                module.training = training
        if self.buffers:
            put_back(self.buffers)
        torch.set_grad_enabled(self.grad_enabled)


def measure(guard: Callable[[], object], model: nn.Module, surroundings: Surroundings | None = None) -> float:
    """The guard's loss; buffers, gradients, modes and random state are afterwards as they were.

    Args:
        guard: called without arguments, with gradients enabled as they are now.
        model: the module whose state is kept.
        surroundings: as they are now, where that is known: for several calls in a row they are looked at once.

    Returns:
        The loss; NaN and Inf pass.

    Raises:
        TypeError: if it is not a number or a 0-d tensor.

    >>> model = nn.Linear(1, 1)
    >>> measure(lambda: nn.init.ones_(model.weight).sum(), model)
    1.0
    """
    with untouched(model, surroundings):
        loss = guard()
        if isinstance(loss, torch.Tensor) and loss.dim() == 0 and not loss.is_complex():
            return float(loss.detach())
    if isinstance(loss, Real) and not isinstance(loss, bool):
        return float(loss)
    given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)[:60]
    raise TypeError(f"guard returned {given}, expected the loss as a float or a 0-d tensor; reduce it, as by .mean()")


@contextlib.contextmanager
def untouched(model: nn.Module, surroundings: Surroundings | None = None) -> Iterator[None]:
    """Everything but the parameters' values is put back: buffers, ``.grad``, train or eval mode, random state.

    >>> model = nn.BatchNorm1d(1)
    >>> with untouched(model):
    ...     _ = model(torch.ones(4, 1)), model.eval()
    >>> model.running_mean, model.training
    (tensor([0.]), True)
    """
    kept = surroundings or Surroundings.of(model)
    kept.clear_gradients()
    try:
        yield
    finally:
        kept.restore()


def undisturbed(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Like :func:`untouched`, but buffers stay as they were made within."""
    return untouched(model, Surroundings.of(model, buffers=False))


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers are afterwards the same tensors with the same values."""
    kept = buffers_of(model)
    try:
        yield
    finally:
        put_back(kept)


def buffers_of(model: nn.Module) -> list[Buffer]:
    """Where each buffer is, and its values."""
    return [
        Buffer(module._buffers, name, buffer, stored_once(buffer).clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


@torch.no_grad()
def put_back(kept: Iterable[Buffer]) -> None:
    """Buffers become the same tensors with the same values."""
    for buffers, name, buffer, values in kept:
        buffers[name] = buffer
        stored_once(buffer.data).copy_(values)  # no new version: a graph that waits for its backward may hold it


def stored_once(buffer: Tensor) -> Tensor:
    """Each number once, where it is repeated as by ``expand``, and cannot be written to."""
    if buffer.layout is torch.strided:
        for dim, stride in enumerate(buffer.stride()):
            if stride == 0 and buffer.shape[dim] > 1:
                buffer = buffer.narrow(dim, 0, 1)
    return buffer
