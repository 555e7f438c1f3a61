"""What a checkpoint is here: named tensors, each at a place in a file; ordered and compared, not yet read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SMALL = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # what can be forecast


class Entry(NamedTuple):
    """Where one tensor lies.

    Attributes:
        file: that holds it.
        offset: of its first byte in the file.
        dtype, shape: as stored.
        order: its axes from the outermost in memory to the innermost.
    """

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def place(self) -> tuple[Path, int, int]:
        """Which bytes it is; tied tensors share theirs."""
        return self.file, self.offset, self.nbytes


@dataclass(frozen=True)
class Checkpoint:
    """One saved state: a file or a folder.

    Attributes:
        path: as given.
        kind: "safetensors", "folder" or "pt".
        entries: its tensors by name, in the order of the files.
        metadata: of the safetensors file or index, or the numbers beside a `.pt` state dict.
        files: that hold tensors.
    """

    path: Path
    kind: str
    entries: dict[str, Entry]
    metadata: dict[str, object] = field(default_factory=dict)
    files: tuple[Path, ...] = ()


def require_alike(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> None:
    """Refuse checkpoints whose tensors of these names differ in shape or dtype from those of the last."""
    last = checkpoints[-1]
    for other in checkpoints[:-1]:
        for name in names:
            if name not in other.entries:
                raise ValueError(
                    f"{other.path}: tensor {name!r} of {last.path} is missing; give checkpoints of one model, "
                    "or leave it out with --exclude"
                )
            found, expected = other.entries[name], last.entries[name]
            for what in ("shape", "dtype", "order"):
                if getattr(found, what) != getattr(expected, what):
                    raise ValueError(
                        f"{other.path}: tensor {name!r} has {_WORDS[what]} {_plain(getattr(found, what))}, in "
                        f"{last.path} {_plain(getattr(expected, what))}; give checkpoints of one model, "
                        "or leave it out with --exclude"
                    )


def require_same_names(checkpoints: Sequence[Checkpoint], chosen: Sequence[Sequence[str]]) -> None:
    """Refuse a checkpoint with chosen tensors that the last one lacks, or has tied to others."""
    last, known = checkpoints[-1], set(chosen[-1])
    owners = {last.entries[name].place: name for name in chosen[-1]}
    for checkpoint, names in zip(checkpoints[:-1], chosen[:-1], strict=True):
        extra = [name for name in names if name not in known]
        tied = [name for name in extra if name in last.entries and last.entries[name].place in owners]
        if tied:
            raise ValueError(
                f"{checkpoint.path}: tensor {tied[0]!r} is one of its own, in {last.path} it is tied to "
                f"{owners[last.entries[tied[0]].place]!r}; give checkpoints that tie the same, or leave both out"
            )
        if extra:
            raise ValueError(
                f"{checkpoint.path}: tensor {extra[0]!r} is not in {last.path}; "
                "give checkpoints of one model, or leave it out with --exclude"
            )


_WORDS = {"shape": "shape", "dtype": "dtype", "order": "its axes stored in the order"}


def _plain(value: object) -> str:
    return str(value).removeprefix("torch.")
