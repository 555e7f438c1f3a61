"""S7 of the paper: what Koopman operators cost against n, k and q, in both forms, and against training steps."""

from __future__ import annotations

import csv
import itertools
import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import matplotlib.figure
import numpy as np

from koopt import plot, report, system
from koopt.experiments import complexity_rows, figure2, panels, scaling
from koopt.experiments.complexity_rows import QUICK, SIZES, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["COLUMNS", "QUICK", "TABLES", "Settings", "check", "findings", "reproduce"]

COLUMNS = {
    "operator": "operator",
    "form": "form",
    "phase": "phase",
    "against": "against",
    "exponent": "expo-\nnent",
    "low": "95 %\nfrom",
    "high": "\nto",
    "theory": "theory",
    "sizes": "fitted to",
    "too_large": "too large",
}
SAVING_COLUMNS = {
    "operator": "operator",
    "n": "n",
    "m": "weights",
    "k": "k",
    "state_construction_ms": "construc-\ntion, ms",
    "snapshot_construction_ms": "snapshot\nform",
    "saving_construction": "saved",
    "state_iteration_us": "itera-\ntion, us",
    "snapshot_iteration_us": "snapshot\nform",
    "saving_iteration": "saved",
    "saving": "saved\nin all",
    "saving_memory": "memory\nsaved",
}
PAYS_COLUMNS = {
    "operator": "operator",
    "form": "form",
    "n": "n",
    "j": "j",
    "step_us": "training\nstep, us",
    "iteration_us": "itera-\ntion, us",
    "gain_iteration_theory": "gain,\ntheory",
    "gain_iteration": "gain",
    "gain_theory": "… with con-\nstr., theory",
    "gain": "… with\nconstr.",
    "gain_at_once": "T steps\nat once",
}
TABLES = {"exponent": COLUMNS, "saving": SAVING_COLUMNS, "pays": PAYS_COLUMNS}  # by the kind of a row


def check(settings: Settings) -> None:
    """Refuse settings that cannot be run, before anything is written."""
    system.require_seeds(settings.seed)
    most = min(len(sizes) for *_, sizes in SIZES.values())
    if not 3 <= settings.fitted <= settings.points <= most:
        raise ValueError(
            f"fitted and points are {settings.fitted} and {settings.points}, expected 3 <= fitted <= points <= {most}"
        )
    for name, least in {"layers": 1, "window": 3, "piece": 1, "horizon": 1, "repeats": 1}.items():
        if getattr(settings, name) < least:
            raise ValueError(f"{name} is {getattr(settings, name)}, expected at least {least}")
    if not settings.limit > 0:
        raise ValueError(f"limit is {settings.limit}, expected a positive number of seconds")
    for name in ("widths", "batches"):
        sizes = getattr(settings, name)
        if not sizes or min(sizes) < 1 or sorted(set(sizes)) != list(sizes):
            raise ValueError(f"{name} are {sizes}, expected positive numbers, small to large, each once")
    if wrong := [n for n in settings.widths if n % settings.piece]:
        raise ValueError(f"piece is {settings.piece}, expected a divisor of every width; it does not divide {wrong[0]}")


def reproduce(settings: Settings, folder: Path, progress: Callable[[str, int, int], None]) -> list[dict[str, Any]]:
    """Time, fit, draw; writes figures, ``times.csv`` and ``result.json`` to `folder`.

    Args:
        settings: what to run; see :func:`check`.
        folder: where figures and the result go.
        progress: called with a stage's name, how much of it is done and its total.

    Returns:
        Rows of three kinds: "exponent"; "saving", what the snapshot form saves; "pays", operators against training
        steps. ``TABLES`` has the columns of each.

    Raises:
        ValueError: if a setting is out of range.
        OSError: if the folder cannot be written.

    Source: Dogra & Redman (2020), S7; the theory is derived in ``scaling.operations``.
    """
    check(settings)
    system.require_folder(folder, "--output")
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    with system.one_thread():
        timed = complexity_rows.time_sweeps(settings, progress)
        saved = complexity_rows.save_rows(settings, progress)
        paid = complexity_rows.pay_rows(settings, progress)
    fitted = complexity_rows.fit_exponents(settings, timed)
    rows = [*fitted, *saved, *paid]
    _write_times(timed, folder)
    figures = [_draw_scaling(fitted, timed, folder), _draw_pays(settings, paid, folder)]
    seconds = time.perf_counter() - begun
    report.write_result(folder, "complexity", asdict(settings), rows, figures, seconds, findings=findings(rows))
    return rows


def tables(
    settings: Settings, rows: Sequence[dict[str, Any]]
) -> list[tuple[str, dict[str, str], list[dict[str, Any]]]]:
    """Title, columns and rows of each table."""
    titles = {
        "exponent": f"Exponents, fitted to the {settings.fitted} largest sizes",
        "saving": f"What the snapshot form saves, T = {settings.horizon:,}",
        "pays": f"Against training steps, T = {settings.horizon:,}",
    }
    return [(titles[kind], columns, select(rows, kind=kind)) for kind, columns in TABLES.items()]


def select(rows: Sequence[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def findings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the rows of :func:`reproduce` say, a sentence each."""
    return [*_of_exponents(rows), *_of_savings(rows), *_of_training(rows)]


def _of_exponents(rows: Sequence[dict[str, Any]]) -> list[str]:
    fitted = [row for row in select(rows, kind="exponent") if row["exponent"] is not None]
    if not fitted:
        return []
    within = sum(row["low"] <= row["theory"] <= row["high"] for row in fitted)
    near = sum(abs(row["exponent"] - row["theory"]) <= 0.5 for row in fitted)
    far = max(fitted, key=lambda row: abs(row["exponent"] - row["theory"]))
    said = [
        f"{near} of {len(fitted)} exponents are within 0.5 of the theory's, {within} with the theory's inside the "
        f"95 % interval; the furthest is {far['exponent']:.1f} where theory has {far['theory']} "
        f"({far['operator']}, {far['form']} form, {far['phase']} against {far['against']})"
    ]
    for operator in ("layer", "network"):
        square = select(fitted, operator=operator, against="N = n", phase="construction")
        grown = {row["form"]: row for row in square}
        if len(grown) == 2:
            state, snapshot = grown["state"], grown["snapshot"]
            said.append(
                f"as many layers as nodes in one, windows that grow with the patch: {operator} operators in state form "
                f"take n^{state['exponent']:.1f} to construct (theory n^{state['theory']}); in snapshot form, with a "
                f"fixed window, n^{snapshot['exponent']:.1f} (theory n^{snapshot['theory']})"
            )
    return said


def _of_savings(rows: Sequence[dict[str, Any]]) -> list[str]:
    said = []
    for operator in ("node", "quasi-node", "layer", "network"):
        known = [row for row in select(rows, kind="saving", operator=operator) if row["saving"] is not None]
        if known:
            row = known[-1]
            said.append(
                f"{operator} operators, n = {row['n']}, m = {row['m']:,} weights, {row['k']} snapshots: state over "
                f"snapshot form is {row['saving_construction']:.3g} in construction, {row['saving_iteration']:.3g} in "
                f"an iteration, {row['saving']:.3g} for a jump of {row['T']:,} steps (step by step against at once)"
            )
    return said


def _of_training(rows: Sequence[dict[str, Any]]) -> list[str]:
    said = []
    for operator, form in dict.fromkeys((row["operator"], row["form"]) for row in select(rows, kind="pays")):
        listed = select(rows, kind="pays", operator=operator, form=form)
        known = [row for row in listed if row["gain"] is not None]
        if not known:
            continue
        parts = []
        for key, name in {
            "gain_iteration": "per iteration",
            "gain": f"with construction, T = {known[0]['T']:,}",
        }.items():
            expected = sum(row[f"{key}_theory"] > 1 for row in known)
            found = sum(row[key] > 1 for row in known)
            beyond = sum(row[key] > 1 >= row[f"{key}_theory"] for row in known)
            short = sum(row[f"{key}_theory"] > 1 >= row[key] for row in known)
            parts.append(
                f"{name}: pays in {found} where the inequality says {expected} ({beyond} beyond, {short} short of it)"
            )
        parts.append(f"all steps at once: {sum(row['gain_at_once'] > 1 for row in known)}")
        left = f", {len(listed) - len(known)} more were too large" if len(known) < len(listed) else ""
        said.append(f"{operator} operators, {form} form, {len(known)} pairs of n and j{left}: {'; '.join(parts)}")
    return said


def _write_times(timed: Sequence[dict[str, Any]], folder: Path) -> None:
    """What the exponents were fitted to; no time where a size was too large."""
    temporary = folder / ".times.csv"
    with temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, timed[0])
        table.writeheader()
        table.writerows(timed)
    os.replace(temporary, folder / "times.csv")


def _draw_scaling(fitted: Sequence[dict[str, Any]], timed: Sequence[dict[str, Any]], folder: Path) -> str:
    """Time against n, a panel for each phase and form; returns the file's name."""
    figure = matplotlib.figure.Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    for ax, (phase, form) in zip(axes.flat, itertools.product(scaling.PHASES, scaling.FORMS), strict=True):
        curves = {}
        for fit in select(fitted, phase=phase, form=form, against="n"):
            listed = select(timed, phase=phase, form=form, against="n", operator=fit["operator"])
            taken = [np.nan if row["seconds"] is None else row["seconds"] for row in listed]
            sizes = np.array([row["size"] for row in listed])
            curves[fit["operator"]] = sizes, np.array(taken), fit["exponent"], fit["theory"]
        panels.scaling(ax, curves, colors=[plot.COLORS[scaling.OPERATORS.index(operator)] for operator in curves])
        ax.set(xlabel="n, nodes in a layer", ylabel=f"{phase}, seconds")
        ax.set_title(f"{phase.capitalize()}, {form} form", loc="left")
        ax.label_outer()
    for ax in axes[:, 0]:
        low, high = ax.get_ylim()
        ax.set_ylim(low * (low / high) ** 0.35, high)  # room for the legends
    return figure2.save(figure, folder, "complexity-scaling.png")


PANELS = (  # operator, form, which gain, the gain in theory
    ("node", "state", "gain_iteration", "gain_iteration_theory", "one iteration"),
    ("node", "state", "gain", "gain_theory", "construction and T = {T:,} iterations"),
    ("quasi-node", "state", "gain", "gain_theory", "construction and T = {T:,} iterations"),
    ("network", "snapshot", "gain_at_once", "gain_theory", "construction and T = {T:,} at once"),
)


def _draw_pays(settings: Settings, paid: Sequence[dict[str, Any]], folder: Path) -> str:
    """Where Koopman pays against n and j; returns the file's name."""
    figure = matplotlib.figure.Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    shape = len(settings.widths), len(settings.batches)
    for ax, (operator, form, key, theory, what) in zip(axes.flat, PANELS, strict=True):
        listed = select(paid, operator=operator, form=form)
        gain, expected = (
            np.array([np.nan if row[name] is None else row[name] for row in listed]).reshape(shape)
            for name in (key, theory)
        )
        panels.gains(ax, settings.widths, settings.batches, gain, expected)
        ax.set(xlabel="j, batch size", ylabel="n, nodes in a layer")
        ax.set_title(f"{operator.capitalize()}, {form} form:\n{what.format(T=settings.horizon)}", loc="left")
        ax.label_outer()
    figure.suptitle(
        "Time of training steps over time of Koopman operators; line: the edge of where theory has it above 1"
    )
    return figure2.save(figure, folder, "complexity-pays.png")
