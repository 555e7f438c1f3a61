"""What is compared in a benchmark: ways to train, and ways to average weights beside a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from koopt.bench.task import Problem, Task


class Running(Protocol):
    """A training run in progress."""

    @property
    def guarded(self) -> int:
        """Guard evaluations so far, each a third of a step."""
        ...

    def step(self, closure: Callable[[], Tensor]) -> None:
        """One optimizer step and one step of the schedule; `closure` clears gradients, computes the loss and theirs."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """The method's weights for evaluation are in the model within; weights and buffers are back afterwards."""
        ...


@dataclass(frozen=True)
class Trainer:
    """A way to train.

    Attributes:
        name: on the command line and in tables.
        start: begins a run of `steps` optimizer steps with one setting of `grid`.
        grid: for a task, the settings that are searched.
        options: changes of a setting, searched afterwards at the two best settings of the grid.
        guard: whether it needs the guard's split.
        full_batch: None: for all tasks; True or False: only for such tasks.
        without: names of the trainers that it is without koopt, the first that is for a task; none if it is not koopt.
        title: what it is called where people read; its name if empty.
    """

    name: str
    start: Callable[[Problem, Mapping[str, Any], int], Running]
    grid: Callable[[Task], list[dict[str, Any]]]
    options: tuple[Mapping[str, Any], ...] = ()
    guard: bool = False
    full_batch: bool | None = None
    without: tuple[str, ...] = ()
    title: str = ""


class Observing(Protocol):
    """Weights for evaluation that are made beside a run, and do not change it."""

    @property
    def guarded(self) -> int:
        """Guard evaluations so far, each a third of a step."""
        ...

    def record(self) -> None:
        """After each optimizer step."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """By name, for evaluation now."""
        ...


@dataclass(frozen=True)
class Observer:
    """A way to average the weights of a run.

    Attributes:
        name: on the command line and in tables.
        start: begins beside a run of the model.
        grid: the settings that are searched; all of them observe the same runs.
        beside: the trainer whose runs it observes.
        title: what it is called where people read; its name if empty.
    """

    name: str
    start: Callable[[nn.Module, Problem, Mapping[str, Any], int], Observing]
    grid: tuple[Mapping[str, Any], ...] = field(default=({},))
    beside: str = "optimizer"
    title: str = ""
