"""Steps along secants that follow one another: how far they have come, and where they left the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

REPEATED = 0.03  # how far one ratio of slopes may be from the next, if it is a scale
ANOTHER = 3.0  # what is off by less may be another loss, of other examples, and not another scale


@dataclass
class Streak:
    """Steps along secants, one after each optimizer step.

    Attributes:
        moves: how many so far; 0: there are none.
        loss: the guard's, after the last.
        expected: the product of the last step and of how the gradient is to change by it; 0: nothing is expected.
        left: the weights as the last left them; none in a resumed run until the next.
        scale: how many times the guard's slope is that of the gradients: a mean beside a sum, say.
        ratio: how many times it was when last they did not agree.

    >>> streak = Streak()
    >>> streak.go_on(0.5, [torch.ones(1)])
    >>> streak.moves, streak.left_at([torch.ones(1)]), streak.left_at([torch.zeros(1)])
    (1, True, False)
    """

    moves: int = 0
    loss: float = 0.0
    expected: float = 0.0
    left: list[Tensor] = field(default_factory=list)
    scale: float = 1.0
    ratio: float = math.nan

    def go_on(self, loss: float, weights: Sequence[Tensor]) -> None:
        """One more was taken, to these weights and their loss."""
        self.moves, self.loss = self.moves + 1, loss
        self.left = [value.clone() for value in weights]

    def left_at(self, weights: Sequence[Tensor]) -> bool:
        """Whether the weights are as the last left them, as far as is known."""
        return not self.left or all(map(torch.equal, weights, self.left))

    def rescaled(self, ratio: float) -> bool:
        """Whether slopes that do not agree do so at another scale: of noise the ratio does not come twice.

        >>> streak = Streak()
        >>> streak.rescaled(0.01), streak.rescaled(0.0102), streak.scale
        (False, True, 0.0102)
        >>> streak.rescaled(0.013), streak.scale
        (False, 0.0102)
        """
        again = 0 < ratio < math.inf and math.isclose(ratio, self.ratio, rel_tol=REPEATED)
        found, self.ratio = again and not 1 / ANOTHER < ratio < ANOTHER, ratio
        if again:
            self.scale = ratio if found else 1.0
        return found

    def end(self) -> None:
        self.moves, self.expected, self.left = 0, 0.0, []

    def state_dict(self) -> dict[str, Any]:
        """All but the weights, which the model has."""
        last = torch.tensor([self.loss, self.expected, self.scale, self.ratio], dtype=torch.float64)
        return {"moves": self.moves, "last": last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.moves = state["moves"]
        self.loss, self.expected, self.scale, self.ratio = state["last"].tolist()
        self.left = []  # the model may not have taken over its own yet
