"""Drawings of a benchmark: data in, matplotlib Axes out."""

from __future__ import annotations

import textwrap
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

import numpy as np

from koopt.plot import COLORS, INK, quartiles, steps_along

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from matplotlib.axes import Axes

OWN = "koopt"  # drawn thicker
PLAIN = "optimizer"
MAIN = {PLAIN: (INK, "-"), OWN: (COLORS[0], "-")}  # the same in every drawing
LEADING = tuple(zip((*COLORS[1:2], *COLORS[3:]), ("-", "--", "-.", (0, (1, 1.2))), strict=True))
GREY = "#9a9a9a"  # of all others, which a letter on the line tells apart


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
    bands = {method: quartiles(values, axis=0) for method, values in losses.items()}
    least = {method: np.min(middle[np.isfinite(middle)], initial=np.inf) for method, (_, middle, _) in bands.items()}
    looks = styles(losses, sorted(losses, key=least.__getitem__))
    for method, (low, _, high) in bands.items():
        if method in looks:
            alpha = 0.2 if method in MAIN else 0.07
            ax.fill_between(along, low, high, color=looks[method][0], alpha=alpha, lw=0)
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
    _lines(ax, {method: (along, middle) for method, (_, middle, _) in bands.items()}, looks)
    for target in targets:
        ax.axhline(target, color=INK, lw=0.6, ls=(0, (1, 3)), zorder=1)
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
    ax.set_yticks(range(len(shares)), [title_of(method) for method in shares])
    for method, tick in zip(shares, ax.get_yticklabels(), strict=True):
        tick.set_fontweight("bold" if method == OWN else "normal")
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
    gains = {m: np.log(right / row[np.isfinite(row)]).sum() / max(len(row), 1) for m, row in ratios.items()}
    ax.set(xscale="log", xlim=(1, right), ylim=(0, 1.02))
    ticks = [tick for tick in (1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100) if tick <= right]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set(xlabel="cost to a target, as a multiple of the best method's", ylabel="share of targets reached")
    looks = styles(ratios, sorted(ratios, key=gains.__getitem__, reverse=True))
    _lines(ax, {method: _stairs(row, right) for method, row in ratios.items()}, looks)
    return ax


def styles(methods: Iterable[str], ranked: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """Colour and dashes of koopt, of the baseline and of the best of the others; the rest is to be grey.

    Args:
        methods: in the order in which they are named.
        ranked: the same, the best first.
    """
    best = [method for method in ranked if method not in MAIN][: len(LEADING)]
    leading = iter(LEADING)
    return {method: MAIN.get(method) or next(leading) for method in methods if method in MAIN or method in best}


def title_of(method: str) -> str:
    """What the tables call a method, in short lines; its name if they have no title for it."""
    from koopt.bench.methods import METHODS

    title = METHODS[method].title.strip("*") if method in METHODS else ""
    return textwrap.fill(title or method, 28)


def _stairs(ratios: np.ndarray, right: float) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the share solved, from 1 to the right edge."""
    solved = ratios[np.isfinite(ratios)]
    heights = np.arange(len(solved) + 1) / max(len(ratios), 1)
    return np.concatenate([[1.0], np.repeat(solved, 2), [right]]), np.repeat(heights, 2)


def _lines(ax: Axes, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], looks: Mapping[str, tuple[str, Any]]) -> None:
    """Lines in colour on top of grey ones, which a letter on each tells apart, all in the legend."""
    grey = dict(zip([method for method in curves if method not in looks], ascii_uppercase, strict=False))
    for method, (color, dashes) in looks.items():
        width, above = (2.2, 2.4) if method in MAIN else (1.6, 2.3)
        ax.plot(*curves[method], color=color, ls=dashes, lw=width, label=title_of(method), zorder=above)
    for method in grey:
        ax.plot(*curves[method], color=GREY, lw=1, zorder=2.1)
    ax.axis()  # brings limits that follow the lines up to date
    paths = {method: _along(ax, *curve) for method, curve in curves.items()}
    letters: list[np.ndarray] = []
    for method, letter in grey.items():
        sign = rf"$\mathrm{{{letter}}}$"
        ax.plot([], [], color=GREY, lw=1, marker=sign, ms=7, mec=INK, mfc=INK, mew=0.3, label=title_of(method))
        if not len(paths[method]):
            continue
        others = np.concatenate([path for other, path in paths.items() if other != method])
        free = np.minimum(_distance(paths[method], others), 0.05)
        letters.append(paths[method][np.argmax(free + np.minimum(_distance(paths[method], np.array(letters)), 0.1))])
        x, y = letters[-1]
        box = {"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8}
        place = {"ha": "center", "va": "center", "transform": ax.transAxes, "zorder": 2.5, "bbox": box}
        ax.text(x, y, sign, color=INK, fontsize=8, **place)


def _along(ax: Axes, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Places close together on a line, `(places, 2)` in shares of the axes, without those at the edges."""
    corners = (ax.transScale + ax.transLimits).transform(np.stack([x, y], axis=1)[np.isfinite(x) & np.isfinite(y)])
    if len(corners) < 2:
        return np.empty((0, 2))
    lengths = np.concatenate([[0.0], np.hypot(*np.diff(corners, axis=0).T).cumsum()])
    places = np.linspace(0, lengths[-1], 400)
    found = np.stack([np.interp(places, lengths, side) for side in corners.T], axis=1)
    return found[((found > 0.02) & (found < 0.98)).all(axis=1)]


def _distance(places: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of each place to the closest of the others; infinite where there are none."""
    apart = places[:, None] - others.reshape(-1, 2)
    return np.hypot(apart[..., 0], apart[..., 1]).min(axis=1, initial=np.inf)
