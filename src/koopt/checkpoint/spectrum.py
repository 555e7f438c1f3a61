"""The eigenvalues of the operators of saved checkpoints, with residual and half-life."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from koopt import linalg
from koopt.checkpoint import factors_of, plan_of, rules
from koopt.checkpoint.steps import even_grid

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from koopt.checkpoint import Plan

LIVE = 1e-6  # eigenvalues of smaller modulus are gone within one checkpoint


def spectrum_of(
    paths: Sequence[str | os.PathLike[str]],
    by: str = "layer",
    steps: Sequence[float] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> tuple[Plan, list[dict[str, Any]]]:
    """One row for each eigenvalue of each group's operator, read in one pass.

    Args:
        paths, steps, include, exclude, progress: as in :func:`koopt.forecast_checkpoints`.
        by: "layer" or "network".
        options: of :func:`koopt.fit`.

    Returns:
        What was read, and rows with `group`, `weights`, `rank`, `residual` (one step, relative), `real`, `imaginary`,
        `modulus`, `tolerance` (a modulus this close to 1 is not told from it), `half_life` (optimizer steps in which
        the mode halves; None if it does not) and `seen` (whether each step stands out of the rounding of the stored
        numbers). A group that does not move has none.

    Raises:
        TypeError, ValueError, OSError: as :func:`koopt.forecast_checkpoints`.
    """
    if by not in ("layer", "network"):
        raise ValueError(f"by is {by!r}, expected layer or network")
    rules.check(rules.Rule("koopman", 0, options), len(paths))
    plan = plan_of(paths, by, steps, include, exclude)
    times = torch.tensor(plan.times, dtype=torch.float64)
    rules.check(rules.Rule("koopman", 0, options), len(even_grid(times)[0]))
    rows = []
    for slab, factor in factors_of(plan, options.get("rtol"), progress):
        step, _, moves = rules.resolution(factor)
        if not bool(moves.all()):
            continue
        op, spacing = rules.operator(factor, times, options)
        tolerance = max(linalg.ON_CIRCLE, 1 / step[0].item())  # a rounding in each step moves an eigenvalue so far
        shared = {
            "group": slab.group.label,
            "weights": factor.state,
            "rank": int(op.rank[0]),
            "residual": op.residual[0].item(),
            "seen": bool(step[0] >= rules.SEEN),
            "tolerance": tolerance,
        }
        values = [value for value in op.eigenvalues[0].tolist() if abs(value) > LIVE]
        if options.get("center") and values:  # the constant's own
            values.remove(min(values, key=lambda value: abs(value - 1)))
        rows += [
            shared
            | {
                "real": value.real,
                "imaginary": value.imag,
                "modulus": abs(value),
                "half_life": half_life(abs(value), spacing, tolerance),
            }
            for value in values
        ]
    if not rows:
        raise ValueError(f"{plan.checkpoints[-1].path}: no tensor differs from those of the other checkpoints")
    return plan, rows


def half_life(modulus: float, spacing: float, tolerance: float) -> float | None:
    """Optimizer steps in which a mode halves; None for one that does not decay, to this tolerance of its modulus.

    >>> half_life(0.5, 100.0, 1e-8), half_life(0.999, 100.0, 0.01)
    (100.0, None)
    """
    if modulus >= 1 - tolerance:
        return None
    return spacing * math.log(2) / -math.log(modulus) if modulus > 0 else 0.0


def by_group(rows: Sequence[dict[str, Any]], shown: int = 3) -> list[dict[str, Any]]:
    """One line a group for the terminal: its first eigenvalues and the longest half-life.

    >>> row = {"group": "a", "real": 0.5, "imaginary": 0.1, "modulus": 0.51, "half_life": 1.0, "tolerance": 0}
    >>> by_group([row, row | {"imaginary": -0.1}])[0]["eigenvalues"]
    '0.5 ± 0.1i'
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    lines = []
    for members in groups.values():
        words = [_word(row) for row in members if row["imaginary"] >= 0]
        lives = [row["half_life"] for row in members if row["half_life"] is not None]
        lines.append(
            members[0]
            | {
                "eigenvalues": ", ".join(words[:shown]) + (", ..." if len(words) > shown else ""),
                "half_life": max(lives, default=None),
                "growing": sum(row["modulus"] > 1 + row["tolerance"] for row in members),
            }
        )
    return lines


def _word(row: dict[str, Any]) -> str:
    return f"{row['real']:.5g}" + (f" ± {row['imaginary']:.3g}i" if row["imaginary"] else "")
