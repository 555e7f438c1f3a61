"""The measurements of S7: operators against n, k and q, in both forms, and against training steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from koopt.experiments import scaling
from koopt.experiments.scaling import Case

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from koopt.experiments.scaling import Built

SIZES = {  # (operator, form, against): width, window, piece, and the sizes of what varies, small to large
    ("weight", "state", "n"): (0, 16, 1, (24, 32, 48, 64, 96, 128, 192)),
    ("node", "state", "n"): (0, 128, 1, (12, 16, 24, 32, 48, 64, 96)),
    ("quasi-node", "state", "n"): (0, 32, 16, (16, 32, 48, 64, 80, 96, 128)),
    ("layer", "state", "n"): (0, 640, 1, (6, 8, 10, 12, 16, 20, 24)),
    ("network", "state", "n"): (0, 640, 1, (4, 5, 6, 8, 10, 12, 14)),
    ("weight", "state", "k"): (32, 0, 1, (32, 64, 128, 256, 512, 1024, 2048)),
    ("node", "state", "k"): (16, 0, 1, (64, 128, 256, 512, 1024, 2048, 4096)),
    ("quasi-node", "state", "k"): (32, 0, 16, (32, 64, 128, 256, 512, 1024, 2048)),
    ("layer", "state", "k"): (8, 0, 1, (128, 256, 512, 1024, 2048, 4096, 8192)),
    ("network", "state", "k"): (6, 0, 1, (128, 256, 512, 1024, 2048, 4096, 8192)),
    ("quasi-node", "state", "q"): (96, 128, 0, (4, 6, 8, 12, 16, 24, 48)),
    ("weight", "state", "N = n"): (0, 0, 1, (12, 16, 20, 24, 32, 40, 48)),
    ("node", "state", "N = n"): (0, 0, 1, (12, 16, 20, 24, 32, 40, 48)),
    ("quasi-node", "state", "N = n"): (0, 0, 8, (16, 24, 32, 40, 48, 56, 64)),
    ("layer", "state", "N = n"): (0, 0, 1, (8, 10, 12, 14, 16, 20, 24)),
    ("network", "state", "N = n"): (0, 0, 1, (5, 6, 7, 8, 9, 10, 12)),
    ("node", "snapshot", "n"): (0, 16, 1, (96, 128, 192, 256, 384, 512, 640)),
    ("quasi-node", "snapshot", "n"): (0, 8, 32, (32, 64, 96, 128, 160, 192, 256)),
    ("layer", "snapshot", "n"): (0, 16, 1, (64, 96, 128, 192, 256, 384, 512)),
    ("network", "snapshot", "n"): (0, 16, 1, (64, 96, 128, 192, 256, 384, 512)),
    ("node", "snapshot", "k"): (128, 0, 1, (8, 12, 16, 24, 32, 48, 64)),
    ("quasi-node", "snapshot", "k"): (96, 0, 48, (4, 8, 12, 16, 20, 24, 32)),
    ("layer", "snapshot", "k"): (64, 0, 1, (48, 64, 96, 128, 192, 256, 320)),
    ("network", "snapshot", "k"): (64, 0, 1, (48, 64, 96, 128, 192, 256, 320)),
    ("quasi-node", "snapshot", "q"): (384, 8, 0, (24, 32, 48, 64, 96, 128, 192)),
    ("node", "snapshot", "N = n"): (0, 16, 1, (24, 32, 40, 48, 64, 80, 96)),
    ("quasi-node", "snapshot", "N = n"): (0, 8, 8, (16, 24, 32, 40, 48, 56, 64)),
    ("layer", "snapshot", "N = n"): (0, 16, 1, (16, 24, 32, 40, 48, 64, 80)),
    ("network", "snapshot", "N = n"): (0, 16, 1, (16, 24, 32, 40, 48, 64, 80)),
}
MOST_BYTES = 2**30  # of the matrices U; more are not tried


@dataclass(frozen=True)
class Settings:
    """One reproduction.

    Attributes:
        seed: of the trajectories and of the network that is trained.
        points: how many of the ``SIZES`` of each sweep are timed, from the smallest.
        fitted: how many of these the exponent is fitted to, from the largest.
        layers: the paper's N, but where N = n.
        window: snapshots of the windows in which both forms are compared, and of the snapshot form.
        piece: weights of a quasi-node where operators are compared with training.
        widths: the paper's n, where the forms are compared, and operators with training.
        batches: batch sizes of the training step, the paper's j.
        horizon: steps to forecast, the paper's T.
        repeats: how often everything is timed.
        limit: seconds; a call that is expected to take longer is left out, and marked as too large.
    """

    seed: int = 0
    points: int = 7
    fitted: int = 5
    layers: int = 3
    window: int = 16
    piece: int = 16
    widths: tuple[int, ...] = (16, 32, 64, 128)
    batches: tuple[int, ...] = (16, 64, 256, 1024)
    horizon: int = 1_000
    repeats: int = 7
    limit: float = 4.0


QUICK = Settings(points=4, fitted=4, widths=(16, 32, 64), batches=(16, 64, 256), repeats=2, limit=0.4)


def sweep(settings: Settings, operator: str, form: str, against: str) -> list[tuple[int, Case]]:
    """The sizes of a sweep and the cases they make."""
    width, window, piece, sizes = SIZES[operator, form, against]
    fixed = Case(operator, form, settings.layers, width, window, piece)
    varied = {"n": ("width",), "k": ("window",), "q": ("piece",), "N = n": ("layers", "width")}[against]
    cases = [replace(fixed, **dict.fromkeys(varied, size)) for size in sizes[: settings.points]]
    # without a window: as many pairs of snapshots as a patch has weights, the fewest that determine its operator
    return list(zip(sizes, [c if c.window else replace(c, window=c.state + 1) for c in cases], strict=False))


def time_sweeps(settings: Settings, progress: Callable[[str, int, int], None]) -> list[dict[str, Any]]:
    """The seconds of each size and phase; None for what is too large."""
    rows = []
    total, done = len(SIZES) * settings.points, 0
    for operator, form, against in SIZES:
        budget = Budget(settings.limit)
        for size, case in sweep(settings, operator, form, against):
            progress("operators", done, total)
            done += 1
            found = measure(settings, case, budget)
            line = {"operator": operator, "form": form, "against": against, "size": size, **_of(case)}
            rows += [line | {"phase": phase, "seconds": found.get(phase)} for phase in scaling.PHASES]
    progress("operators", total, total)
    return rows


class Budget:
    """Tells from the construction before whether the next, larger one is within the limit."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.rate = 0.0  # seconds per operation

    def allows(self, case: Case) -> bool:
        held = 8 * case.patches * case.state**2 if case.form == "state" else 0
        return held <= MOST_BYTES and self.rate * scaling.operations(case, "construction") <= self.limit

    def took(self, case: Case, seconds: float) -> None:
        self.rate = seconds / scaling.operations(case, "construction")


def measure(
    settings: Settings, case: Case, budget: Budget, horizon: int | None = None, dtype: torch.dtype = torch.float64
) -> dict[str, float]:
    """Seconds of "construction", "iteration" (in `dtype`), and a `horizon` "at_once"; empty if too large."""
    if not budget.allows(case):
        return {}
    snapshots = scaling.trajectories(case, settings.seed)
    built: list[Built] = []

    def construct() -> None:
        built[:] = [scaling.build(case, snapshots)]

    construction = scaling.seconds(construct, settings.repeats, settings.limit)
    budget.took(case, construction)
    operator, matrix, start = built[0].operator, built[0].matrix.to(dtype), built[0].start.to(dtype)
    iteration = scaling.seconds(lambda: scaling.iterate(matrix, start), settings.repeats, settings.limit)
    found = {"construction": construction, "iteration": iteration}
    if horizon is not None:
        found["at_once"] = scaling.seconds(lambda: operator.forecast(horizon), settings.repeats, settings.limit)
    return found


def fit_exponents(settings: Settings, timed: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row of kind "exponent" for each sweep and phase, fitted to the largest sizes that were timed."""
    rows = []
    for phase in scaling.PHASES:
        for operator, form, against in SIZES:
            wanted = {"operator": operator, "form": form, "against": against, "phase": phase}
            listed = [row for row in timed if all(row[key] == value for key, value in wanted.items())]
            points = [(row["size"], row["seconds"]) for row in listed if row["seconds"] is not None]
            left_out = [str(row["size"]) for row in listed if row["seconds"] is None]
            points = points[-settings.fitted :]
            slope = low = high = None
            if len(points) >= 3:
                slope, low, high = scaling.exponent(*zip(*points, strict=True))
            theory = scaling.theory(sweep(settings, operator, form, against)[0][1], phase, against)
            rows.append(
                {"kind": "exponent", **wanted, "exponent": slope, "low": low, "high": high, "theory": theory}
                | {"points": len(points), "sizes": f"{points[0][0]} to {points[-1][0]}" if points else None}
                | {"too_large": ", ".join(left_out) or None}
            )
    return rows


def save_rows(settings: Settings, progress: Callable[[str, int, int], None]) -> list[dict[str, Any]]:
    """Rows of kind "saving": state form over snapshot form, of the same patches and the same short window."""
    rows = []
    operators = scaling.OPERATORS[1:]  # a single weight has one coordinate in either form
    total, done = len(operators) * len(settings.widths), 0
    for operator in operators:
        budgets = {form: Budget(settings.limit) for form in scaling.FORMS}
        for n in settings.widths:
            progress("both forms", done, total)
            done += 1
            cases = {f: Case(operator, f, settings.layers, n, settings.window, settings.piece) for f in budgets}
            found = {form: measure(settings, case, budgets[form], settings.horizon) for form, case in cases.items()}
            m, k = cases["state"].state, settings.window
            rows.append(
                {"kind": "saving", "operator": operator, **_of(cases["state"]), "T": settings.horizon}
                | _in_units(found["state"], "state_")
                | _in_units(found["snapshot"], "snapshot_")
                | _saved(found["state"], found["snapshot"], settings.horizon)
                | {"saving_memory": m**2 / (m * k + (k - 1) ** 2)}  # U against window and transition
            )
    progress("both forms", total, total)
    return rows


def _saved(state: dict[str, float], snapshot: dict[str, float], horizon: int) -> dict[str, float | None]:
    """Ratios of times; "saving" is the whole jump: U applied step by step against the snapshot form at once."""
    if not state or not snapshot:
        return dict.fromkeys(("saving_construction", "saving_iteration", "saving"))
    by_steps = state["construction"] + horizon * state["iteration"]
    return {
        **{f"saving_{phase}": state[phase] / snapshot[phase] for phase in scaling.PHASES},
        "saving": by_steps / (snapshot["construction"] + snapshot["at_once"]),
    }


COMPARED = (  # with training
    *((operator, "state") for operator in scaling.OPERATORS),
    *((operator, "snapshot") for operator in ("layer", "network")),
)


def pay_rows(settings: Settings, progress: Callable[[str, int, int], None]) -> list[dict[str, Any]]:
    """Rows of kind "pays": T training steps over a construction and T iterations, as counted and as measured.

    A step at batch size j counts j N n^2, so that one iteration of patches of m weights pays where m < j, and with
    the construction where m (1 + k/T) < j. The window is twice as long as a patch is large in state form,
    ``settings.window`` snapshots in snapshot form. Iterations and training steps are taken in float32, the
    construction in float64, as koopt does it; recording the window is not counted.
    """
    rows = []
    total, done = len(settings.widths) * (len(settings.batches) + len(COMPARED)), 0
    steps = {}
    for n in settings.widths:
        for j in settings.batches:
            progress("training steps", done, total)
            done += 1
            steps[n, j] = step_seconds(settings, n, j)
    for operator, form in COMPARED:
        budget = Budget(settings.limit)
        for n in settings.widths:
            progress("training steps", done, total)
            done += 1
            case = Case(operator, form, settings.layers, n, settings.window, settings.piece)
            if form == "state":
                case = replace(case, window=2 * case.state)
            found = measure(settings, case, budget, settings.horizon, torch.float32)
            rows += [
                {"kind": "pays", "operator": operator, "form": form, **_of(case), "j": j, "T": settings.horizon}
                | {"step_us": 1e6 * steps[n, j], **_in_units(found)}
                | _gains(case, j, settings.horizon, steps[n, j], found)
                for j in settings.batches
            ]
    progress("training steps", total, total)
    return rows


def _gains(case: Case, batch: int, horizon: int, step: float, found: dict[str, float]) -> dict[str, float | None]:
    """Training over Koopman, larger than 1 where Koopman pays, and the T from which it pays; None where it never does.

    "at once" is the whole horizon by repeated squaring, where "gain" takes it step by step.
    """
    counted = {phase: scaling.operations(case, phase) for phase in scaling.PHASES}
    in_theory = _gain(batch * case.layers * case.width**2, horizon, **counted)
    gains = {f"{key}_theory": value for key, value in in_theory.items()}
    if not found:
        return gains | dict.fromkeys((*in_theory, "gain_at_once"))
    at_once = horizon * step / (found["construction"] + found["at_once"])
    measured = _gain(step, horizon, found["construction"], found["iteration"])
    return gains | measured | {"gain_at_once": at_once}


def _gain(step: float, horizon: int, construction: float, iteration: float) -> dict[str, float | None]:
    return {
        "gain_iteration": step / iteration,
        "gain": horizon * step / (construction + horizon * iteration),
        "pays_from_T": construction / (step - iteration) if step > iteration else None,
    }


def step_seconds(settings: Settings, width: int, batch: int) -> float:
    """One step of SGD on the network, float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        layers = [nn.Linear(width, width, bias=False) for _ in range(settings.layers)]
        inputs, targets = torch.randn(2, batch, width)
    network = nn.Sequential(*[part for layer in layers[:-1] for part in (layer, nn.ReLU())], layers[-1])
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(network(inputs), targets).backward()
        optimizer.step()

    return scaling.seconds(step, settings.repeats, settings.limit)


def _of(case: Case) -> dict[str, int | None]:
    """The paper's letters; m is the weights of a patch."""
    sizes = {"N": case.layers, "n": case.width, "k": case.window, "m": case.state, "patches": case.patches}
    return sizes | {"q": case.piece if case.operator == "quasi-node" else None}


def _in_units(found: dict[str, float], prefix: str = "") -> dict[str, float | None]:
    units = {"construction": ("ms", 1e3), "iteration": ("us", 1e6), "at_once": ("ms", 1e3)}
    return {
        f"{prefix}{phase}_{unit}": found[phase] * times if found else None for phase, (unit, times) in units.items()
    }
