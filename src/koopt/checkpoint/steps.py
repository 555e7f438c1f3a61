"""When each checkpoint was saved: from its metadata or from its name, and what an even grid of them is."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor

    from koopt.checkpoint.stored import Checkpoint

KEYS = ("step", "global_step", "steps", "iteration")  # in metadata
NAMED = tuple(  # the first that tells checkpoints apart counts: a step says more than an epoch
    re.compile(rf"(?:{word})s?[-_=]?(\d+)", re.IGNORECASE)
    for word in ("step", "iter|iteration", "checkpoint|ckpt", "epoch")
)
DEGREE = 3  # of the polynomial pieces between unevenly spaced checkpoints
WIDEST = 3.0  # gaps wider than so many of the narrowest are not filled in


def steps_of(checkpoints: Sequence[Checkpoint], given: Sequence[float] | None = None) -> list[float]:
    """The optimizer step of each checkpoint, in the order given.

    Args:
        checkpoints: at least one.
        given: what the user says they are; else metadata count, if all have them, then the number after "step",
            "iteration", "checkpoint" or "epoch" in the names, then the only number that differs between them.

    Raises:
        ValueError: if they cannot be told, are not as many as the checkpoints, or two are the same.
    """
    paths = [str(checkpoint.path) for checkpoint in checkpoints]
    from_metadata = None if given is not None else _from_metadata(checkpoints)
    found = list(given) if given is not None else from_metadata or _from_names(paths)
    if found is None:
        nameless = next((path for path in paths if not any(word.search(path) for word in NAMED)), paths[0])
        raise ValueError(
            f"{nameless}: no step in its name or metadata that tells it from the others; give --steps, one a checkpoint"
        )
    if len(found) != len(paths):
        raise ValueError(f"--steps: {len(found)} for {len(paths)} checkpoints, expected one each, in the same order")
    bad = [step for step in found if not math.isfinite(step)]
    if bad:
        raise ValueError(f"--steps: {bad[0]} is not a step; give a number for each checkpoint")
    for i, step in enumerate(found):
        if step in found[:i]:
            kept = from_metadata and checkpoints[i].kind == "pt"
            why = "; a .pt forecast keeps the step of the checkpoint it was made from" if kept else ""
            raise ValueError(
                f"{paths[i]}: step {step:g} is that of {paths[found.index(step)]} too{why}; "
                "leave one out, or give their --steps"
            )
    return [float(step) for step in found]


def _from_metadata(checkpoints: Sequence[Checkpoint]) -> list[float] | None:
    for key in KEYS:
        try:
            found = [float(checkpoint.metadata[key]) for checkpoint in checkpoints]  # type: ignore[arg-type], of None it is a TypeError
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        if len(set(found)) > 1:
            return found
    return None


def _from_names(paths: Sequence[str]) -> list[float] | None:
    """By the words in the checkpoints' own names, else by the only number that differs, else by words on the way."""
    named = _by_words([Path(path).name for path in paths])
    if named:  # where none differs it is the same step of several runs, which steps_of refuses
        return next((column for column in named if len(set(column)) > 1), named[0])
    if len({re.sub(r"\d+", "0", path) for path in paths}) == 1:
        digits = zip(*(re.findall(r"\d+", path) for path in paths), strict=True)
        differing = [column for column in digits if len(set(column)) > 1]
        if len(differing) == 1:
            return [_number(text) for text in differing[0]]
    return next((column for column in _by_words(paths) if len(set(column)) > 1), None)


def _by_words(names: Sequence[str]) -> list[list[float]]:
    """The number after each of the words that all names have."""
    found = [[word.findall(name) for name in names] for word in NAMED]
    return [[_number(numbers[-1]) for numbers in column] for column in found if all(column)]


def _number(digits: str) -> float:
    return float(digits) if len(digits) < 18 else math.nan  # a hash or a date, not a step


def even_grid(times: Float[Tensor, " time"]) -> tuple[Float[Tensor, "even time"], float]:
    """Evenly spaced combinations of snapshots that were taken at uneven times.

    The last snapshot stays the last. Where the times are even, or all but a few at the start are, these snapshots
    themselves; else polynomial pieces of degree 3 through them, at their mean spacing.

    Args:
        times: rising, at least two.

    Returns:
        One row of coefficients over the snapshots for each point of the grid, and the spacing.

    Raises:
        ValueError: if the gaps differ too much to fill in.

    >>> even_grid(torch.tensor([0.0, 10.0, 20.0]))[1]
    10.0
    """
    gaps = times.diff()
    eye = torch.eye(len(times), dtype=torch.float64)
    even = (gaps - gaps[-1]).abs() <= 1e-6 * gaps[-1]
    tail = len(gaps) if bool(even.all()) else int((~even).flip(0).int().argmax())
    if tail + 1 >= max(3, math.ceil(0.75 * len(times))) or tail == len(gaps):
        return eye[-tail - 1 :], gaps[-1].item()
    if gaps.max() > WIDEST * gaps.min() or len(times) < DEGREE + 1:
        raise ValueError(
            f"steps: the gaps between checkpoints run from {gaps.min():g} to {gaps.max():g}, too uneven for an "
            "operator; leave checkpoints out, save at even steps, or take --method line or regression"
        )
    spacing = ((times[-1] - times[0]) / len(gaps)).item()
    grid = times[-1] - spacing * torch.arange(len(gaps), -1, -1, dtype=torch.float64)
    return torch.stack([_interpolation(times, point) for point in grid]), spacing


def _interpolation(times: Tensor, point: Tensor) -> Tensor:
    """Lagrange coefficients at a point, over the snapshots around it."""
    near = (int((times <= point).sum()) - DEGREE // 2 - 1, len(times) - DEGREE - 1)
    first = max(0, min(near))
    chosen = times[first : first + DEGREE + 1]
    ways = (point - chosen) / (chosen.unsqueeze(1) - chosen).fill_diagonal_(1.0)
    row = torch.zeros_like(times)
    row[first : first + DEGREE + 1] = ways.fill_diagonal_(1.0).prod(dim=1)
    return row
