"""Training runs: optimizers of torch and of others, their schedules, and which weights of theirs are evaluated."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from koopt.bench.task import BETA2
from koopt.live.guard import buffers_kept
from koopt.partitions import trainable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from koopt.bench.task import Problem, Task

OPTIMIZERS = {  # with torch's defaults, and the usual momentum of SGD
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
}
BETA1 = 0.9  # torch's
SCHEDULES = {  # the rate's factor at a share of the run
    "constant": lambda share: 1.0,
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
}
WARMUPS = (0.0, 0.05)  # shares of the run
MOMENTA = ({"beta": 0.95}, {"beta": 0.98})  # of Schedule-Free
LOOKAHEADS = ({"k": 10}, {"alpha": 0.8}, {"k": 10, "alpha": 0.8})
SOAPS = ({"beta": 0.99}, {"frequency": 2}, {"beta": 0.99, "frequency": 2})


class Counted:
    """A guard that counts how often it is called.

    >>> guard = Counted(lambda: 1.0)
    >>> guard(), guard.calls
    (1.0, 1)
    """

    def __init__(self, guard: Callable[[], object]) -> None:
        self.guard, self.calls = guard, 0

    def __call__(self) -> object:
        self.calls += 1
        return self.guard()


@dataclass
class Run:
    """A training run in progress.

    Attributes:
        model: what is trained.
        optimizer: by which.
        scheduler: of its rate; None: the rate is constant.
        guard: counts its evaluations; None where there is no guard.
        after: called after each step.
        swapped: the weights for evaluation are in the model within; those of training are put back by the run.
        around: makes of each step's closure the one that the optimizer calls.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    guard: Counted | None = None
    after: Callable[[], object] | None = None
    swapped: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    around: Callable[[Callable[[], Tensor]], Callable[[], Tensor]] | None = None

    @property
    def guarded(self) -> int:
        return 0 if self.guard is None else self.guard.calls

    def step(self, closure: Callable[[], Tensor]) -> None:
        called: Any = closure if self.around is None else self.around(closure)  # torch asks for a float
        self.optimizer.step(called)
        if self.scheduler is not None:
            self.scheduler.step()
        if self.after is not None:
            self.after()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        with buffers_kept(self.model), weights_kept(self.model), self.swapped():
            yield


def weights_of(model: nn.Module) -> list[Any]:
    """What is trained, in order."""
    return list(trainable(model).values())


@torch.no_grad()
def write(parameters: list[Any], values: list[Tensor]) -> None:
    torch._foreach_copy_(parameters, values)  # pyright: ignore[reportPrivateImportUsage], as torch.optim takes it


@contextlib.contextmanager
def weights_kept(model: nn.Module) -> Iterator[list[Tensor]]:
    """Weights are afterwards bitwise as they were."""
    parameters = weights_of(model)
    saved = [parameter.detach().clone() for parameter in parameters]
    try:
        yield saved
    finally:
        write(parameters, saved)


def searched(task: Task) -> list[dict[str, Any]]:
    """What the baseline is tuned over, and so every method that trains by it."""
    found = product(task.optimizers, task.rates, task.schedules, task.decays)
    return [
        {"optimizer": optimizer, "rate": rate, "schedule": schedule} | _decay(decay)
        for optimizer, rate, schedule, decay in found
    ]


def start_plain(problem: Problem, setting: Mapping[str, Any], steps: int) -> Run:
    """The optimizer alone."""
    name = setting["optimizer"]
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer is {name!r}, expected one of {', '.join(OPTIMIZERS)}")
    options = {"betas": (BETA1, setting["beta2"])} if "beta2" in setting else {}
    optimizer = OPTIMIZERS[name](problem.model.parameters(), lr=setting["rate"], **options)
    return Run(problem.model, optimizer, scheduler(optimizer, setting["schedule"], steps))


def _decay(decay: float) -> dict[str, float]:
    """In a setting, where it is not torch's own."""
    return {} if decay == BETA2 else {"beta2": decay}


def scheduler(
    optimizer: torch.optim.Optimizer, schedule: str, steps: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """Of one of SCHEDULES, over a run of so many steps."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}, expected one of {', '.join(SCHEDULES)}")
    factor = SCHEDULES[schedule]
    if schedule == "constant":
        return None
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(min(step / steps, 1.0)))


def start_lookahead(problem: Problem, setting: Mapping[str, Any], steps: int) -> Run:
    """Lookahead around the optimizer; its slow weights are evaluated (Zhang et al., 2019)."""
    from pytorch_optimizer import Lookahead

    plain = start_plain(problem, setting, steps)
    optimizer = Lookahead(plain.optimizer, k=setting.get("k", 5), alpha=setting.get("alpha", 0.5))
    parameters = weights_of(problem.model)

    def slow() -> AbstractContextManager[None]:
        write(parameters, [optimizer.state[parameter]["slow_params"] for parameter in parameters])
        return contextlib.nullcontext()

    return Run(problem.model, optimizer, plain.scheduler, swapped=slow)


def schedule_free_settings(task: Task) -> list[dict[str, Any]]:
    """Rates, warm-ups and beta2, with the weight decay of the task's own optimizer."""
    decay = 0.01 if "adamw" in task.optimizers else 0.0
    found = product(task.rates, WARMUPS, task.decays)
    return [{"rate": rate, "warmup": warmup, "decay": decay} | _decay(squares) for rate, warmup, squares in found]


def start_schedule_free(problem: Problem, setting: Mapping[str, Any], steps: int) -> Run:
    """Schedule-Free AdamW; its averaged weights are evaluated (Defazio et al., 2024)."""
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(
        problem.model.parameters(),
        lr=setting["rate"],
        betas=(setting.get("beta", BETA1), setting.get("beta2", BETA2)),
        weight_decay=setting["decay"],
        warmup_steps=round(setting["warmup"] * steps),
    )
    optimizer.train()

    @contextlib.contextmanager
    def averaged() -> Iterator[None]:
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()

    return Run(problem.model, optimizer, swapped=averaged)


def soap_settings(task: Task) -> list[dict[str, Any]]:
    return [{"rate": rate, "schedule": schedule} for rate, schedule in product(task.rates, task.schedules)]


def start_soap(problem: Problem, setting: Mapping[str, Any], steps: int) -> Run:
    """Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., 2024)."""
    from pytorch_optimizer import SOAP

    optimizer = SOAP(
        problem.model.parameters(),
        lr=setting["rate"],
        betas=(setting.get("beta", 0.95), setting.get("beta", 0.95)),
        weight_decay=0.0,
        precondition_frequency=setting.get("frequency", 10),
    )
    return Run(problem.model, optimizer, scheduler(optimizer, setting["schedule"], steps))
