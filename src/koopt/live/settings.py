"""What a live run was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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

    @property
    def snapshots(self) -> int:
        """How many snapshots of single steps are held, those of momentum too."""
        return 0 if self.mode == "forecast" else self.tail * (2 if self.momentum == "combine" else 1)

    @property
    def means(self) -> int:
        return 0 if self.mode == "jump" else self.window
