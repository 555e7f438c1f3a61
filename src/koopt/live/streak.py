"""Steps along secants that follow one another: how far they have come, and where they left the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


@dataclass
class Streak:
    """Steps along secants, one after each optimizer step.

    Attributes:
        moves: how many so far; 0: there are none.
        loss: the guard's, after the last.
        expected: the product of the last step and of how the gradient is to change by it; 0: nothing is expected.
        left: the weights as the last left them; none in a resumed run until the next.

    >>> streak = Streak()
    >>> streak.go_on(0.5, [torch.ones(1)])
    >>> streak.moves, streak.left_at([torch.ones(1)]), streak.left_at([torch.zeros(1)])
    (1, True, False)
    """

    moves: int = 0
    loss: float = 0.0
    expected: float = 0.0
    left: list[Tensor] = field(default_factory=list)

    def go_on(self, loss: float, weights: Sequence[Tensor]) -> None:
        """One more was taken, to these weights and their loss."""
        self.moves, self.loss = self.moves + 1, loss
        self.left = [value.clone() for value in weights]

    def left_at(self, weights: Sequence[Tensor]) -> bool:
        """Whether the weights are as the last left them, as far as is known."""
        return not self.left or all(map(torch.equal, weights, self.left))

    def end(self) -> None:
        self.moves, self.expected, self.left = 0, 0.0, []

    def state_dict(self) -> dict[str, Any]:
        """All but the weights, which the model has."""
        return {"moves": self.moves, "last": torch.tensor([self.loss, self.expected], dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.moves, (self.loss, self.expected) = state["moves"], state["last"].tolist()
        self.left = []  # the model may not have taken over its own yet
