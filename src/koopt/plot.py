"""One function a figure: data in, matplotlib Axes out."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from koopt.names import shortened

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from koopt.live.jumps import Jump

COLORS = ("#0b5fa5", "#d1495b", "#7a7a7a", "#2e8b57", "#b07d2b", "#6a4c93")
INK = "#222222"


def loss_curves(
    ax: Axes,
    steps: np.ndarray,
    loss: np.ndarray,
    window: tuple[int, int],
    forecasts: Mapping[str, tuple[int, np.ndarray]],
) -> Axes:
    """Training loss of many seeds around the window, and the loss of each forecast at the step it aims at (Figure 2b).

    Args:
        ax: where to draw.
        steps: `(time,)` optimizer steps.
        loss: `(time, seeds)` training losses at these steps.
        window: t1 and t2.
        forecasts: label -> (step, `(seeds,)` losses of the forecast weights).
    """
    low, middle, high = quartiles(loss, axis=1)
    ax.axvspan(*window, color="#f1ead8", label="recorded window", lw=0)
    ax.fill_between(steps, low, high, color=INK, alpha=0.15, lw=0)
    ax.plot(steps, middle, color=INK, lw=1.5, label="training")
    width = float(steps[-1] - steps[0])
    for i, step in enumerate(dict.fromkeys(step for step, _ in forecasts.values())):
        ax.axvline(step, color=INK, lw=0.8, ls=":", label=None if i else "step aimed at, marks side by side")
    for i, ((label, (step, losses)), color) in enumerate(zip(forecasts.items(), COLORS, strict=False)):
        below, value, above = quartiles(losses, axis=0)
        place = step + (i - (len(forecasts) - 1) / 2) * 0.02 * width  # on one place they would hide each other
        ax.errorbar(
            place, value, [[value - below], [above - value]], fmt="o", ms=5, capsize=3, color=color, label=label
        )
    seen = middle[middle > 0]
    if len(seen) and seen.max() > 10 * seen.min():
        ax.set_yscale("log")
    else:
        ax.ticklabel_format(axis="y", useOffset=False)
    steps_along(ax)
    ax.set(xlabel="optimizer step", ylabel="loss (median, quartiles)")
    ax.legend(fontsize=9, frameon=False)
    return ax


def equivalent_steps(
    ax: Axes,
    shares: Mapping[str, tuple[np.ndarray, np.ndarray]],
    top: float = 1.5,
    colors: Sequence[str] = COLORS,
) -> Axes:
    """The distribution of T_eq/T over seeds, one mark a seed, the median as a bar (Figure 2c).

    Args:
        ax: where to draw.
        shares: label -> (`(seeds,)` T_eq/T, `(seeds,)` whether it is censored); labels may have several lines.
        top: shares beyond it are drawn at it, marked like the censored ones: the true value is larger.
        colors: taken in turn.
    """
    for i, (values, censored) in enumerate(shares.values()):
        spread = 0.28 * np.sin(2.4 * np.arange(len(values)))  # fixed jitter, so that the figure is reproducible
        larger = censored | (values > top)
        for marks, marker in ((~larger, "o"), (larger, "^")):
            ax.scatter(
                (i + spread)[marks],
                np.minimum(values[marks], top),
                s=18,
                marker=marker,
                color=colors[i % len(colors)],
                alpha=0.6,
                lw=0,
                zorder=3,
            )
        if len(values):
            ax.hlines(min(np.median(values), top), i - 0.36, i + 0.36, color=INK, lw=2)
    ax.axhline(1, color=INK, lw=0.8, ls=":")
    ax.set_xticks(range(len(shares)), list(shares), fontsize=9)
    ax.set(ylabel="$T_{eq}/T$ (bar: median)", xlabel=r"$\blacktriangle$ at least so much: the data end there")
    ax.set(xlim=(-0.6, len(shares) - 0.4), ylim=(-0.08, top + 0.08))
    return ax


def weight_paths(
    ax: Axes, steps: np.ndarray, weights: np.ndarray, t2: int, ahead: np.ndarray, forecast: np.ndarray
) -> Axes:
    """Weights over time, as trained and as forecast, each from its value at t2 (Figure 2d).

    Args:
        ax: where to draw.
        steps: `(time,)` optimizer steps.
        weights: `(time, few)` weights at these steps, relative to t2.
        t2: last step of the window.
        ahead: `(horizons,)` optimizer steps that the forecasts aim at.
        forecast: `(horizons, few)` forecast weights, relative to t2.
    """
    for i in range(weights.shape[1]):
        color = COLORS[i % len(COLORS)]
        ax.plot(steps, weights[:, i], color=color, lw=1.5, alpha=0.55, label="trained" if i == 0 else None)
        ax.plot(ahead, forecast[:, i], "o", ms=4, mfc="none", color=color, label="forecast" if i == 0 else None)
    ax.axvline(t2, color=INK, lw=0.8, ls=":", label="$t_2$")
    limit = 1.4 * np.abs(weights[np.isfinite(weights)]).max(initial=0.0)
    if limit > 0:  # a forecast that runs away must not flatten the rest
        ax.set_ylim(-limit, limit)
    steps_along(ax)
    ax.set(xlabel="optimizer step", ylabel="weight $-$ weight at $t_2$")
    ax.legend(fontsize=9, edgecolor="none", loc="upper left", ncols=3, handlelength=1.5, columnspacing=1)
    return ax


def error_against_motion(ax: Axes, motion: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Axes:
    """Error of each weight against how far training moved it, in logarithms, and as it is in an inset (Figure 2e).

    Args:
        ax: where to draw.
        motion: label -> (`(weights,)` motion, `(weights,)` error), both absolute; zeros and NaN are left out.
    """
    shown = []
    inset = ax.inset_axes((0.58, 0.07, 0.37, 0.24))
    for (label, (moved, error)), color in zip(motion.items(), COLORS, strict=False):
        both = np.stack([moved, error])
        both = both[:, (np.isfinite(both) & (both > 0)).all(axis=0)]
        ax.scatter(*both, s=6, color=color, alpha=0.4, lw=0, label=label, rasterized=True)
        inset.scatter(*both, s=3, color=color, alpha=0.4, lw=0, rasterized=True)
        shown.append(both)
    every = np.concatenate(shown, axis=1) if shown else np.empty((2, 0))
    if not every.size:
        every = np.ones((2, 1))
    (left, bottom), (right, top) = np.quantile(every, 0.002, axis=1) / 2, np.quantile(every, 0.998, axis=1) * 2
    ax.plot([left, right], [left, right], color=INK, lw=0.8, ls=":", label="error = motion")
    inset.plot([0, right], [0, right], color=INK, lw=0.8, ls=":")
    inset.set(xlim=(0, right / 2), ylim=(0, right / 2))
    inset.set_title("linear", fontsize=8, pad=2)
    inset.tick_params(labelsize=7, pad=1)
    inset.locator_params(nbins=3)
    top = max(top, right)
    bottom *= (bottom / top) ** 0.55  # room for the inset
    ax.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    ax.set(xlabel="|motion| of a weight", ylabel="|error| of its forecast")
    ax.legend(fontsize=9, frameon=False, markerscale=2.5)
    return ax


def eigenvalues(ax: Axes, spectra: Mapping[str, np.ndarray], zoom: float | None = None) -> Axes:
    """Eigenvalues on the unit circle.

    Args:
        ax: where to draw.
        spectra: label -> `(eigenvalues,)` complex.
        zoom: half the width of the surroundings of 1 that are shown enlarged inside the circle; None: they are not.
    """
    angle = 2 * np.pi * np.linspace(0, 1, 721)
    ax.plot(np.cos(angle), np.sin(angle), color=INK, lw=0.8)
    ax.set(xlabel=r"Re $\lambda$", ylabel=r"Im $\lambda$", aspect="equal", xlim=(-1.25, 1.25), ylim=(-1.25, 1.25))
    shown = {label: _coordinates(values[values != 0]) for label, values in spectra.items()}
    _scatter(ax, shown)
    if zoom:
        inset = ax.inset_axes((0.16, 0.31, 0.38, 0.38))
        unit = 10.0 ** np.floor(np.log10(zoom))
        near = np.linspace(-zoom, zoom, 101)
        inset.plot((np.sqrt(1 - near**2) - 1) / unit, near / unit, color=INK, lw=0.8)
        _scatter(inset, {label: (places - [[1.0], [0.0]]) / unit for label, places in shown.items()})
        inset.set(xlim=(-zoom / unit, zoom / unit), ylim=(-zoom / unit, zoom / unit), aspect="equal", yticks=[])
        inset.tick_params(labelsize=9, pad=2)
        inset.set_title(rf"$\lambda - 1$ in $10^{{{np.log10(unit):.0f}}}$", fontsize=9, pad=4)
        lines = [((1, side * zoom), (0.54, 0.5 + side * 0.19)) for side in (-1, 1)]
        for (x, y), corner in lines:
            ax.annotate(
                "", (x, y), corner, textcoords="axes fraction", arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.4}
            )
    ax.legend(fontsize=9, frameon=False)
    return ax


def error_growth(ax: Axes, ahead: Sequence[int], errors: Mapping[str, Sequence[float]]) -> Axes:
    """Median error over motion against how far ahead the forecast is.

    Args:
        ax: where to draw.
        ahead: optimizer steps.
        errors: label -> median |error| / |motion| at each.
    """
    for (label, values), color in zip(errors.items(), COLORS, strict=False):
        ax.plot(ahead, values, "o-", ms=4, lw=1.5, color=color, label=label)
    ax.axhline(1, color=INK, lw=0.8, ls=":")
    ax.set(xlabel="optimizer steps ahead", ylabel="median |error| / |motion|", yscale="log")
    steps_along(ax)
    ax.legend(fontsize=9, frameon=False)
    return ax


def guarded_jumps(ax: Axes, jumps: Sequence[Jump]) -> Axes:
    """The guard's loss at each attempt to jump, and how far each accepted jump lowered it.

    Args:
        ax: where to draw.
        jumps: in order of time; those without an evaluation are left out.
    """
    seen = [jump for jump in jumps if jump.before is not None and np.isfinite(jump.before)]
    taken = [jump for jump in seen if jump.accepted]
    refused = [jump for jump in seen if not jump.accepted]
    losses = [
        place
        for jump in seen
        for place in ((jump.step, jump.before), *([(jump.step + jump.moves - 1, jump.after)] if jump.accepted else []))
    ]
    path = np.array(losses, float).reshape(-1, 2)
    ax.plot(*path.T, color=INK, lw=1, alpha=0.5, label="loss of the guard")
    values = ("step", "before", "after", "moves")
    steps, before, after, moves = (np.array([getattr(jump, value) for jump in taken], float) for value in values)
    ends = steps + moves - 1  # of those that follow one another the last
    ax.plot([steps, ends], [before, after], color=COLORS[0], lw=1.5)
    ax.plot(ends, after, "v", ms=4, color=COLORS[0], label="accepted jump")
    if refused:
        ax.plot(
            *np.array([(jump.step, jump.before) for jump in refused]).T, "x", ms=5, color=COLORS[1], label="refused"
        )
    if len(path) and path[:, 1].min() > 0:
        ax.set_yscale("log")
    steps_along(ax)
    counts = {
        f"accepted (in {moves.sum():,.0f} moves)" if any(moves > 1) else "accepted": len(taken),
        "refused": len(refused),
        "without a loss, not drawn": len(jumps) - len(seen),
    }
    about = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    ax.set(xlabel="optimizer step", ylabel="loss of the guard")
    ax.set_title(f"{len(jumps)} attempts{about and f': {about}'}", fontsize=11)
    ax.legend(fontsize=9, frameon=False)
    return ax


def checkpoint_spectra(figure: Figure, rows: Sequence[Mapping[str, Any]], by: str = "layer") -> Figure:
    """Eigenvalues on the unit circle, and the half-life of each mode by group.

    Args:
        figure: empty.
        rows: one an eigenvalue, with `group`, `real`, `imaginary`, `modulus` and `half_life`, groups in order.
        by: what the groups are.
    """
    from matplotlib import colormaps

    circle, lives = figure.subplots(1, 2, width_ratios=(1, 1.25))
    groups = list(dict.fromkeys(row["group"] for row in rows))
    depth = [groups.index(row["group"]) for row in rows]
    colors = colormaps["viridis"](np.array(depth) / max(1, len(groups) - 1) * 0.9)
    angle = 2 * np.pi * np.linspace(0, 1, 721)
    circle.plot(np.cos(angle), np.sin(angle), color=INK, lw=0.8)
    values = np.array([(row["real"], row["imaginary"]) for row in rows])
    circle.scatter(*values.T, s=18, c=colors, alpha=0.8, lw=0, zorder=3)
    reach = 1.1 * max(1.05, min(3.0, np.abs(values).max()))  # one runaway must not flatten the rest
    circle.set(
        xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel=r"Re $\lambda$", ylabel=r"Im $\lambda$"
    )
    every = -(-len(groups) // 30)
    names = shortened(groups[::every], 28)
    lives.set_yticks(range(0, len(groups), every), names, fontsize=8, parse_math=False)
    lives.set(ylabel=by, ylim=(len(groups) - 0.5, -0.5))
    decaying = [(row["half_life"], place, color) for place, row, color in zip(depth, rows, colors, strict=True)]
    seen = [mode for mode in decaying if mode[0] is not None]
    if not seen:
        lives.set_xticks([])
        lives.text(0.5, 0.5, "no mode decays", ha="center", transform=lives.transAxes)
        return figure
    at, places, shades = zip(*seen, strict=True)
    lives.scatter(at, places, s=18, c=shades, alpha=0.8, lw=0)
    _half_lives_along(lives, min(at), max(at))
    edge = lives.get_yaxis_transform()
    for life, place, color in decaying:
        if life is None:
            lives.plot(1.0, place, ">", ms=5, color=color, transform=edge, clip_on=False)
    return figure


def _half_lives_along(ax: Axes, shortest: float, longest: float) -> None:
    """A logarithmic axis with a few labels: 1, 2, 5 of each decade, or whole decades where there are many."""
    from matplotlib.ticker import LogLocator, NullLocator

    ax.set(xscale="log", xlim=(shortest / 1.7, longest * 1.7))
    decades = np.log10(longest / shortest)
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 1.5 else (1.0,), numticks=7))
    ax.xaxis.set_minor_locator(NullLocator())
    if decades < 4:  # else powers of ten
        ax.xaxis.set_major_formatter("{x:,g}")
    ax.set_xlabel("half-life in optimizer steps\n(at the edge: does not decay)")
    ax.grid(axis="x", color=INK, alpha=0.12, lw=0.6)


def report_of_jumps(jumps: Sequence[Jump], path: str | os.PathLike[str] | None = None) -> Figure:
    """:func:`guarded_jumps` as a figure of its own, written to `path` as PNG where one is given."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    guarded_jumps(figure.subplots(), jumps)
    if path is not None:
        save(figure, Path(path))
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, through a temporary file."""
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, path)


def _coordinates(values: np.ndarray) -> np.ndarray:
    return np.stack([np.real(values), np.imag(values)])


def _scatter(ax: Axes, places: Mapping[str, np.ndarray]) -> None:
    for (label, (x, y)), color in zip(places.items(), COLORS, strict=False):
        ax.scatter(x, y, s=10, color=color, alpha=0.5, lw=0, label=label)


def steps_along(ax: Axes) -> None:
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.locator_params(axis="x", nbins=5)


def quartiles(values: np.ndarray, axis: int) -> np.ndarray:
    """Over the finite values; NaN where there are none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that there are none
        return np.nanquantile(np.where(np.isfinite(values), values, np.nan), (0.25, 0.5, 0.75), axis=axis)
