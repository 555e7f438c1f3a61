"""One function a figure: data in, matplotlib Axes out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

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
        steps: `(time,)` optimizer steps.
        loss: `(time, seeds)` training losses at these steps.
        window: t1 and t2.
        forecasts: label -> (step, `(seeds,)` losses of the forecast weights).
    """
    low, middle, high = _quartiles(loss, axis=1)
    ax.axvspan(*window, color="#f1ead8", label="recorded window", lw=0)
    ax.fill_between(steps, low, high, color=INK, alpha=0.15, lw=0)
    ax.plot(steps, middle, color=INK, lw=1.5, label="training")
    for i, ((label, (step, losses)), color) in enumerate(zip(forecasts.items(), COLORS, strict=False)):
        low, middle, high = _quartiles(losses, axis=0)
        place = step + (i - (len(forecasts) - 1) / 2) * 0.02 * (steps[-1] - steps[0])
        ax.errorbar(
            place, middle, [[middle - low], [high - middle]], fmt="o", ms=5, capsize=3, color=color, label=label
        )
    ax.set(xlabel="optimizer step", ylabel="loss (median, quartiles)", yscale="log")
    ax.yaxis.set_minor_formatter("{x:.2g}")
    ax.legend(fontsize=8, frameon=False, loc="lower left")
    return ax


def equivalent_steps(ax: Axes, shares: Mapping[str, np.ndarray], top: float = 1.5) -> Axes:
    """The distribution of T_eq/T over seeds, one dot a seed, the median as a bar (Figure 2c).

    Args:
        shares: label -> `(seeds,)` T_eq/T; labels may have two lines.
        top: shares beyond it are drawn at it.
    """
    for i, values in enumerate(shares.values()):
        clipped = np.minimum(np.sort(values), top)
        spread = 0.28 * np.sin(2.4 * np.arange(len(values)))  # fixed jitter, so that the figure is reproducible
        ax.scatter(i + spread, clipped, s=14, color=COLORS[i % len(COLORS)], alpha=0.6, lw=0)
        ax.hlines(np.median(clipped), i - 0.36, i + 0.36, color=INK, lw=2)
    ax.axhline(1, color=INK, lw=0.8, ls=":")
    ax.set_xticks(range(len(shares)), list(shares), fontsize=8)
    ax.set(ylabel="$T_{eq}/T$ (bar: median)", ylim=(-0.08, top + 0.08))
    return ax


def weight_paths(ax: Axes, steps: np.ndarray, weights: np.ndarray, ahead: np.ndarray, forecast: np.ndarray) -> Axes:
    """Weights over time, as trained and as forecast, each from its value at t2 (Figure 2d).

    Args:
        steps: `(time,)` optimizer steps.
        weights: `(time, few)` weights at these steps, relative to t2.
        ahead: `(horizons,)` optimizer steps of the forecasts.
        forecast: `(horizons, few)` forecast weights, relative to t2.
    """
    for i in range(weights.shape[1]):
        color = COLORS[i % len(COLORS)]
        ax.plot(steps, weights[:, i], color=color, lw=1.5, alpha=0.55, label="trained" if i == 0 else None)
        ax.plot(ahead, forecast[:, i], "o", ms=3.5, mfc="none", color=color, label="forecast" if i == 0 else None)
    ax.axvline(ahead[0], color=INK, lw=0.8, ls=":")
    ax.set(xlabel="optimizer step", ylabel="weight $-$ weight at $t_2$")
    ax.legend(fontsize=8, frameon=False)
    return ax


def error_against_motion(ax: Axes, motion: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Axes:
    """Error of each weight against how far training moved it, linear, with the same in logarithms inset (Figure 2e).

    Args:
        motion: label -> (`(weights,)` motion, `(weights,)` error), both absolute.
    """
    inset = ax.inset_axes((0.56, 0.52, 0.42, 0.45))
    for (label, (moved, error)), color in zip(motion.items(), COLORS, strict=False):
        for axes in (ax, inset):
            axes.scatter(moved, error, s=5, color=color, alpha=0.45, lw=0, label=label, rasterized=True)
    reach = max(float(np.quantile(moved, 0.999)) for moved, _ in motion.values())
    ax.plot([0, reach], [0, reach], color=INK, lw=0.8, ls=":", label="error = motion")
    ax.set(
        xlabel="|motion| of a weight", ylabel="|error| of its forecast", xlim=(0, reach), ylim=(-0.02 * reach, reach)
    )
    inset.set(xscale="log", yscale="log")
    inset.tick_params(labelsize=6, pad=1)
    inset.plot([1e-12, 10], [1e-12, 10], color=INK, lw=0.6, ls=":")
    moved = np.concatenate([moved for moved, _ in motion.values()])
    error = np.concatenate([error for _, error in motion.values()])
    for name, values in (("x", moved), ("y", error)):
        seen = values[np.isfinite(values) & (values > 0)]
        inset.set(**{f"{name}lim": (np.quantile(seen, 0.002) / 2, np.quantile(seen, 0.998) * 2)})
    ax.legend(fontsize=7, frameon=False, loc="upper left", markerscale=2.5)
    return ax


def eigenvalues(ax: Axes, spectra: Mapping[str, np.ndarray]) -> Axes:
    """Eigenvalues on the unit circle.

    Args:
        spectra: label -> `(eigenvalues,)` complex.
    """
    turn = np.exp(2j * np.pi * np.linspace(0, 1, 721))
    ax.plot(turn.real, turn.imag, color=INK, lw=0.8)
    for (label, values), color in zip(spectra.items(), COLORS, strict=False):
        shown = values[values != 0]
        ax.scatter(shown.real, shown.imag, s=9, color=color, alpha=0.5, lw=0, label=label)
    ax.set(xlabel=r"Re $\lambda$", ylabel=r"Im $\lambda$", aspect="equal", xlim=(-1.25, 1.25), ylim=(-1.25, 1.25))
    ax.legend(fontsize=8, frameon=False, loc="center left")
    return ax


def error_growth(ax: Axes, ahead: Sequence[int], errors: Mapping[str, Sequence[float]]) -> Axes:
    """Median error over motion against how far ahead the forecast is.

    Args:
        ahead: optimizer steps.
        errors: label -> median |error| / |motion| at each.
    """
    for (label, values), color in zip(errors.items(), COLORS, strict=False):
        ax.plot(ahead, values, "o-", ms=3.5, lw=1.5, color=color, label=label)
    ax.axhline(1, color=INK, lw=0.8, ls=":")
    ax.set(xlabel="optimizer steps ahead", ylabel="median |error| / |motion|", yscale="log")
    ax.legend(fontsize=8, frameon=False)
    return ax


def _quartiles(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    low, middle, high = np.nanquantile(np.where(np.isfinite(values), values, np.nan), (0.25, 0.5, 0.75), axis=axis)
    return low, middle, high
