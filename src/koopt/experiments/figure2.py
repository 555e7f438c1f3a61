"""Figures 2, S5 and S6 of the paper, and how the error grows with the horizon."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib.figure
import numpy as np
import torch

from koopt import metrics, plot
from koopt.experiments import recording
from koopt.experiments.methods import drawn, errors_ahead, label_of, loss_of, path, weights_at

if TYPE_CHECKING:
    from pathlib import Path

    from koopt.experiments.methods import Forecast, Method, Settings


def draw(settings: Settings, recorded: recording.Recording, found: dict[Method, Forecast], folder: Path) -> str:
    """Figure 2 (S5, S6) for one optimizer; returns the file's name."""
    figure = matplotlib.figure.Figure(figsize=(12, 8.4), layout="constrained")
    axes = figure.subplots(2, 3)
    shown = drawn(found)
    horizon, last = settings.horizons[0], settings.steps - settings.t2
    t2, every = settings.t2, recording.TRAIL
    after = torch.from_numpy(np.array(recorded.loss[t2:]))

    begin = max(0, settings.t1 - (t2 - settings.t1) // 2)
    steps = np.arange(begin, min(t2 + 3 * horizon, settings.steps) + 1, every // 4)
    points = {
        label_of(m): (t2 + horizon, loss_of(found[m].weights[horizon]).numpy() / recorded.loss[t2]) for m in shown
    }
    plot.loss_curves(axes[0, 0], steps, recorded.loss[steps] / recorded.loss[t2], (settings.t1, t2), points)
    axes[0, 0].set_ylabel("loss / loss at $t_2$ (median, quartiles)")
    axes[0, 0].set_title(f"a  Loss, jump of T = {horizon:,}", loc="left", fontsize=11)

    shares = {}
    for t in settings.horizons[:2]:  # more have no place
        for m in shown:
            equivalent, censored = metrics.equivalent_steps(loss_of(found[m].weights[t]), after)
            name = {"baseline": "line", "paper": "node", "recommended": "recom-\nmended"}[m.setting]
            shares[f"T={t / 1000:g}k\n{name}"] = equivalent.numpy() / t, censored.numpy()
    plot.equivalent_steps(axes[0, 1], shares, colors=plot.COLORS[: len(shown)])
    axes[0, 1].set_title("b  Equivalent steps, one mark a seed", loc="left", fontsize=11)

    best = next(m for m in shown if m.setting == "recommended")
    ahead = sorted(found[best].weights)
    trail = np.arange(settings.t1, settings.steps + 1, every)
    kept = recorded.trail[settings.t1 // every :, 0] - recorded.trail[t2 // every, 0]
    order = np.abs(kept[-1]).argsort()
    few = order[[-1, -4, len(order) // 2, -12, len(order) // 4, -24]]
    jumps = np.stack([found[best].weights[a][0].numpy() for a in ahead]) - recorded.trail[t2 // every, 0]
    plot.weight_paths(axes[0, 2], trail, kept[:, few], t2, t2 + np.array(ahead), jumps[:, few])
    axes[0, 2].set_title("c  Six weights of one seed, recommended", loc="left", fontsize=11)

    start, truth = weights_at(recorded, t2), weights_at(recorded, t2 + horizon)
    moved = (truth - start).abs().flatten().numpy()
    errors = {label_of(m): (moved, (found[m].weights[horizon] - truth).abs().flatten().numpy()) for m in shown}
    plot.error_against_motion(axes[1, 0], errors)
    axes[1, 0].set_title(f"d  All weights of all seeds, T = {horizon:,}", loc="left", fontsize=11)

    plot.error_growth(axes[1, 1], path(settings), errors_ahead(settings, recorded, found))
    axes[1, 1].set_title(f"e  Error up to {last:,} steps ahead", loc="left", fontsize=11)

    spectra = {label_of(m): values.numpy() for m in shown if (values := found[m].eigenvalues) is not None}
    plot.eigenvalues(axes[1, 2], spectra, zoom=_surroundings_of_one(spectra))
    axes[1, 2].set_xlabel(r"Re $\lambda$ (of one snapshot step)")
    axes[1, 2].set_title("f  Eigenvalues, all seeds", loc="left", fontsize=11)
    one_legend(figure, [axes[0, 0], axes[1, 0], axes[1, 1], axes[1, 2]])
    figure.suptitle(
        f"After Figure 2 of the paper: DE solver, {recorded.run.optimizer.capitalize()}, {settings.seeds} seeds, "
        f"$t_1$ = {settings.t1:,}, $t_2$ = {t2:,}"
    )
    return save(figure, folder, f"figure2-{recorded.run.optimizer}.png")


def _surroundings_of_one(spectra: dict[str, np.ndarray]) -> float | None:
    """Half the width around 1 that holds nearly all of the spectrum that is closest to it; None where that is wide."""
    widths = [1.2 * np.quantile(np.abs(values[values != 0] - 1), 0.98) for values in spectra.values() if values.any()]
    width = float(min(widths, default=0.0))
    return width if 0 < width < 0.3 else None


def one_legend(figure: Any, axes: list[Any]) -> None:
    """One legend below the panels instead of one in each, where it would cover data."""
    entries: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True)) | entries
        axis.get_legend().remove()
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=-(-len(entries) // -(-len(entries) // 5)),  # rows of about the same length
        fontsize=10,
        frameon=False,
    )


def draw_growth(settings: Settings, growth: dict[str, dict[str, list[float]]], folder: Path) -> str:
    """Error over motion against the horizon, one panel an optimizer; returns the file's name."""
    figure = matplotlib.figure.Figure(figsize=(max(7, 4 * len(growth)), 3.6), layout="constrained")
    axes = figure.subplots(1, len(growth), squeeze=False, sharey=True)[0]
    for axis, (optimizer, errors) in zip(axes, growth.items(), strict=True):
        plot.error_growth(axis, path(settings), errors)
        axis.set_title(optimizer.capitalize(), loc="left")
        axis.label_outer()
    one_legend(figure, list(axes))
    return save(figure, folder, "error-ahead.png")


def save(figure: Any, folder: Path, name: str) -> str:
    """Write a figure through a temporary file; returns its name."""
    plot.save(figure, folder / name)
    return name
