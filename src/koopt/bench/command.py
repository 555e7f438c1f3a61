"""``koopt bench``: runs tasks, and writes figures and result.json of each and of all."""

from __future__ import annotations

import math
import textwrap
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from koopt import plot, report, system
from koopt.bench import figures, protocol, results, statistics
from koopt.bench.run import Curve
from koopt.bench.trials import Trials

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from koopt.bench.method import Observer, Trainer
    from koopt.bench.protocol import Outcome, Progress, Settings
    from koopt.bench.task import Task

POINTS = 400  # of a drawn curve


def settings(
    methods: tuple[str, ...] | None,
    seeds: int | None,
    seed: int,
    quick: bool,
    jobs: int | None,
    frozen: bool,
    decays: tuple[float, ...] | None = None,
) -> Settings:
    """As the command line gives them."""
    count = seeds if seeds is not None else 2 if quick else 10
    return protocol.Settings(methods, count, seed, quick, jobs, frozen, decays)


def bench_named(
    name: str, settings: Settings, folder: Path, progress: Progress
) -> tuple[list[dict[str, Any]], list[str]]:
    """:func:`bench` the task of this name, or all of them, each in a folder of its own.

    Returns:
        Rows of all tasks, and a line for each that failed.

    Raises:
        ValueError: if there is no such task, or for bad settings.
    """
    from koopt.bench.methods import METHODS
    from koopt.bench.tasks import QUICK, TASKS

    known = QUICK if settings.quick else TASKS
    if name != "all" and name not in known:
        raise ValueError(f"TASK is {name!r}, expected {', '.join(known)} or all")
    if name != "all":
        return bench(settings, known[name], METHODS, folder, progress)
    protocol.check(settings, list(known.values()), METHODS)
    system.require_folder(folder, "--output")
    rows, failures, findings = [], [], []
    for task in known.values():
        try:
            own = replace(settings, methods=protocol.serving(settings, METHODS, task))
            found, failed = bench(own, task, METHODS, folder / task.name, progress)
            rows, failures = [*rows, *found], [*failures, *failed]
            findings += report.findings(folder / task.name)
        except (ValueError, OSError) as error:
            failures.append(f"{task.name}: {error}")
            continue
        write_all(settings, rows, findings, folder)  # after each, for those who look
    return rows, failures


def bench(
    settings: Settings,
    task: Task,
    methods: Mapping[str, Trainer | Observer],
    folder: Path,
    progress: Progress = lambda *_: None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Compare methods on one task, or go on where it was stopped.

    Args:
        settings: what is compared.
        task: on what.
        methods: all that there are, by name.
        folder: where trials, figures and result.json go.
        progress: called with a stage, the runs done and those in all.

    Returns:
        The rows of result.json, and a line for each method that failed.

    Raises:
        ValueError: for bad settings, before anything is written, or if the baseline has no trials.
        OSError: if a process is killed, or the disk fails.
    """
    protocol.check(settings, [task], methods)
    system.require_folder(folder, "--output")
    begin = time.perf_counter()
    trials = Trials(task, folder, settings.jobs, settings.frozen)
    outcome = protocol.conduct(settings, task, methods, trials, progress)
    rows = results.rows(outcome)
    if not rows:
        why = next(iter(outcome.failed.values()), f"{folder / 'trials'} holds no trials of the baseline")
        raise ValueError(f"nothing to report: {why}")
    drawn = _draw(outcome, folder) if outcome.targets else []
    titles = {name: method.title for name, method in methods.items()}
    (folder / "targets.md").write_text(results.markdown(rows, titles))
    about = asdict(settings) | {"tuning_seeds": protocol.tuning_seeds(settings.quick), "shares": protocol.SHARES}
    about |= {"task": task.name, "steps": task.steps, "looks": task.looks, "full_batch": task.full_batch}
    seconds = time.perf_counter() - begin
    findings = results.findings(outcome, settings.seeds)
    report.write_result(folder, f"bench {task.name}", about, rows, drawn, seconds, findings)
    return rows, list(outcome.failed.values())


def write_all(settings: Settings, rows: Sequence[dict[str, Any]], findings: Sequence[str], folder: Path) -> None:
    """What several tasks say together: one result.json and performance profiles."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {"all tasks": rows}
    kinds |= {"full-batch tasks": [row for row in rows if row.get("measure") == "cost"]}
    kinds |= {"noisy tasks": [row for row in rows if row.get("measure") == "steps"]}
    profiles = {kind: profile_of(some) for kind, some in kinds.items()}
    names = [_draw_profile(kind, ratios, folder) for kind, ratios in profiles.items() if ratios]
    report.write_result(folder, "bench all", asdict(settings), rows, names, findings=findings)


def profile_of(rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Ratios to the best method, a problem for each target of each task, of the methods that serve all tasks."""
    targets = [row for row in rows if row["table"] == "targets"]
    problems = list(dict.fromkeys((row["task"], row["target"]) for row in targets))
    costs: dict[str, dict[Any, float]] = {}
    for row in targets:
        costs.setdefault(row["method"], {})[row["task"], row["target"]] = row[f"{row['measure']}_share"]
    everywhere = {method: found for method, found in costs.items() if len(found) == len(problems)}
    return statistics.profile({m: [found[p] for p in problems] for m, found in everywhere.items()}) if problems else {}


def _draw(outcome: Outcome, folder: Path) -> list[str]:
    return [_draw_curves(outcome, folder), _draw_shares(outcome, folder)]


def _draw_curves(outcome: Outcome, folder: Path) -> str:
    from matplotlib.figure import Figure

    measure = results.measure_of(outcome)
    along = np.linspace(0, outcome.task.steps, POINTS + 1)
    losses = {
        method: np.stack([_at(record.curve, measure, along) for record in records.values()])
        for method, records in outcome.records.items()
    }
    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    ax = figures.loss_curves(figure.subplots(), along, losses, outcome.targets, _unit(measure))
    seeds = max(len(records) for records in outcome.records.values())
    ax.set_title(textwrap.fill(f"{outcome.task.about}, {seeds} seeds", 60), loc="left", fontsize=11)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    return _save(figure, folder, "loss.png")


def _draw_shares(outcome: Outcome, folder: Path) -> str:
    from matplotlib.figure import Figure

    measure = results.measure_of(outcome)
    found = {
        method: [
            statistics.median_interval(list(results.shares(outcome, method, target, measure).values()))
            for target in outcome.targets
        ]
        for method in outcome.records
    }
    names = [f"loss of the tuned optimizer at {share:.0%}" for share in protocol.SHARES]
    figure = Figure(figsize=(8.4, 1.6 + 0.36 * len(found)), layout="constrained")
    unit = f"share of the tuned optimizer's {measure}"
    ax = figures.target_shares(figure.subplots(), found, names, unit)
    ax.set_title(outcome.task.about, loc="left", fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return _save(figure, folder, "targets.png")


def _draw_profile(kind: str, ratios: dict[str, np.ndarray], folder: Path) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    ax = figures.performance_profile(figure.subplots(), ratios)
    ax.set_title(f"{kind}: {len(next(iter(ratios.values())))} targets", loc="left", fontsize=11)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    return _save(figure, folder, f"profile-{kind.replace(' ', '-')}.png")


def _at(curve: Curve, measure: str, along: np.ndarray) -> np.ndarray:
    places, loss = getattr(curve, measure), curve.loss
    found = np.interp(along, places, np.where(np.isfinite(loss), loss, np.nan))
    return np.where(along > places[-1], math.nan, found)


def _unit(measure: str) -> str:
    return "optimizer steps" if measure == "steps" else "cost: closure calls, guard evaluations a third each"


def _save(figure: Any, folder: Path, name: str) -> str:
    plot.save(figure, folder / name)
    return name
