"""Table 1 and Figures 2, S5 and S6 of the paper: Koopman training of a differential-equation solver."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import koopt
from koopt import metrics, report, system
from koopt.experiments import figure2, oscillator, recording
from koopt.experiments.methods import (
    OPTIMIZERS,
    Forecast,
    Method,
    Settings,
    errors_ahead,
    forecast,
    loss_of,
    methods,
    path,
    weights_at,
)
from koopt.experiments.methods import QUICK as QUICK
from koopt.experiments.timing import Cost, jump_seconds, network_at, step_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

PAPER = {  # Table 1: success, T_eq/T and speed-up at the nominal T
    "adam": (0.84, 0.85, 98.0),
    "adagrad": (0.92, 1.00, 132.0),
    "adadelta": (1.00, 1.00, 141.0),
}
COLUMNS = {
    "setting": "setting",
    "by": "operator",
    "success": "success",
    "teq_over_T": "T_eq/T",
    "teq_over_T_mean": "…\nmean",
    "censored": "cen-\nsored",
    "error_over_motion": "error/\nmotion",
    "residual": "resi-\ndual",
    "max_modulus": "max\n|λ|",
    "speedup": "speed-\nup",
    "speedup_with_recording": "… with\nrecord.",
}
PAPER_ERROR = 0.0044  # median |error| / |motion|, one figure for the node operators


def row(
    settings: Settings, recorded: recording.Recording, method: Method, found: Forecast, horizon: int, cost: Cost
) -> dict[str, Any]:
    """One line of the table."""
    loss = torch.from_numpy(np.array(recorded.loss[settings.t2 :]))
    forecast_loss = loss_of(found.weights[horizon])
    won = metrics.success(forecast_loss, loss)
    steps, censored = metrics.equivalent_steps(forecast_loss, loss)
    median_steps = metrics.median(steps)
    start, truth = (weights_at(recorded, step) for step in (settings.t2, settings.t2 + horizon))
    line = {
        "optimizer": recorded.run.optimizer,
        "method": method.method,
        "by": method.by,
        "setting": method.setting,
        "T": horizon,
        "rank": method.options.get("rank"),
        "rtol": _rtol(method) if method.method == "koopman" else None,
        "difference": bool(method.options.get("difference", False)),
        "window": method.tail,
        "stride": method.stride,
        "horizon": horizon / method.stride,
        "seeds": settings.seeds,
        "success": won.double().mean().item(),
        "teq_over_T": median_steps / horizon,
        "teq_over_T_mean": steps.double().mean().item() / horizon,
        "censored": censored.double().mean().item(),
        "error_over_motion": metrics.error_over_motion(found.weights[horizon], start, truth),
        "residual": None if found.residual is None else metrics.median(found.residual),
        "max_modulus": None if found.modulus is None else metrics.median(found.modulus),
        "step_ms": 1e3 * cost.step,
        "jump_ms": 1e3 * cost.jump,
        "recording_ms": 1e3 * cost.recording,
        "speedup": metrics.speedup(median_steps, cost.step, cost.jump),
        "speedup_with_recording": metrics.speedup(median_steps, cost.step, cost.jump, cost.recording),
    }
    if method.setting == "paper" and method.by == "node" and horizon == settings.horizons[0]:
        success, share, speedup = PAPER[recorded.run.optimizer]
        low, high = metrics.binomial_interval(success, settings.seeds)
        line |= {
            "paper_success": success,
            "paper_success_low": low,
            "paper_success_high": high,
            "paper_teq_over_T": share,
            "paper_speedup": speedup,
            "paper_error_over_motion": PAPER_ERROR,
        }
    return line


def check(settings: Settings) -> None:
    """Refuse settings that cannot be run, before anything is written."""
    for optimizer in settings.optimizers:
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"--optimizer is {optimizer!r}, expected {', '.join(OPTIMIZERS)} or all")
    system.require_seeds(settings.seed, settings.seeds)
    trail, tail, stride = recording.TRAIL, settings.tail, settings.stride
    t1, t2, last = settings.t1, settings.t2, settings.steps - settings.t2
    if not 0 <= t1 <= t2 - trail or t1 % trail or t2 % trail:
        raise ValueError(f"t1 and t2 are {t1} and {t2}, expected multiples of {trail}, t1 before t2")
    if not 0 < 2 * stride <= tail <= t2 - t1 or tail % stride:
        raise ValueError(
            f"tail and stride are {tail} and {stride}, expected a tail of whole strides, at least two, "
            f"within the window of {t2 - t1} steps"
        )
    for horizon in settings.horizons:
        if not 0 < horizon <= last or horizon % trail:
            raise ValueError(
                f"--horizon is {horizon}, expected a multiple of {trail} up to {last}: "
                f"the data end at step {settings.steps}, {last} after t2"
            )
        if settings.horizons.count(horizon) > 1:
            raise ValueError(f"--horizon is given as {horizon} twice, expected different ones")


def reproduce(
    settings: Settings, folder: Path, progress: Callable[[str, int, int], None]
) -> list[dict[str, Any]] | None:
    """Train, forecast, time, draw; writes figures and ``result.json`` to `folder`.

    Args:
        settings: what to run; see :func:`check`.
        folder: where recordings, figures and the result go.
        progress: called with a stage's name, how much of it is done and its total.

    Returns:
        The rows of the table; None if the training was interrupted: what is recorded stays, the same call goes on.

    Raises:
        ValueError: if a setting is out of range, or earlier recordings are damaged or of other settings.
        OSError: if the folder cannot be written or the disk is too small.

    Source: Dogra & Redman (2020), Section 4, S5, S6 and S9.
    """
    check(settings)
    runs = [settings.run(optimizer) for optimizer in settings.optimizers]
    system.require_folder(folder, "--output")
    begin = time.perf_counter()
    if not recording.record_all(runs, folder / "recordings", progress):
        return None
    with system.one_thread():
        return _evaluate(settings, folder, progress, begin)


def tables(
    settings: Settings, rows: Sequence[dict[str, Any]]
) -> list[tuple[str, dict[str, str], list[dict[str, Any]]]]:
    """Title, columns and rows of each table; the paper's are of T = 2,500 and 25 seeds, without recording."""
    return [
        (
            f"{optimizer.capitalize()}, T = {horizon:,}, {settings.seeds} seeds",
            COLUMNS,
            [row for row in rows if row["optimizer"] == optimizer and row["T"] == horizon],
        )
        for optimizer in settings.optimizers
        for horizon in settings.horizons
    ]


def _evaluate(
    settings: Settings, folder: Path, progress: Callable[[str, int, int], None], begin: float
) -> list[dict[str, Any]]:
    rows, figures, growth = [], [], {}
    total, done = len(settings.optimizers) * (len(methods(settings)) + 1), 0
    for optimizer in settings.optimizers:
        recorded = recording.opened(settings.run(optimizer), folder / "recordings")
        first = torch.from_numpy(np.ascontiguousarray(recorded.window[:, 0]))
        step = step_seconds(optimizer, first[0])
        found = {}
        lines: dict[int, list[dict[str, Any]]] = {horizon: [] for horizon in settings.horizons}
        for method in methods(settings):
            progress("forecast and time", done, total)
            done += 1
            found[method] = forecast(recorded, method, sorted({*path(settings), *settings.horizons}))
            for horizon, listed in lines.items():
                window = first[-1 - method.tail :]
                recorded_as = (method.tail // method.stride + 1, method.stride)
                asked = {"method": method.method, "by": method.by, **method.options}
                seconds = jump_seconds(network_at(first[0]), window, *recorded_as, horizon, settings.repeats, **asked)
                cost = Cost(step, *seconds)
                listed.append(row(settings, recorded, method, found[method], horizon, cost))
        rows += [line for listed in lines.values() for line in listed]
        progress("forecast and time", done, total)
        done += 1
        growth[optimizer] = errors_ahead(settings, recorded, found)
        figures.append(figure2.draw(settings, recorded, found, folder))
    figures.append(figure2.draw_growth(settings, growth, folder))
    progress("forecast and time", total, total)
    report.write_result(folder, "de-solver", asdict(settings), rows, figures, time.perf_counter() - begin)
    return rows


def _rtol(method: Method) -> float | None:
    """The cut in force: as given, or the default of ``koopt.fit`` for the largest patches."""
    if method.options.get("difference"):
        return method.options.get("rtol")  # the default depends on the data
    count = method.tail // method.stride + 1
    sizes = [index.shape[1] for index in koopt.partition(oscillator.Oscillator(), method.by).indices]
    return method.options.get("rtol", torch.finfo(torch.float64).eps * max(count, *sizes))
