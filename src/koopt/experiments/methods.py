"""The DE solver's settings, the ways to forecast from its windows, and their forecasts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import koopt
from koopt import linalg, metrics
from koopt.experiments import oscillator, recording
from koopt.forecasters import METHODS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

OPTIMIZERS = tuple(recording.OPTIMIZERS)


@dataclass(frozen=True)
class Settings:
    """One reproduction.

    Attributes:
        optimizers: which to train.
        seeds, seed, steps, t1, t2: as in ``recording.Run``.
        horizons: the T of the paper, in optimizer steps after t2.
        tail: optimizer steps of the window that the recommended setting looks at.
        stride: optimizer steps from one of its snapshots to the next.
        rank: its rank; chosen, like `tail` and `stride`, on other seeds (benchmarks/de_solver_settings.py).
        repeats: how often each jump is timed.
    """

    optimizers: tuple[str, ...] = OPTIMIZERS
    seeds: int = 25
    seed: int = 0
    steps: int = 60_000
    t1: int = 35_000
    t2: int = 45_000
    horizons: tuple[int, ...] = (2_500, 15_000)
    tail: int = 2_500
    stride: int = 250
    rank: int = 6
    repeats: int = 21

    def run(self, optimizer: str) -> recording.Run:
        return recording.Run(optimizer, self.seeds, self.seed, self.steps, self.t1, self.t2)


QUICK = Settings(seeds=5, steps=30_000, t1=17_500, t2=22_500, horizons=(1_200, 7_500), tail=1_200, stride=120)


@dataclass(frozen=True, eq=False)
class Method:
    """One way to forecast: how the window is prepared and what is fitted to it.

    Attributes:
        method, by, setting: as they stand in a row of the result.
        tail: optimizer steps of the window, back from t2.
        stride: optimizer steps from snapshot to snapshot.
        options: of the method.
    """

    method: str
    by: str
    setting: str
    tail: int
    stride: int
    options: dict[str, Any]


def methods(settings: Settings) -> list[Method]:
    """The rows of the table, in order."""
    whole = settings.t2 - settings.t1
    return [
        *(Method("koopman", by, "paper", whole, 1, {}) for by in ("weight", "node", "layer", "network")),
        Method(
            "koopman",
            "network",
            "recommended",
            settings.tail,
            settings.stride,
            {"difference": True, "rank": settings.rank},
        ),
        Method("line", "network", "baseline", 100, 100, {}),
    ]


@dataclass(frozen=True)
class Forecast:
    """What one method made of every seed's window.

    Attributes:
        weights: horizon -> `(seeds, weights)`.
        residual: `(seeds,)` median over patches, or None.
        eigenvalues: all of all seeds, `(eigenvalues,)` complex128, or None.
        modulus: `(seeds,)` largest modulus, or None.
    """

    weights: dict[int, Tensor]
    residual: Tensor | None = None
    eigenvalues: Tensor | None = None
    modulus: Tensor | None = None


def forecast(recorded: recording.Recording, method: Method, horizons: Sequence[int]) -> Forecast:
    """Forecast every seed's weights at every horizon from its window, as ``Trajectory.forecast`` would."""
    windows = recorded.window[-1 - method.tail :: method.stride]
    parts = koopt.partition(oscillator.Oscillator(), method.by)
    weights: dict[int, list[Tensor]] = {horizon: [] for horizon in horizons}
    residuals, eigenvalues, moduli = [], [], []
    for seed in range(recorded.run.seeds):
        window = torch.from_numpy(np.ascontiguousarray(windows[:, seed]))
        if method.method != "koopman":
            for horizon, found in weights.items():
                coefficients = METHODS[method.method](window, horizon / method.stride, **method.options)
                found.append(linalg.combine(coefficients, window))
            continue
        operators = [koopt.fit(patches.transpose(0, 1), **method.options) for patches in parts.gather_flat(window)]
        for horizon, found in weights.items():
            found.append(parts.scatter_flat([op.forecast(horizon / method.stride) for op in operators]))
        residuals.append(torch.cat([op.residual.reshape(-1) for op in operators]).median())
        spectrum = torch.cat([op.eigenvalues.reshape(-1) for op in operators])
        eigenvalues.append(spectrum)
        moduli.append(spectrum.abs().max())
    stacked = {horizon: torch.stack(found) for horizon, found in weights.items()}
    if not moduli:
        return Forecast(stacked)
    return Forecast(stacked, torch.stack(residuals), torch.cat(eigenvalues), torch.stack(moduli))


def loss_of(weights: Tensor) -> Tensor:
    """Losses of `(networks, weights)`."""
    with torch.no_grad():
        return oscillator.batched_loss(weights, oscillator.time_points())


def weights_at(recorded: recording.Recording, step: int) -> Tensor:
    """`(seeds, weights)` at one of the kept steps."""
    return torch.from_numpy(np.array(recorded.trail[step // recording.TRAIL]))


def path(settings: Settings) -> list[int]:
    """Horizons, in optimizer steps, at which forecasts are drawn."""
    last, first = settings.steps - settings.t2, min(settings.horizons)
    wanted = [first * i / 5 for i in range(1, 6)] + [last * i / 6 for i in range(1, 7)]
    return sorted({max(1, round(steps / recording.TRAIL)) * recording.TRAIL for steps in wanted})


def label_of(method: Method) -> str:
    """How a method is called in figures."""
    if method.setting == "baseline":
        return "straight line"
    return f"{method.by} operator, {'every step' if method.setting == 'paper' else 'recommended'}"


def drawn(found: Iterable[Method]) -> list[Method]:
    """The methods that stand in the figures."""
    return [m for m in found if m.setting != "paper" or m.by == "node"]


def errors_ahead(
    settings: Settings, recorded: recording.Recording, found: dict[Method, Forecast]
) -> dict[str, list[float]]:
    """Median error over motion of the drawn methods along :func:`path`."""
    start = weights_at(recorded, settings.t2)
    return {
        label_of(method): [
            metrics.error_over_motion(found[method].weights[ahead], start, weights_at(recorded, settings.t2 + ahead))
            for ahead in path(settings)
        ]
        for method in drawn(found)
    }
