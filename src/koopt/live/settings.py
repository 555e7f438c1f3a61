"""What a live run was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from koopt.live.candidates import FEWEST

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Settings:
    """What :func:`koopt.attach` was asked for, checked there."""

    mode: str
    window: int
    cycle: int
    tail: int
    momentum: str
    second_moments: str
    max_overhead: float
    dtype: torch.dtype
    device: torch.device
    history: int
    precondition: int
    at_once: bool  # and not only where there is noise

    @property
    def block(self) -> int:
        """The most steps whose mean is a snapshot: two where there are enough, for weights that oscillate."""
        return 2 if self.tail >= 2 * FEWEST else 1

    @property
    def rows(self) -> int:
        """How many snapshots a jump is made from."""
        return self.tail // self.block

    @property
    def snapshots(self) -> int:
        """How many of them are held, those of momentum too."""
        return 0 if self.mode == "forecast" else self.rows * (2 if self.momentum == "combine" else 1)

    @property
    def looks(self) -> bool:
        """Whether noise is looked for though there are no steps along secants, which would find it."""
        return bool(self.precondition) and not self.at_once and not self.history

    @property
    def means(self) -> int:
        return 0 if self.mode == "jump" else self.window
