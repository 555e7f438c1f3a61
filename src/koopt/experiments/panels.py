"""Drawings that only one experiment needs: data in, matplotlib Axes out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from koopt.plot import COLORS, INK, quartiles, steps_along

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
    order = sorted(changes, key=lambda label: float(np.mean(changes[label])), reverse=True)
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
    ax.set(xlabel="change of the loss in % (bar: mean)", ylabel="forecast by")
    return ax


def horizon_sweep(ax: Axes, ahead: np.ndarray, changes: Mapping[str, np.ndarray], mark: float) -> Axes:
    """Relative change of the mean loss against how far ahead a forecast aims.

    Args:
        ax: where to draw.
        ahead: `(horizons,)` epochs.
        changes: label -> `(horizons,)`, the one that was chosen last.
        mark: the horizon that was chosen.
    """
    from matplotlib import colormaps

    paths = len(changes) - 1
    colors = [*colormaps["viridis"](np.linspace(0.15, 0.85, paths)), COLORS[1]]  # the others mean no methods here
    for (label, values), color in zip(changes.items(), colors, strict=True):
        ax.plot(ahead, 100 * values, "o-", ms=4, lw=1.5, color=color, label=label)
    ax.axhline(0, color=INK, lw=0.8, ls=":")
    known = [float(value) for values in changes.values() for value in values if np.isfinite(value)]
    low = min(100 * min(known, default=0.0), -0.1)
    ax.plot([mark, mark], [1.15 * low, 0], color=INK, lw=0.8, label="chosen")
    ax.set(xlabel="epochs ahead", ylabel="change of the mean loss in %", ylim=(1.15 * low, -0.6 * low))
    ax.legend(fontsize=9, frameon=False, ncols=3, loc="upper center", handlelength=1.5, columnspacing=1.2)
    return ax


def scaling(
    ax: Axes,
    curves: Mapping[str, tuple[np.ndarray, np.ndarray, float | None, float]],
    colors: Sequence[str] = COLORS,
) -> Axes:
    """Time against size in logarithms, with the slope fitted and, dotted, the slope of the theory.

    Args:
        ax: where to draw.
        curves: label -> (`(points,)` sizes, `(points,)` seconds, the exponent fitted to the largest or None, the
            exponent in theory); NaN is left out.
        colors: taken in turn.
    """
    ends = [np.inf, 0.0]
    for i, (label, (sizes, taken, slope, theory)) in enumerate(curves.items()):
        known = np.isfinite(taken) & (np.asarray(taken) > 0)
        x, y = np.asarray(sizes, dtype=float)[known], np.asarray(taken, dtype=float)[known]
        color = colors[i % len(colors)]
        fitted = "-" if slope is None else f"{round(slope, 1) + 0.0:.1f}"
        ax.plot(x, y, "o-", ms=4, lw=1.5, color=color, label=f"{label}: {fitted} ({theory:g})")
        if len(x):
            ax.plot(x, y[-1] * (x / x[-1]) ** theory, ":", lw=1, color=color)
            ends = [min(ends[0], x[0]), max(ends[1], x[-1])]
    ax.set(xlabel="size", ylabel="seconds")
    if ends[1] > 0:
        ax.set(xscale="log", yscale="log")
        ticks = [digit * 10.0**power for power in range(10) for digit in (1, 2, 5)]
        ticks = [tick for tick in ticks if ends[0] <= tick <= ends[1]]
        ax.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        ax.set_xticks([], minor=True)
    if curves:
        ax.legend(fontsize=9, frameon=False, title="exponent (theory)", title_fontsize=9, loc="lower right")
    return ax


def gains(ax: Axes, rows: Sequence[int], columns: Sequence[int], gain: np.ndarray, expected: np.ndarray) -> Axes:
    """Where a gain is above 1: a map with its values, and the edge of where it is expected to be.

    Args:
        ax: where to draw.
        rows, columns: what stands along the two sides.
        gain: `(rows, columns)`, NaN where it could not be measured.
        expected: `(rows, columns)`, the gain in theory.
    """
    shown = np.log10(np.where(gain > 0, gain, np.nan))
    ax.imshow(shown, cmap="RdBu", vmin=-2, vmax=2, origin="lower", aspect="auto")
    ax.set_facecolor("#e8e8e8")
    for (i, j), value in np.ndenumerate(gain):
        text = f"{value:,.0f}" if value >= 10 else f"{value:.2g}" if np.isfinite(value) else "too large"
        strong = abs(shown[i, j]) > 1.3
        ax.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if strong else INK)
    above = expected > 1
    for i, j in np.argwhere(above[:, 1:] != above[:, :-1]):
        ax.plot([j + 0.5, j + 0.5], [i - 0.5, i + 0.5], color=INK, lw=2.5)
    for i, j in np.argwhere(above[1:] != above[:-1]):
        ax.plot([j - 0.5, j + 0.5], [i + 0.5, i + 0.5], color=INK, lw=2.5)
    ax.set_xticks(range(len(columns)), [f"{value:,}" for value in columns])
    ax.set_yticks(range(len(rows)), [f"{value:,}" for value in rows])
    ax.set(xlabel="columns", ylabel="rows", xlim=(-0.5, len(columns) - 0.5), ylim=(-0.5, len(rows) - 0.5))
    return ax


def error_curves(
    ax: Axes,
    steps: np.ndarray,
    smoothed: np.ndarray,
    window: int,
    curves: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> Axes:
    """Mean error of many simulations against the step, with bands of one standard error (Figure S4b).

    Args:
        ax: where to draw.
        steps: `(time,)` steps of the smoothed training error.
        smoothed: `(time,)` smoothed training error.
        window: last step of the window, which begins at 0.
        curves: label -> (`(points,)` steps, `(points,)` mean error, `(points,)` its standard error).
    """
    ax.axvspan(0, window, color="#f1ead8", label="recorded window", lw=0)
    ax.plot(steps, smoothed, color=INK, lw=0.7, alpha=0.6, label="training error, smoothed")
    for i, (label, (places, mean, spread)) in enumerate(curves.items()):
        color = (INK, *COLORS[:2], *COLORS[3:])[i % len(COLORS)]  # grey is too close to ink
        ax.fill_between(places, mean - spread, mean + spread, color=color, alpha=0.25, lw=0)
        ax.plot(places, mean, color=color, lw=1.6, label=label)
    ax.set(xlabel="training step", ylabel="error: share of wrong signs", ylim=(0, 0.55))
    ax.legend(fontsize=9, frameon=False)
    return ax


def error_against_size(
    ax: Axes,
    sizes: Sequence[int],
    errors: Mapping[str, np.ndarray],
    careful: Mapping[str, np.ndarray],
    baselines: Mapping[str, np.ndarray],
) -> Axes:
    """Error against the size of a perceptron, forecast from all of the data and from careful data.

    Args:
        ax: where to draw.
        sizes: inputs n_1.
        errors: operator -> `(2, sizes)`, mean and standard error.
        careful: the same operators with careful data.
        baselines: label -> the same for other ways.
    """
    for (label, (mean, spread)), style in zip(baselines.items(), ("-", ":", "-.", "--"), strict=False):
        ax.errorbar(sizes, mean, spread, fmt=style, color=INK, lw=1.3, capsize=2, label=label)
    colors = (*COLORS[:2], *COLORS[3:])  # grey is too close to ink
    for label, color in zip(errors, colors, strict=False):
        for name, (mean, spread), mark in ((label, errors[label], "o-"), (f"{label}, careful", careful[label], "s--")):
            style = {"ms": 5, "mfc": "none" if mark == "s--" else color, "lw": 1.3, "capsize": 2}
            ax.errorbar(sizes, mean, spread, fmt=mark, color=color, label=name, **style)
    ax.set(xlabel="inputs $n_1$", ylabel="error at the end", xscale="log", ylim=(0, 0.55))
    ax.set_xticks(list(sizes), [f"{size:,}" for size in sizes])
    ax.minorticks_off()
    ax.legend(fontsize=9, frameon=False)
    return ax


def offered_horizons(
    ax: Axes, steps: Sequence[int], offered: np.ndarray, achieved: np.ndarray, failed: np.ndarray, fixed: int
) -> Axes:
    """How far forecasts were offered and how far they held, along a run, and how often a fixed horizon fails.

    Args:
        ax: where to draw.
        steps: `(times,)` optimizer steps at which forecasts were made.
        offered: `(times, seeds)` optimizer steps offered; 0 where refused.
        achieved: `(times, seeds)` optimizer steps that they held.
        failed: `(times,)` share of the seeds where the fixed horizon fails, shaded, with an axis on the right.
        fixed: the fixed horizon, in optimizer steps.
    """
    share = ax.twinx()
    share.fill_between(steps, 0, 100 * failed, color=COLORS[1], alpha=0.2, lw=0)
    share.set(ylim=(0, 100), yticks=range(0, 101, 25), ylabel="share that fails")
    share.yaxis.set_major_formatter("{x:.0f} %")
    share.yaxis.label.set_color(COLORS[1])
    share.tick_params(axis="y", colors=COLORS[1])
    share.label_outer()
    ax.set_zorder(share.get_zorder() + 1)  # lines on top of the shade
    ax.patch.set_visible(False)
    ax.fill_between(
        [], [], color=COLORS[1], alpha=0.2, lw=0, label=f"share of seeds where {fixed:,} steps fail (right)"
    )
    for values, color, label in ((achieved, INK, "achieved"), (offered, COLORS[0], "offered")):
        low, middle, high = quartiles(values, axis=1)
        ax.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
        ax.plot(steps, middle, "o-", ms=4, lw=1.5, color=color, label=f"{label} (median, quartiles)")
    ax.axhline(fixed, color=INK, lw=0.8, ls=":", label=f"{fixed:,} steps")
    seen = np.concatenate([offered.flatten(), achieved.flatten()])
    top = seen[np.isfinite(seen)].max(initial=fixed)
    ticks = [digit * 10**power for power in range(2, 8) for digit in (1, 3)]
    ax.set_yscale("symlog", linthresh=100)
    ax.set_yticks([0, *(tick for tick in ticks if tick <= 1.3 * top)])
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.set_ylim(0, 1.3 * top)
    steps_along(ax)
    ax.set(xlabel="optimizer step $t_2$", ylabel="steps ahead")
    ax.legend(fontsize=9, frameon=False)
    return ax


def calibration(ax: Axes, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], tolerance: float) -> Axes:
    """The error that came against the error that was expected, in logarithms.

    Args:
        ax: where to draw.
        pairs: label -> (`(cases,)` expected, `(cases,)` actual); zeros and NaN are left out.
        tolerance: the largest error expected of a forecast that is offered.
    """
    ends = [tolerance]
    for (label, both), color in zip(pairs.items(), COLORS, strict=False):
        places = np.stack(both)
        places = places[:, (np.isfinite(places) & (places > 0)).all(axis=0)]
        kept = np.mean(places[1] <= places[0]) if places.size else np.nan
        ax.scatter(*places, s=10, color=color, alpha=0.5, lw=0, label=f"{label}: {kept:.0%} below expected")
        ends += places.flatten().tolist()
    ax.plot([min(ends), max(ends)], [min(ends), max(ends)], color=INK, lw=0.8, ls=":", label="as expected")
    ax.axvline(tolerance, color=INK, lw=0.8, ls="--", label=f"tolerance {tolerance:g}")
    ax.set(xscale="log", yscale="log", xlabel="expected error / motion", ylabel="actual error / motion")
    ax.legend(fontsize=9, frameon=False)
    return ax
