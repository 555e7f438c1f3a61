"""Drawings of a benchmark: data in, matplotlib Axes out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from koopt.plot import COLORS, INK, quartiles, steps_along

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

DASHES = ("-", "--", ":", "-.")
OWN = "koopt"  # drawn thicker
PLAIN = "optimizer"


def loss_curves(
    ax: Axes, along: np.ndarray, losses: Mapping[str, np.ndarray], targets: Sequence[float], unit: str
) -> Axes:
    """Loss against what was spent: median, quartiles of the baseline and of koopt, and the targets.

    Args:
        ax: where to draw.
        along: `(time,)` steps or cost.
        losses: method -> `(seeds, time)`; inf where there is none.
        targets: losses.
        unit: of `along`.
    """
    for i, (method, values) in enumerate(losses.items()):
        low, middle, high = quartiles(values, axis=0)
        color, dash = style(method, i)
        main = method in (OWN, PLAIN)
        ax.plot(along, middle, color=color, ls=dash, lw=2.2 if main else 1.2, label=method, zorder=3 if main else 2)
        ax.fill_between(along, low, high, color=color, alpha=0.2 if main else 0.07, lw=0)
    for target in targets:
        ax.axhline(target, color=INK, lw=0.6, ls=(0, (1, 3)), zorder=1)
    every = np.concatenate([values[np.isfinite(values) & (values > 0)] for values in losses.values()])
    if len(every):
        ax.set_yscale("log")
    if len(every) and min(targets, default=0) > 0:  # the first fall is as steep for all
        top = min(max(targets) * max(1.1, max(targets) / min(targets)) ** 3, every.max())
        low = every.min() * (every.min() / top) ** 0.04
        ax.set_ylim(low, top)
        if top < 10 * low:
            ax.yaxis.set_major_formatter("{x:.3g}")
            ax.yaxis.set_minor_formatter("{x:.3g}")
    steps_along(ax)
    ax.set(xlabel=unit, ylabel="loss (median, quartiles)", xlim=(0, along[-1]))
    return ax


def target_shares(
    ax: Axes, shares: Mapping[str, Sequence[tuple[float, float, float]]], names: Sequence[str], unit: str
) -> Axes:
    """Share of the baseline's budget to each target, with 95 % intervals, one line a method.

    Args:
        ax: where to draw.
        shares: method -> for each target median, lower and upper end; not finite where it is not reached.
        names: of the targets.
        unit: what the shares are of.
    """
    finite = [end for rows in shares.values() for row in rows for end in row if np.isfinite(end)]
    edge = 1.08 * max([1.0, *finite])
    for j, name in enumerate(names):
        found = np.array([rows[j] for rows in shares.values()], float).reshape(-1, 3)
        places = np.arange(len(found)) + 0.22 * (j - (len(names) - 1) / 2)
        middle, low, high = found.T
        known = np.isfinite(middle)
        ends = np.minimum(np.where(np.isfinite(high), high, edge), edge)
        color = COLORS[j % len(COLORS)]
        ax.hlines(places[known], low[known], ends[known], color=color, lw=1.5)
        ax.plot(middle[known], places[known], "o", ms=5, color=color, label=name)
        ax.plot(np.full((~known).sum(), edge), places[~known], ">", ms=5, mfc="none", color=color)
    ax.axvline(1, color=INK, lw=0.8, ls=":")
    ax.set_yticks(range(len(shares)), list(shares))
    ax.invert_yaxis()
    ax.set(xlim=(0, 1.03 * edge), xlabel=rf"{unit} ($\triangleright$: half of the seeds or fewer get there)")
    return ax


def performance_profile(ax: Axes, ratios: Mapping[str, np.ndarray]) -> Axes:
    """The share of problems that each method solves within a factor of the best method's cost.

    Args:
        ax: where to draw.
        ratios: method -> `(problems,)` ascending, inf where it does not solve one; see ``statistics.profile``.
    """
    finite = [ratio for row in ratios.values() for ratio in row if np.isfinite(ratio)]
    right = 1.1 * max([1.5, *finite])
    for i, (method, row) in enumerate(ratios.items()):
        color, dash = style(method, i)
        solved = row[np.isfinite(row)]
        heights = np.arange(1, len(solved) + 1) / max(len(row), 1)
        along = np.concatenate([[1.0], solved, [right]])
        up = np.concatenate([[0.0], heights, heights[-1:] if len(heights) else [0.0]])
        ax.step(along, up, where="post", color=color, ls=dash, lw=2.2 if method in (OWN, PLAIN) else 1.2, label=method)
    ax.set(xscale="log", xlim=(1, right), ylim=(0, 1.02))
    ticks = [tick for tick in (1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100) if tick <= right]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set(xlabel="cost to a target, as a multiple of the best method's", ylabel="share of targets reached")
    return ax


def style(method: str, place: int) -> tuple[str, str]:
    """Colour and dashes: koopt and the baseline always the same."""
    if method == OWN:
        return COLORS[0], "-"
    if method == PLAIN:
        return INK, "-"
    return COLORS[1:][place % (len(COLORS) - 1)], DASHES[(place // (len(COLORS) - 1)) % len(DASHES)]
