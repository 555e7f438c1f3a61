"""Drawings that only one experiment needs: data in, matplotlib Axes out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from koopt.plot import COLORS, INK, quartiles

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes


def epoch_curves(
    ax: Axes,
    epochs: np.ndarray,
    values: np.ndarray,
    window: tuple[float, float],
    forecasts: Mapping[str, tuple[float, np.ndarray]],
) -> Axes:
    """Loss or accuracy of many seeds at the end of each epoch, and that of each forecast where it aims (Figure 3b).

    Args:
        ax: where to draw.
        epochs: `(time,)` epochs done.
        values: `(time, seeds)`.
        window: epochs at t1 and t2.
        forecasts: label -> (the epoch it aims at, `(seeds,)` values at the forecast weights).
    """
    low, middle, high = quartiles(values, axis=1)
    ax.axvspan(*window, color="#f1ead8", label="recorded window", lw=0)
    ax.fill_between(epochs, low, high, color=INK, alpha=0.15, lw=0)
    ax.plot(epochs, middle, "o-", ms=3, color=INK, lw=1.5, label="training")
    for (label, (epoch, found)), color in zip(forecasts.items(), COLORS, strict=False):
        below, value, above = quartiles(found, axis=0)
        ax.errorbar(
            epoch, value, [[value - below], [above - value]], fmt="o", ms=6, capsize=3, color=color, label=label
        )
        ax.axhline(value, color=color, lw=0.8, ls=":")
    shown = np.concatenate([middle[epochs >= window[0]], *(quartiles(f, axis=0) for _, f in forecasts.values())])
    shown = shown[np.isfinite(shown)]
    if len(shown):
        room = 0.12 * (shown.max() - shown.min()) or 1.0
        ax.set_ylim(shown.min() - room, shown.max() + room)
    ax.set(xlabel="epochs", ylabel="median, quartiles")
    ax.legend(fontsize=9, frameon=False)
    return ax


def paired_changes(ax: Axes, changes: Mapping[str, np.ndarray], bold: str) -> Axes:
    """Relative change of each seed's loss by each way to forecast, best mean on top, with the mean as a bar.

    Args:
        ax: where to draw.
        changes: label -> `(seeds,)`, below 0 where the forecast is better.
        bold: the label that is set off.
    """
    order = sorted(changes, key=lambda label: -float(np.mean(changes[label])))
    for i, label in enumerate(order):
        values = 100 * changes[label]
        spread = 0.22 * np.sin(2.4 * np.arange(len(values)))  # fixed jitter, so that the figure is reproducible
        color = COLORS[1] if label == bold else COLORS[0]
        ax.scatter(values, i + spread, s=12, color=color, alpha=0.5, lw=0)
        ax.vlines(np.mean(values), i - 0.35, i + 0.35, color=INK, lw=2)
    ax.axvline(0, color=INK, lw=0.8, ls=":")
    ax.set_yticks(range(len(order)), order, fontsize=9)
    for tick in ax.get_yticklabels():
        tick.set_fontweight("bold" if tick.get_text() == bold else "normal")
    ax.set(xlabel="change of the loss in % (bar: mean)")
    return ax


def horizon_sweep(ax: Axes, ahead: np.ndarray, changes: Mapping[str, np.ndarray], mark: float) -> Axes:
    """Relative change of the mean loss against how far ahead a forecast aims.

    Args:
        ax: where to draw.
        ahead: `(horizons,)` epochs.
        changes: label -> `(horizons,)`.
        mark: the horizon that was chosen.
    """
    for (label, values), color in zip(changes.items(), COLORS, strict=False):
        ax.plot(ahead, 100 * values, "o-", ms=4, lw=1.5, color=color, label=label)
    ax.axhline(0, color=INK, lw=0.8, ls=":")
    ax.axvline(mark, color=INK, lw=0.8, label="chosen")
    low = 100 * min((float(values.min()) for values in changes.values()), default=0.0)
    ax.set(
        xlabel="epochs ahead",
        ylabel="change of the mean loss in %",
        ylim=(1.15 * min(low, -0.1), -0.6 * min(low, -0.1)),
    )
    ax.legend(fontsize=9, frameon=False)
    return ax
