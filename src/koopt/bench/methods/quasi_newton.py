"""L-BFGS one iteration a step, for as many closure calls as one long step would make."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from koopt.bench.methods.training import Run, weights_of
from koopt.bench.scaled_lbfgs import ScaledLBFGS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from koopt.bench.task import Problem, Task

TRIES = 25  # closure calls of one line search at most, torch's own default
HISTORIES = (10, 30, 100, 200, 400)


def settings(task: Task) -> list[dict[str, Any]]:
    """There is no rate to search: the line search takes its place."""
    return [{"history": history} for history in HISTORIES]


def start(problem: Problem, setting: Mapping[str, Any], steps: int) -> Run:
    """``torch.optim.LBFGS`` with strong Wolfe line search; it starts anew when a step moves nothing."""
    optimizer = torch.optim.LBFGS(
        problem.model.parameters(),
        max_iter=1,
        max_eval=1 + TRIES,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        history_size=setting["history"],
        line_search_fn="strong_wolfe",
    )
    memory = Memory(weights_of(problem.model))

    def restart_if_stuck() -> None:
        if memory.is_where_step_began():
            optimizer.state.clear()

    return Run(problem.model, optimizer, after=restart_if_stuck, around=memory.around)


def start_scaled(problem: Problem, setting: Mapping[str, Any], steps: int) -> Run:
    """:class:`koopt.bench.scaled_lbfgs.ScaledLBFGS`."""
    return Run(problem.model, ScaledLBFGS(problem.model.parameters(), setting["history"]))


class Memory:
    """Recalls the loss and gradients of the weights a step begins with, which the last line search has computed.

    Args:
        parameters: what is trained.
    """

    def __init__(self, parameters: list[Any]) -> None:
        self._parameters = parameters
        self._seen: deque[tuple[Tensor, Tensor, list[Tensor]]] = deque(maxlen=1 + TRIES)
        self._began: Tensor | None = None

    def around(self, closure: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A closure that calls the given one only where the weights are new, for one step."""
        self._began = None

        def recalled() -> Tensor:
            now = self._flat()
            if self._began is None:
                self._began = now
                for weights, loss, gradients in reversed(self._seen):
                    if torch.equal(weights, now):
                        for parameter, gradient in zip(self._parameters, gradients, strict=True):
                            parameter.grad = gradient.clone()
                        return loss
            loss = closure()
            self._seen.append((now, loss.detach(), [parameter.grad.clone() for parameter in self._parameters]))
            return loss

        return recalled

    def is_where_step_began(self) -> bool:
        return self._began is not None and torch.equal(self._began, self._flat())

    def _flat(self) -> Tensor:
        return torch.cat([parameter.detach().reshape(-1) for parameter in self._parameters])
