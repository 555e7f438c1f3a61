"""What is trained in a benchmark: a task makes one problem a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

BETA2 = 0.999  # torch's


@dataclass(frozen=True)
class Problem:
    """One network with its data; all randomness comes from the seed it was made with.

    Attributes:
        model: what is trained.
        batch: the next training batch; of a full-batch task always the same.
        loss: of a batch at the model's current weights, differentiable.
        guard: the loss on the guard's split, or the training loss of a full-batch task.
        validate: the loss that targets are read from, at the model's current weights, with no trace left; the training
            loss of a full-batch task.
        test: the same on the test split, to be read once.
        refresh: renews BatchNorm's statistics at the model's current weights; does nothing where there are none.
    """

    model: nn.Module
    batch: Callable[[], Any]
    loss: Callable[[Any], Tensor]
    guard: Callable[[], Tensor]
    validate: Callable[[], float]
    test: Callable[[], float]
    refresh: Callable[[], None]


@dataclass(frozen=True)
class Task:
    """A benchmark task.

    Attributes:
        name: on the command line.
        about: one line for tables.
        steps: the baseline's budget, in optimizer steps.
        looks: how often the validation loss is looked at, evenly spaced; full-batch losses are known at each step.
        full_batch: whether each step sees all data.
        optimizers: the candidates for the baseline.
        rates: learning rates that are searched for them.
        schedules: "cosine", "constant", ...; searched too.
        problem: makes a problem of a seed; with True the guard's split is left out of the training data, with False it
            is trained on.
        decays: of Adam's average of squared gradients (beta2); searched too, and for all methods on Adam.
    """

    name: str
    about: str
    steps: int
    looks: int
    full_batch: bool
    optimizers: tuple[str, ...]
    rates: tuple[float, ...]
    schedules: tuple[str, ...]
    problem: Callable[[int, bool], Problem]
    decays: tuple[float, ...] = (BETA2,)
