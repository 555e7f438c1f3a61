"""Tables and figures of choosing.py."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import matplotlib.figure

from koopt import report
from koopt.plot import COLORS, INK

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from rich.console import Console

    Row = dict[str, Any]

COLUMNS = {
    "label": "",
    "success": "success",
    "teq_over_T": "T_eq/T",
    "censored": "censored",
    "error_over_motion": "error",
    "error_float32": "float32",
    "error_1e-9": "noise 1e-9",
    "error_1e-6": "noise 1e-6",
    "modulus": "|lambda|",
    "ms": "ms",
}
NOISY = ("MNIST", "regression, batches of 16")  # there errors are those of single noisy weights, and say little
MARKERS = ("o", "s", "D")


def show(console: Console, rows: Sequence[Row]) -> None:
    """Every table of every task in the terminal."""
    for task in _different(rows, "task"):
        for part in _different(rows, "part"):
            shown = selected(rows, task, part)
            if shown:
                report.print_table(console, f"{task}, T = {shown[0]['T']:,}: {part}", COLUMNS, shown)


def markdown(rows: Sequence[Row]) -> str:
    """Tables as in docs/choosing.md, one a part for smooth training, one for mini-batches; (success) where not 1."""
    pieces = []
    for noisy in (False, True):
        tasks = [task for task in _different(rows, "task") if (task in NOISY) == noisy]
        for part in _different(rows, "part"):
            columns = {task: selected(rows, task, part) for task in tasks}
            columns = {task: found for task, found in columns.items() if found}
            if columns:
                pieces.append(_markdown_table(f"{part}, {'mini-batches' if noisy else 'smooth'}", columns, noisy))
    return "\n".join(pieces)


def _markdown_table(title: str, columns: dict[str, list[Row]], noisy: bool) -> str:
    """A line a label: T_eq/T (without noise also the error) in each task, then stability and time in the first."""
    head = [f"{task}: {'T_eq/T' if noisy else 'T_eq/T, error'}" for task in columns]
    more = ["ms"] if noisy else ["error, float32", "error, noise 1e-6", "ms"]
    lines = [f"### {title}", "", "| | " + " | ".join(head + more) + " |", "|---" * (1 + len(head) + len(more)) + "|"]
    first = next(iter(columns.values()))
    for label in dict.fromkeys(row["label"] for found in columns.values() for row in found):
        cells = []
        for found in columns.values():
            row = next((row for row in found if row["label"] == label), None)
            cells.append("" if row is None else _cell(row, noisy))
        row = next((row for row in first if row["label"] == label), None)
        if row is None:
            cells += [""] * len(more)
        else:
            cells += [] if noisy else [_short(row["error_float32"]), _short(row["error_1e-6"])]
            cells.append("-" if row["ms"] is None else f"{row['ms']:.2g}" if row["ms"] < 10 else f"{row['ms']:.0f}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _cell(row: Row, noisy: bool) -> str:
    censored = "≥ " if row["censored"] > 0.5 else ""
    found = f"{censored}{row['teq_over_T']:.2f}" + ("" if noisy else f", {_short(row['error_over_motion'])}")
    return found if row["success"] == 1 else f"{found} ({row['success']:.1f})"


def _short(value: float | None) -> str:
    if value is None or value == float("inf"):
        return "none"
    if value and (value < 1e-3 or value >= 100):
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.2g}"


def draw(rows: Sequence[Row], folder: Path) -> list[str]:
    """The figures for which there are rows; returns their names."""
    smooth = [task for task in _different(rows, "task") if task not in NOISY]
    if not smooth:
        return []
    figure = matplotlib.figure.Figure(figsize=(10, 4.4), layout="constrained")
    axes = figure.subplots(1, len(smooth), sharey=True, squeeze=False)[0]
    for ax, task in zip(axes, smooth, strict=True):
        partitions(ax, rows, task)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=11)
    names = [_save(figure, folder, "choosing-partition.png")]

    figure = matplotlib.figure.Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    ranks(left, rows, smooth)
    cuts(right, rows, smooth[0])
    names.append(_save(figure, folder, "choosing-rank.png"))
    return names


def partitions(ax: Axes, rows: Sequence[Row], task: str) -> None:
    """Error of every partition, as recommended and in the paper's setting; hollow marks: float32 snapshots."""
    for (part, name), color, marker in zip(
        (("partition, paper", "whole window, every step"), ("partition, recommended", "11 snapshots, increments")),
        (COLORS[1], COLORS[0]),
        MARKERS,
        strict=False,
    ):
        found = selected(rows, task, part)
        labels = [row["label"] for row in found]
        for key, about, fill in (("error_over_motion", "float64", color), ("error_float32", "float32", "none")):
            errors = [row[key] for row in found]
            label = f"{name}, {about}"
            ax.plot(errors, range(len(errors)), marker, ms=6, color=color, mfc=fill, label=label)
        ax.set_yticks(range(len(labels)), labels, fontsize=11)
    ax.invert_yaxis() if not ax.yaxis_inverted() else None
    ax.axvline(1, color=INK, lw=0.8, ls=":")
    ax.set(xscale="log", xlabel="median |error| / |motion|")
    ax.set_title(f"{task}, T = {selected(rows, task, 'peers')[0]['T']:,}", fontsize=10)
    ax.grid(axis="y", alpha=0.25, lw=0.6)


def ranks(ax: Axes, rows: Sequence[Row], tasks: Sequence[str]) -> None:
    """Error against rank; dashed: float32 snapshots."""
    for task, color in zip(tasks, COLORS, strict=False):
        found = [row for row in selected(rows, task, "rank") if isinstance(row["rank"], int)]
        at = [row["rank"] for row in found]
        ax.plot(at, [row["error_over_motion"] for row in found], "o-", ms=4, color=color, label=task)
        ax.plot(at, [row["error_float32"] for row in found], "o--", ms=4, mfc="none", color=color)
    ax.plot([], [], "o--", ms=4, mfc="none", color=INK, label="float32 snapshots")
    ax.set(yscale="log", xlabel="rank (network, 11 snapshots, increments)", ylabel="median |error| / |motion|")
    ax.legend(fontsize=9, frameon=False)


def cuts(ax: Axes, rows: Sequence[Row], task: str) -> None:
    """Error against the cut of singular values, in the paper's setting, from snapshots of either dtype."""
    found = selected(rows, task, "cut, paper")
    at = [row["rtol"] for row in found if row["rtol"] is not None]
    default = next(row for row in found if row["rtol"] is None)
    for key, about, color in (("error_over_motion", "float64", COLORS[0]), ("error_float32", "float32", COLORS[1])):
        errors = [row[key] for row in found if row["rtol"] is not None]
        ax.plot(at, errors, "o-", ms=4, color=color, label=f"{about} snapshots")
        ax.axhline(default[key], color=color, lw=1, ls=":")
        ax.annotate(f"default cut, {about}", (at[-1], default[key]), (0, 4), textcoords="offset points", color=color)
    ax.set(xscale="log", yscale="log", xlabel="rtol (node, every step)", ylabel="median |error| / |motion|")
    ax.set_title(task, fontsize=11)
    ax.legend(fontsize=9, frameon=False, loc="center left")


def selected(rows: Iterable[Row], task: str, part: str) -> list[Row]:
    return [row for row in rows if row["task"] == task and row["part"] == part]


def _different(rows: Iterable[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _save(figure: matplotlib.figure.Figure, folder: Path, name: str) -> str:
    temporary = folder / f"{name}.tmp"
    figure.savefig(temporary, dpi=160, format="png")
    os.replace(temporary, folder / name)
    return name
