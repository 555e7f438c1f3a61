"""Section 5 of the paper (Table 2, Figure 3, S10): Koopman training of a classifier on noisy mini-batches."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from koopt import metrics, report, system
from koopt.experiments import classifier, data, figure3, minibatch
from koopt.experiments.mnist_methods import QUICK as QUICK
from koopt.experiments.mnist_methods import (
    Method,
    Protocol,
    Settings,
    forecast,
    methods,
    partition_of,
    test,
    validation,
)
from koopt.experiments.timing import classifier_step_seconds, jump_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from koopt.experiments.minibatch import Run

PAPER_SHARE = 0.97  # Table 2: T_eq/T
COLUMNS = {
    "by": "operator",
    "what": "how",
    "success": "success",
    "teq_over_T": "T_eq/T",
    "teq_over_T_mean": "…\nmean",
    "teq_over_T_error": "…\n± s.e.",
    "censored": "cen-\nsored",
    "speedup": "speed-\nup",
}


@dataclass(frozen=True)
class Cost:
    """Seconds of one network on one thread: an optimizer step, a jump, recording the window; None: not timed."""

    step: float
    jump: float | None = None
    recording: float | None = None


def row(
    settings: Settings,
    protocol: Protocol,
    method: Method,
    weights: Tensor,
    measured: tuple[Tensor, Tensor],
    epochs: Tensor,
    cost: Cost,
) -> dict[str, Any]:
    """One line of the table.

    Args:
        settings, protocol, method: of this line.
        weights: `(seeds, weights)`, the forecast.
        measured: its loss and accuracy, each `(seeds,)`.
        epochs: `(epochs + 1, seeds, weights)`, the trained weights at the end of each epoch.
        cost: of the forecast.
    """
    run = settings.run
    loss, accuracy = measured
    after = protocol.loss[run.t2 :]
    steps, censored = metrics.equivalent_steps(loss, after, every=run.epoch_steps)
    shares, median = steps.double() / run.horizon, metrics.median(steps)
    error = None
    if method.setting == "paper":  # the only ones that aim at t2 + T
        error = metrics.error_over_motion(weights, epochs[run.t2], epochs[run.t2 + run.ahead])
    line = {
        "optimizer": "adadelta",
        "protocol": protocol.name,
        "method": method.method,
        "by": method.by,
        "setting": method.setting,
        "what": method.what,
        "T": run.horizon,
        "rank": method.options.get("rank"),
        "ranks": ", ".join(map(str, method.options.get("ranks", ()))) or None,
        "rtol": method.options.get("rtol"),
        "window": run.window_steps if method.snapshots is None else method.snapshots * run.look,
        "stride": 1 if method.source in ("every_step", "averages") else run.look,
        "horizon": method.horizon,
        "seeds": settings.seeds,
        "success": metrics.success(loss, after).double().mean().item(),
        "teq_over_T": median / run.horizon,
        "teq_over_T_mean": shares.mean().item(),
        "teq_over_T_error": shares.std().item() / len(shares) ** 0.5 if len(shares) > 1 else None,
        "censored": censored.double().mean().item(),
        "teq_over_T_dip": _first_dip(run, loss, protocol),
        "error_over_motion": error,
        "loss": loss.mean().item(),
        "loss_at_t2": after[0].mean().item(),
        "accuracy": accuracy.mean().item(),
        "accuracy_at_t2": protocol.accuracy[run.t2].mean().item(),
        "step_ms": 1e3 * cost.step,
        "equivalent_seconds": median * cost.step,
        **_speed(run, median, cost),
    }
    if method.source == "every_step" and protocol.name == "test" and "max_modulus" not in method.options:
        line["paper_teq_over_T"] = PAPER_SHARE
    return line


def _speed(run: Run, steps: float, cost: Cost) -> dict[str, float | None]:
    if cost.jump is None or cost.recording is None:
        return dict.fromkeys(("jump_ms", "recording_share", "speedup", "speedup_with_recording"))
    return {
        "jump_ms": 1e3 * cost.jump,
        "recording_share": cost.recording / (run.window_steps * cost.step),
        "speedup": metrics.speedup(steps, cost.step, cost.jump),
        "speedup_with_recording": metrics.speedup(steps, cost.step, cost.jump, cost.recording),
    }


def _first_dip(run: Run, loss: Tensor, protocol: Protocol) -> float | None:
    """Median T_eq/T by the first time that the noisy loss, seen some twenty times an epoch, dips as low."""
    if protocol.dips is None:
        return None
    steps, _ = metrics.equivalent_steps(loss, protocol.dips, every=run.look)
    return metrics.median(steps) / run.horizon


def check(settings: Settings) -> None:
    """Refuse settings that cannot be run, before anything is written."""
    system.require_seeds(settings.seed, settings.seeds)
    run = settings.run
    if settings.epochs < run.t2 + run.ahead:
        raise ValueError(f"--epochs is {settings.epochs}, expected at least {run.t2 + run.ahead}: t2 and T beyond it")


def reproduce(
    settings: Settings, folder: Path, progress: Callable[[str, int, int], None]
) -> list[dict[str, Any]] | None:
    """Train, forecast, time, draw; writes a figure and ``result.json`` to `folder`.

    Args:
        settings: what to run; see :func:`check`.
        folder: where recordings, the figure and the result go.
        progress: called with a stage's name, how much of it is done and its total.

    Returns:
        The rows of the table; None if the training was interrupted: finished groups of seeds stay, the same call goes
        on with the others.

    Raises:
        ValueError: if a setting is out of range, or earlier recordings are damaged or of other settings.
        OSError: if there is no data, the folder cannot be written or the disk is too small.

    Source: Dogra & Redman (2020), Section 5 and S10.
    """
    check(settings)
    system.require_folder(folder, "--output")
    begin = time.perf_counter()
    if not minibatch.record_all(settings.run, folder / "recordings", progress):
        return None
    with system.one_thread():
        return _evaluate(settings, folder, progress, begin)


def tables(
    settings: Settings, rows: Sequence[dict[str, Any]]
) -> list[tuple[str, dict[str, str], list[dict[str, Any]]]]:
    """Title, columns and rows of each table."""
    titles = {"validation": "the validation split", "test": "the test set, as in the paper"}
    return [
        (
            f"MNIST, T = {settings.run.ahead} epochs, {settings.seeds} seeds, {title}",
            COLUMNS,
            [row for row in rows if row["protocol"] == protocol],
        )
        for protocol, title in titles.items()
    ]


def _evaluate(
    settings: Settings, folder: Path, progress: Callable[[str, int, int], None], begin: float
) -> list[dict[str, Any]]:
    run, asked = settings.run, methods(settings)
    groups = [minibatch.opened(run, first, folder / "recordings") for first in run.firsts]
    total, done = 2 * len(asked) + 2, 0

    def tell() -> None:
        nonlocal done
        done += 1
        progress("forecast digits", done, total)

    progress("forecast digits", done, total)
    digits = data.mnist()
    in_memory, loaded = classifier_step_seconds(digits, run.batch)
    tell()
    step, costs = min(in_memory, loaded), {}
    for method in asked:
        costs[method] = cost_of(settings, method, groups[0].window, step)
        tell()
    found, rows = {}, []
    for method in asked:
        found[method] = torch.cat([forecast(run, group, method) for group in groups])
        tell()
    epochs = torch.cat([group.epochs for group in groups], dim=1)
    both = [validation(run, groups, digits), test(epochs, digits)]  # the test set is read here, and only here
    measured: dict[str, dict[Method, tuple[Tensor, Tensor]]] = {
        protocol.name: {m: classifier.loss_and_accuracy(found[m], protocol.images, protocol.labels) for m in asked}
        for protocol in both
    }
    for protocol in both:
        known = measured[protocol.name]
        rows += [row(settings, protocol, m, found[m], known[m], epochs, costs[m]) for m in asked]
    for line in rows:
        line |= {"step_in_memory_ms": 1e3 * in_memory, "step_data_loader_ms": 1e3 * loaded}
    figure = figure3.draw(settings, both, measured, groups, folder)
    tell()
    report.write_result(
        folder, "mnist", asdict(settings) | {"run": asdict(run)}, rows, [figure], seconds=time.perf_counter() - begin
    )
    return rows


def cost_of(settings: Settings, method: Method, window: Tensor, step: float) -> Cost:
    """What a forecast costs one network; averages that are kept from the first step on are not timed."""
    run = settings.run
    if method.source == "averages" or method.method == "last":
        return Cost(step)
    options = dict(method.options)
    stride, average = (1 if method.source == "every_step" else run.look), method.source == "blocks"
    count = method.snapshots or (run.window_steps // stride + (not average))
    if method.source == "every_step":
        options["max_size"] = classifier.QUASI_NODE
    age = (stride - 1) / 2 if average else 0.0
    steps = max(0.0, method.horizon * stride - age)
    repeats = settings.repeats if method.source != "every_step" else 1  # seconds each
    asked = {"method": method.method, "by": partition_of(method), **options}
    seen = window[-(run.window_steps + (not average)) :]
    return Cost(
        step, *jump_seconds(classifier.Classifier(), seen, count, stride, steps, repeats, average=average, **asked)
    )
