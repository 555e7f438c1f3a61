"""Figures in the manner of S4 of the paper: the perceptron's error, its weights, and its error against n_1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib.figure
import numpy as np
import torch

from koopt import plot
from koopt.experiments import figure2, online, panels

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor


PARTITIONS = ("weight", "node", "network")  # with one layer, its operator is the network's


@dataclass(frozen=True, eq=False)
class Shown:
    """A batch of simulations to be drawn.

    Attributes:
        run, simulated: the batch.
        mistakes: `(time,)`, smoothed training error; the last is at the end of training.
        paths: partition -> `(horizons, seeds, weights)`, forecasts at :func:`horizons`.
    """

    run: online.Run
    simulated: online.Simulation
    mistakes: Tensor
    paths: dict[str, Tensor]


def horizons(run: online.Run) -> list[int]:
    """Where forecasts are drawn, in strides ahead: close to the window's end more densely."""
    return sorted({max(1, round(run.ahead * share / 20)) for share in (0.05, 0.1, 0.2, 0.4, 0.7, *range(1, 21))})


def draw_errors(shown: Sequence[Shown], folder: Path) -> str:
    """Error against the step, one panel a teacher (Figure S4b); returns the file's name."""
    figure = matplotlib.figure.Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for ax, batch in zip(axes, shown, strict=True):
        run, simulated = batch.run, batch.simulated
        ahead = np.array([0, *horizons(run)])
        trained = np.arange(len(simulated.error)), *_mean_and_error(simulated.error)
        curves = {"training, exact error": trained}
        for by, path in batch.paths.items():
            errors = online.expected_error(path, simulated.teacher)
            curves[f"{by} operator"] = (
                run.window + ahead,
                *_mean_and_error(torch.cat([simulated.error[run.window].unsqueeze(0), errors])),
            )
        average = online.expected_error(simulated.window.mean(dim=0), simulated.teacher).expand(2, -1)
        curves["mean of the window"] = np.array([run.window, run.strides]), *_mean_and_error(average)
        steps = np.arange(run.strides - len(batch.mistakes) + 1, run.strides + 1)
        panels.error_curves(ax, steps, batch.mistakes.numpy(), run.window, curves)
        ax.set_title(f"{run.teacher} teacher", loc="left")
        ax.label_outer()
    _legend_below(figure, axes[0], axes)
    run = shown[0].run
    figure.suptitle(f"Perceptron, $n_1$ = {run.n_1}, {run.seeds:,} simulations, mean and standard error")
    return figure2.save(figure, folder, "figure-s4b.png")


def draw_weights(shown: Shown, folder: Path) -> str:
    """Weights of one unit of the first simulation, one panel an operator (Figure S4d); returns the file's name."""
    figure = matplotlib.figure.Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, len(shown.paths), sharey=True)
    run, trail = shown.run, shown.simulated.trail.numpy()
    few = np.abs(shown.simulated.teacher[0, 0].numpy()).argsort()[::-1][:3]
    now = trail[run.window, few]
    ahead = run.window + np.array(horizons(run))
    for ax, (by, path) in zip(axes, shown.paths.items(), strict=True):
        forecasts = path[:, 0].numpy()[:, few]
        plot.weight_paths(ax, np.arange(len(trail)), trail[:, few] - now, run.window, ahead, forecasts - now)
        ax.set_title(f"{by} operator", loc="left")
        ax.label_outer()
    figure.suptitle(f"The three largest weights of a unit, {run.teacher} teacher, first simulation")
    return figure2.save(figure, folder, "figure-s4d.png")


def draw_sizes(rows: Sequence[dict[str, Any]], folder: Path) -> str:
    """Error at the end against n_1, a row of panels a teacher, a column a kind of window; returns the file's name."""
    figure = matplotlib.figure.Figure(figsize=(13, 8), layout="constrained")
    first = min(rows, key=lambda row: (row["n_1"], row["window"]))
    kinds = {
        "window fixed": lambda row: row["window"] == first["window"],
        "scaled": lambda row: row["stride"] == 1 and row["window"] * first["n_1"] == first["window"] * row["n_1"],
        f"scaled, {first['window'] + 1} snapshots": lambda row: row["stride"] * first["n_1"] == row["n_1"],
    }
    axes = figure.subplots(len(online.TEACHERS), len(kinds), sharex=True, sharey=True, squeeze=False)
    for line, teacher in zip(axes, online.TEACHERS, strict=True):
        for ax, (kind, belongs) in zip(line, kinds.items(), strict=True):
            chosen = [row for row in rows if row["teacher"] == teacher and belongs(row)]
            sizes = sorted({row["n_1"] for row in chosen})

            def curve(key: str = "error", chosen: list[dict[str, Any]] = chosen, **wanted: Any) -> np.ndarray:
                found = [row for row in chosen if all(row[name] == value for name, value in wanted.items())]
                return np.array([(row[key], row[f"{key}_se"]) for row in sorted(found, key=lambda row: row["n_1"])]).T

            operators = {f"{by} operator": curve(by=by, setting="paper") for by in PARTITIONS}
            careful = {f"{by} operator": curve(by=by, setting="careful") for by in PARTITIONS}
            baselines = {
                "training": curve("error_trained", method="last"),
                "mean of the window": curve(method="mean"),
            }
            panels.error_against_size(ax, sizes, operators, careful, baselines)
            ax.set_title(f"{teacher} teacher, {kind}", loc="left")
            ax.label_outer()
    _legend_below(figure, axes[0, 0], axes.flat)
    return figure2.save(figure, folder, "perceptron-size.png")


def _mean_and_error(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Over the last axis, the simulations."""
    return values.mean(dim=-1).numpy(), (values.std(dim=-1) / values.shape[-1] ** 0.5).numpy()


def _legend_below(figure: Any, named: Any, axes: Any) -> None:
    handles, labels = named.get_legend_handles_labels()
    for ax in axes:
        ax.get_legend().remove()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=10, frameon=False)
