"""When to start and when to stop, the paper's first open question: plans from the window alone, and what came."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import matplotlib.figure
import numpy as np
import torch

import koopt
from koopt import metrics, report, system
from koopt.experiments import de_solver, figure2, methods, panels, recording
from koopt.experiments.methods import Method, forecast, loss_of, weights_at
from koopt.experiments.noisy_windows import minibatch_windows, noise_row
from koopt.experiments.recording import TRAIL

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

COLUMNS = {
    "t2": "t2",
    "what": "forecast by",
    "accepted": "offers\nall of T",
    "horizon": "steps\noffered",
    "success": "success",
    "worst_loss": "worst\nloss",
    "teq_over_T": "T_eq/T",
    "teq_over_T_mean": "…\nmean",
    "teq_over_T_error": "…\n± s.e.",
    "error_over_motion": "error/\nmotion",
    "expected_error": "expec-\nted",
    "within": "within\nexpected",
}
NOISE_COLUMNS = {"what": "window", "networks": "net-\nworks", "refused": "refused", "reason": "reason"}
NOISE_COLUMNS |= {"drift_over_noise": "drift/\nnoise"}
TABLES = {"jump": COLUMNS, "sweep": COLUMNS, "noise": NOISE_COLUMNS}  # by the kind of a row
PLAN, OWN, FIXED, LINE = "plan, T wanted", "plan, its own horizon", "fixed rule", "straight line"
LINE_OWN, TRAINED = "straight line, the plan's horizons", "training, the plan's horizons"
LAGS = (1, 2, 3, 4, 6, 9, 13, 19, 28, 42, 63, 94)  # snapshots ahead at which it is seen how far a forecast held
STAGES = 3  # parts of the run that the sweep is summed up in


@dataclass(frozen=True)
class Settings:
    """One study; the constants of ``koopt.horizon`` were chosen on seeds 1000 to 1014.

    Attributes:
        solver: what is trained, and the fixed rule, as in the DE solver's experiment; its first horizon is T.
        every: optimizer steps from one t2 of the sweep to the next.
        window: optimizer steps that a plan is made from, at most; one snapshot every 100 of them.
        tolerance: of the plans.
        networks: small classifiers that are trained on mini-batches.
    """

    solver: methods.Settings = field(default_factory=methods.Settings)
    every: int = 2_500
    window: int = 10_000
    tolerance: float = 0.1
    networks: int = 5

    @property
    def seed(self) -> int:
        return self.solver.seed

    @property
    def nominal(self) -> int:
        return self.solver.horizons[0]

    @property
    def sweep(self) -> list[int]:
        """Each t2 after which there are T more steps."""
        return list(range(self.every, self.solver.steps - self.nominal + 1, self.every))


QUICK = Settings(solver=replace(methods.QUICK, seeds=3), every=5_000, window=5_000, networks=2)


@dataclass(frozen=True)
class Case:
    """One network at one t2: what was offered and what came; horizons in optimizer steps, losses over that at t2."""

    seed: int
    t2: int
    plan: koopt.Plan  # as far as it may be trusted
    wanted: koopt.Plan  # T
    achieved: int  # as far as the plan's forecaster stayed within the tolerance, or the data end
    error: float  # at the offered horizon, or where the data end; NaN if refused
    loss: dict[str, float]  # by forecaster
    errors: dict[str, float]  # by forecaster, Euclidean


def check(settings: Settings) -> None:
    """Refuse settings that cannot be run, before anything is written."""
    de_solver.check(settings.solver)
    for name, value in (("every", settings.every), ("window", settings.window)):
        if value < 1 or value % TRAIL:
            raise ValueError(f"{name} is {value}, expected a multiple of {TRAIL} optimizer steps")
    if settings.window < 2 * settings.solver.tail or settings.every < settings.solver.tail:
        raise ValueError(
            f"window and every are {settings.window} and {settings.every}, expected at least twice and once the "
            f"fixed rule's {settings.solver.tail} optimizer steps"
        )
    if not settings.sweep:
        raise ValueError(f"steps is {settings.solver.steps}, expected room for a t2 of {settings.every} and T after it")
    if settings.networks < 1:
        raise ValueError(f"networks is {settings.networks}, expected at least 1")


def reproduce(
    settings: Settings,
    folder: Path,
    progress: Callable[[str, int, int], None],
    recordings: Path | None = None,
    noisy: Mapping[str, Sequence[Tensor]] | None = None,
) -> list[dict[str, Any]] | None:
    """Train, plan all along the run, compare with what came; writes figures and ``result.json`` to `folder`.

    Args:
        settings: what to run; see :func:`check`.
        folder: where figures and the result go.
        recordings: where those of the DE solver's experiment are, or will be; None: in `folder`.
        progress: called with a stage's name, how much of it is done and its total.
        noisy: label -> windows `(time, state)` of other noisy training, one a network.

    Returns:
        Rows of three kinds: "jump" at t2, "sweep" all along the run, "noise" under mini-batches; None if interrupted.

    Raises:
        ValueError: if a setting is out of range, or earlier recordings are damaged or of other settings.
        OSError: if the folder cannot be written or the disk is too small.

    Source: Dogra & Redman (2020), Section 5: when to start and when to stop.
    """
    check(settings)
    system.require_folder(folder, "--output")
    folder.mkdir(parents=True, exist_ok=True)
    recordings = recordings or folder / "recordings"
    runs = [settings.solver.run(optimizer) for optimizer in settings.solver.optimizers]
    if not recording.record_all(runs, recordings, progress):
        return None
    begun = time.perf_counter()
    with system.one_thread():
        rows, cases = _plan_everywhere(settings, recordings, progress)
        windows = {**minibatch_windows(settings.networks, settings.seed, progress), **(noisy or {})}
        rows += [noise_row(label, several, settings.tolerance) for label, several in windows.items()]
    figures = [_draw_offers(settings, cases, folder), _draw_calibration(settings, cases, folder)]
    seconds = time.perf_counter() - begun
    report.write_result(folder, "horizon", asdict(settings), rows, figures, seconds, findings=findings(rows))
    return rows


def _plan_everywhere(
    settings: Settings, recordings: Path, progress: Callable[[str, int, int], None]
) -> tuple[list[dict[str, Any]], dict[str, list[Case]]]:
    jumps, sweeps, cases = [], [], {}
    places = sorted({*settings.sweep, settings.solver.t2})
    total, done = len(settings.solver.optimizers) * len(places), 0
    for optimizer in settings.solver.optimizers:
        recorded = recording.opened(settings.solver.run(optimizer), recordings)
        found: dict[int, list[Case]] = {}
        for t2 in places:
            progress("plan", done, total)
            found[t2] = [case(settings, recorded, seed, t2) for seed in range(settings.solver.seeds)]
            done += 1
        jumps += _jump_rows(settings, recorded, found[settings.solver.t2])
        cases[optimizer] = [one for t2 in settings.sweep for one in found[t2]]
        sweeps += _sweep_rows(settings, optimizer, cases[optimizer])
    progress("plan", total, total)
    return jumps + sweeps, cases


def case(settings: Settings, recorded: recording.Recording, seed: int, t2: int) -> Case:
    """Plan from the window before t2, and see how far that held."""
    at = t2 // TRAIL
    rows = torch.from_numpy(np.array(recorded.trail[max(0, at - settings.window // TRAIL) :, seed]))
    window, later = rows[: min(at, settings.window // TRAIL) + 1], rows[min(at, settings.window // TRAIL) :]
    plan = koopt.plan(window, tolerance=settings.tolerance)
    if plan.horizon >= len(later):  # what comes later than the data end cannot be checked
        plan = koopt.plan(window, len(later) - 1, settings.tolerance)
    steps, tail = settings.nominal // TRAIL, settings.solver.tail // TRAIL
    wanted = koopt.plan(window, steps, settings.tolerance)
    fixed = koopt.fit(window[-1 - tail :], difference=True, rank=settings.solver.rank)
    horizons = {PLAN: wanted.horizon, OWN: plan.horizon, FIXED: steps, LINE: steps}
    horizons[LINE_OWN] = horizons[TRAINED] = horizons[OWN]
    forecasts = {
        PLAN: wanted.forecast(window),
        OWN: plan.forecast(window),
        FIXED: fixed.forecast(steps),
        LINE: window[-1] + steps * (window[-1] - window[-2]),
        LINE_OWN: window[-1] + horizons[OWN] * (window[-1] - window[-2]),
        TRAINED: later[int(plan.horizon)],
    }
    loss = loss_of(torch.stack([window[-1], *forecasts.values()]))
    errors = {name: _error(state, later, int(horizons[name])) for name, state in forecasts.items()}
    achieved = 0
    for lag in [lag for lag in LAGS if lag < len(later)]:
        if not _error(plan.forecast(window, lag), later, lag) <= settings.tolerance:
            break
        achieved = lag
    return Case(
        seed=seed,
        t2=t2,
        plan=plan,
        wanted=wanted,
        achieved=achieved * TRAIL,
        error=errors[OWN],
        loss=dict(zip(forecasts, (loss[1:] / loss[0]).tolist(), strict=True)),
        errors=errors,
    )


def _error(state: Tensor, later: Tensor, steps: int) -> float:
    """Error over motion, `steps` snapshots after the first of `later`; NaN without a jump."""
    return ((state - later[steps]).norm() / (later[steps] - later[0]).norm()).item() if steps else math.nan


def _jump_rows(settings: Settings, recorded: recording.Recording, cases: list[Case]) -> list[dict[str, Any]]:
    """How the jumps from t2 of the DE solver's experiment did, beside its fixed rule and the straight line."""
    solver, nominal = settings.solver, settings.nominal
    after = torch.from_numpy(np.array(recorded.loss[solver.t2 :]))
    start = weights_at(recorded, solver.t2)
    windows = [_window(settings, recorded, one) for one in cases]
    own = [int(one.plan.horizon) * TRAIL for one in cases]
    rules = {
        FIXED: Method("koopman", "network", "", solver.tail, solver.stride, {"difference": True, "rank": solver.rank}),
        LINE: Method("line", "network", "", TRAIL, TRAIL, {}),
    }
    ways: dict[str, tuple[list[int], Tensor]] = {
        PLAN: (
            [int(one.wanted.horizon) * TRAIL for one in cases],
            torch.stack([one.wanted.forecast(window) for one, window in zip(cases, windows, strict=True)]),
        ),
        OWN: (
            own,
            torch.stack(
                [one.plan.forecast(window, h / TRAIL) for one, window, h in zip(cases, windows, own, strict=True)]
            ),
        ),
        **{
            name: ([nominal] * len(cases), forecast(recorded, rule, [nominal]).weights[nominal])
            for name, rule in rules.items()
        },
        LINE_OWN: (own, torch.stack([w[-1] + h / TRAIL * (w[-1] - w[-2]) for w, h in zip(windows, own, strict=True)])),
    }
    rows = []
    for name, (horizons, weights) in ways.items():
        truth = torch.stack([weights_at(recorded, solver.t2 + h)[i] for i, h in enumerate(horizons)])
        loss = loss_of(weights)
        steps, censored = metrics.equivalent_steps(loss, after)
        shares = steps.double() / nominal
        rows.append(
            _row("jump", recorded.run.optimizer, name, f"{solver.t2:,}", cases, settings)
            | {
                "horizon": float(np.median(horizons)),
                "success": metrics.success(loss, after).double().mean().item(),
                "worst_loss": (loss / after[0]).max().item(),
                "teq_over_T": metrics.median(shares),
                "teq_over_T_mean": shares.mean().item(),
                "teq_over_T_error": (shares.std() / len(cases) ** 0.5).item() if len(cases) > 1 else None,
                "censored": censored.double().mean().item(),
                "error_over_motion": metrics.error_over_motion(weights, start, truth),
            }
        )
    return rows


def _window(settings: Settings, recorded: recording.Recording, one: Case) -> Tensor:
    at = one.t2 // TRAIL
    return torch.from_numpy(np.array(recorded.trail[max(0, at - settings.window // TRAIL) : at + 1, one.seed]))


def _sweep_rows(settings: Settings, optimizer: str, cases: list[Case]) -> list[dict[str, Any]]:
    """The same all along the run, in a few stages; the fixed rule also where the plan accepts T and where not."""
    rows = []
    for part in np.array_split(settings.sweep, min(STAGES, len(settings.sweep))):
        here = [one for one in cases if part[0] <= one.t2 <= part[-1]]
        accepted = [one for one in here if one.wanted.reason == "ok"]
        refused = [one for one in here if one.wanted.reason != "ok"]
        shown = [(PLAN, here), (OWN, here), (FIXED, here), (f"{FIXED}, T accepted", accepted)]
        shown += [(f"{FIXED}, T not accepted", refused), (LINE, here), (LINE_OWN, here)]
        shown.append((TRAINED, here))
        for label, chosen in shown:
            name = FIXED if label.startswith(FIXED) else label
            jumps = [one for one in chosen if name in (FIXED, LINE) or _plan_of(one, name).horizon]
            plans = [_plan_of(one, name) for one in jumps]
            planned = name in (PLAN, OWN)
            rows.append(
                _row("sweep", optimizer, label, f"{part[0]:,} to {part[-1]:,}", chosen, settings)
                | {
                    "jumps": len(jumps),
                    "horizon": _median([TRAIL * plan.horizon for plan in plans])
                    if name not in (FIXED, LINE)
                    else settings.nominal,
                    "success": _mean([one.loss[name] < 1 for one in jumps]),
                    "worst_loss": max((one.loss[name] for one in jumps), default=None),
                    "error_over_motion": _median([one.errors[name] for one in jumps]),
                    "expected_error": _median([plan.expected_error for plan in plans]) if planned else None,
                    "within": _mean(
                        [one.errors[name] <= plan.expected_error for one, plan in zip(jumps, plans, strict=True)]
                    )
                    if planned
                    else None,
                    "within_tolerance": _mean([one.errors[name] <= settings.tolerance for one in jumps]),
                }
            )
    return rows


def _plan_of(one: Case, name: str) -> koopt.Plan:
    return one.wanted if name == PLAN else one.plan


def _row(kind: str, optimizer: str, name: str, t2: str, cases: list[Case], settings: Settings) -> dict[str, Any]:
    planned = name.startswith("plan")
    expected = [_plan_of(one, name) for one in cases] if planned else []
    return {
        "kind": kind,
        "optimizer": optimizer,
        "setting": "recommended" if planned else "baseline",
        "what": name,
        "t2": t2,
        "T": settings.nominal,
        "seeds": settings.solver.seeds,
        "cases": len(cases),
        "accepted": _mean([plan.horizon * TRAIL >= settings.nominal for plan in expected]) if planned else None,
        "refused": _mean([plan.horizon == 0 for plan in expected]) if planned else None,
        "expected_error": _median([plan.expected_error for plan in expected if plan.horizon]) if planned else None,
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if len(values) else None


def tables(
    settings: Settings, rows: Sequence[dict[str, Any]]
) -> list[tuple[str, dict[str, str], list[dict[str, Any]]]]:
    """Title, columns and rows of each table."""
    found = []
    for optimizer in settings.solver.optimizers:
        own = [row for row in rows if row.get("optimizer") == optimizer]
        seeds = f"{optimizer.capitalize()}, T = {settings.nominal:,}, {settings.solver.seeds} seeds"
        found.append((f"{seeds}, one jump", COLUMNS, [row for row in own if row["kind"] == "jump"]))
        found.append((f"{seeds}, all along the run", COLUMNS, [row for row in own if row["kind"] == "sweep"]))
    return [*found, ("Under mini-batches", NOISE_COLUMNS, [row for row in rows if row["kind"] == "noise"])]


def findings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the rows of :func:`reproduce` say, a sentence each."""
    said = []
    for optimizer in dict.fromkeys(row["optimizer"] for row in rows if row["kind"] == "jump"):
        jump = {row["what"]: row for row in rows if row["kind"] == "jump" and row["optimizer"] == optimizer}
        own, wanted, line, fixed = (jump[name] for name in (OWN, PLAN, LINE, FIXED))
        said.append(
            f"{optimizer}, t2 = {own['t2']}: the plan's own horizon has success {own['success']:.2f} and a mean T_eq/T "
            f"of {own['teq_over_T_mean']:.2f}, the straight line {line['success']:.2f} and "
            f"{line['teq_over_T_mean']:.2f} ± {line['teq_over_T_error'] or 0:.2f}; asked for T = {own['T']:,}, the "
            f"plan's median error is {wanted['error_over_motion']:.1g}, the line's {line['error_over_motion']:.1g}, "
            f"the fixed rule's {fixed['error_over_motion']:.1g}; worst loss over that at t2: "
            f"{max(own['worst_loss'], wanted['worst_loss']):.3f}"
        )
        swept = [row for row in rows if row["kind"] == "sweep" and row["optimizer"] == optimizer]
        parts = {}
        for name in (OWN, FIXED, f"{FIXED}, T accepted", f"{FIXED}, T not accepted"):
            of = [row for row in swept if row["what"] == name and row["jumps"]]
            count = sum(row["jumps"] for row in of)
            share = sum(row["success"] * row["jumps"] for row in of) / count if count else 0.0
            parts[name] = f"{share:.3f} of {count}" if count else "none of 0"
        accepted, otherwise = (parts[f"{FIXED}, T {verdict}"] for verdict in ("accepted", "not accepted"))
        said.append(
            f"{optimizer}, all along the run: {parts[OWN]} planned jumps lower the loss; the fixed rule's succeed in "
            f"{accepted} cases where the plan accepts T, and in {otherwise} where it does not"
        )
    said += [
        f"{row['what']}: {row['reason']} of {row['networks']}, drift over noise {row['drift_over_noise']:.2g}"
        for row in rows
        if row["kind"] == "noise"
    ]
    return said


def _draw_offers(settings: Settings, cases: dict[str, list[Case]], folder: Path) -> str:
    figure = matplotlib.figure.Figure(figsize=(max(7, 4 * len(cases)), 3.8), layout="constrained")
    axes = figure.subplots(1, len(cases), squeeze=False, sharey=True)[0]
    for axis, (optimizer, several) in zip(axes, cases.items(), strict=True):
        offered, achieved, failed = (
            np.array([[value(one) for one in several if one.t2 == t2] for t2 in settings.sweep], dtype=float)
            for value in (
                lambda one: TRAIL * one.plan.horizon,
                lambda one: one.achieved if one.t2 + LAGS[-1] * TRAIL <= settings.solver.steps else math.nan,
                lambda one: one.loss[FIXED] >= 1,
            )
        )
        panels.offered_horizons(axis, settings.sweep, offered, achieved, failed.mean(axis=1), settings.nominal)
        axis.set_title(optimizer.capitalize(), loc="left")
        axis.label_outer()
    figure2.one_legend(figure, list(axes))
    return figure2.save(figure, folder, "horizon-offered.png")


def _draw_calibration(settings: Settings, cases: dict[str, list[Case]], folder: Path) -> str:
    figure = matplotlib.figure.Figure(figsize=(6, 4.6), layout="constrained")
    pairs = {
        optimizer.capitalize(): (
            np.array([one.plan.expected_error for one in several if one.plan.horizon]),
            np.array([one.error for one in several if one.plan.horizon]),
        )
        for optimizer, several in cases.items()
    }
    panels.calibration(figure.subplots(), pairs, settings.tolerance)
    return figure2.save(figure, folder, "horizon-calibration.png")
