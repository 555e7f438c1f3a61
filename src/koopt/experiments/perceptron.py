"""An online perceptron in the manner of S8 of the paper (Table S3, Figure S4): operators on noisy training.

The exact settings of S8 are not known to us. These are our own, chosen after some trials so that training stays at an
error of about 22 %; they stand in ``result.json``. A perceptron has n_1
Gaussian inputs and three output units without bias; each unit learns the signs of a random teacher from one fresh
example a step by the delta rule, with the learning rate 1/n_1. As no example returns, the weights soon only jitter
about a level. A teacher is "even" (Gaussian weights) or "uneven" (their cubes: few weights carry it), which decides how
single-weight operators fare. The error is that of the signs; its expected value is exactly the angle between student
and teacher over pi. Operators are fitted to steps 0 to 100 and asked for step 600. Careful data leave out the transient
and average over blocks of steps. For larger n_1 the window is either as long as for the smallest (fixed), or as many
times longer as n_1 is larger, and so are all other times: the rule needs steps in proportion to n_1. Scaled windows are
recorded at every step, which costs too much for the largest n_1, or as often in all as the fixed one.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import koopt
from koopt import linalg, metrics, report, system
from koopt.experiments import figure_s4, online, perceptron_claims
from koopt.experiments.figure_s4 import PARTITIONS
from koopt.experiments.perceptron_claims import Evaluated, mean_and_error
from koopt.forecasters import METHODS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """One reproduction; times are in steps, and n_1/sizes[0] times as long where the window is scaled.

    Attributes:
        seeds: simulations of the smallest perceptron.
        seed: of all random numbers.
        sizes: the n_1 to go through, multiples of the first; the operators are compared at the first.
        size_seeds: simulations at each size.
        dense: the largest n_1 whose scaled window is also recorded at every step.
        outputs, window, block, dropped, rate, start: as in ``online.Run``.
        steps: the end of training, and where forecasts aim.
        smoothing: steps that the training error is averaged over.
    """

    seeds: int = 1_000
    seed: int = 0
    sizes: tuple[int, ...] = (10, 30, 100, 300)
    size_seeds: int = 25
    dense: int = 100
    outputs: int = 3
    window: int = 100
    steps: int = 600
    block: int = 10
    dropped: int = 30
    smoothing: int = 25
    rate: float = 1.0
    start: float = 0.1

    def run(self, teacher: str, n_1: int, seeds: int, stride: int = 1, longer: int = 1) -> online.Run:
        times = {"window": self.window, "strides": self.steps, "block": self.block, "dropped": self.dropped}
        times = {name: longer * time for name, time in times.items()}
        return online.Run(
            teacher, n_1, self.outputs, seeds, self.seed, stride, **times, rate=self.rate, start=self.start
        )


QUICK = Settings(seeds=100, sizes=(10, 30), size_seeds=10)
COLUMNS = {
    "teacher": "teacher",
    "n_1": "n_1",
    "window": "window",
    "data": "data",
    "fit": "fit",
    "by": "operator",
    "success": "success",
    "error_start": "error at\nwindow end",
    "error_trained": "trained\non",
    "error": "fore-\ncast",
    "error_se": "±",
    "cosine_to_mean": "cosine\nto mean",
    "max_modulus": "max\n|λ|",
    "turning": "tur-\nning",
}


@dataclass(frozen=True, eq=False)
class Variant:
    """What is fitted, and to which snapshots.

    Attributes:
        setting: "paper" (all snapshots, all singular values), "careful" (other data) or "variant" (other fits).
        data: "all snapshots", "second half" of the window, or "block means".
        fit: what the options are called.
        options: of ``koopt.fit``.
    """

    setting: str
    data: str
    fit: str
    options: dict[str, Any] = field(default_factory=dict)


PAPER = Variant("paper", "all snapshots", "full rank")
CAREFUL = Variant("careful", "block means", "full rank")
RANK_1 = Variant("variant", "all snapshots", "rank 1", {"rank": 1, "projected": True})
VARIANTS = (
    PAPER,
    Variant("careful", "second half", "full rank"),
    CAREFUL,
    RANK_1,
    Variant("variant", "block means", "rank 1", RANK_1.options),
    Variant("variant", "all snapshots", "affine", {"center": True}),
    Variant("variant", "all snapshots", "increments", {"difference": True, "rank": 2}),
)
SIZE_VARIANTS = (PAPER, CAREFUL, RANK_1)
ONLY_OPERATORS = ("rank", "patch", "residual", "max_modulus", "turning", "cosine_turning", "cosine_steady")
BASELINES: dict[str, dict[str, Any]] = {"last": {}, "mean": {}, "line": {"span": 10}, "regression": {}}


def recorded(simulated: online.Simulation, data: str) -> Tensor:
    """The snapshots of a kind of data, `(time, seeds, weights)`."""
    if data == "block means":
        return simulated.means
    return simulated.window[len(simulated.window) // 2 :] if data == "second half" else simulated.window


def fit(run: online.Run, simulated: online.Simulation, by: str, variant: Variant) -> koopt.Operator:
    """The operators of all simulations in one call: batch `(seeds, patches)`."""
    (patches,) = _partition(run, by).gather_flat(recorded(simulated, variant.data))
    return koopt.fit(patches.movedim(0, -2), **variant.options)


def forecast(run: online.Run, op: koopt.Operator, by: str, data: str, ahead: int) -> Tensor:
    """`(seeds, weights)`, `ahead` strides after the window's end."""
    # a block's mean stands in the middle of its steps
    horizon = (ahead + (run.block - 1 / run.stride) / 2) / run.block if data == "block means" else ahead
    return _partition(run, by).scatter_flat([op.forecast(horizon)])


def evaluate(run: online.Run, simulated: online.Simulation, variants: Sequence[Variant], study: str) -> list[Evaluated]:
    """All forecasts of a batch of simulations: operators by variant and partition, then the baselines."""
    found = []
    for variant in variants:
        for by in PARTITIONS:
            if by == "weight" and "rank" in variant.options:
                continue  # a single weight has no more than rank 1
            op = fit(run, simulated, by, variant)
            line = {"method": "koopman", "by": by, "setting": variant.setting, "data": variant.data, "fit": variant.fit}
            line |= {"rank": variant.options.get("rank"), "snapshots": op.snapshots.shape[-2]}
            line |= {"patch": op.snapshots.shape[-1], "residual": metrics.median(op.residual)}
            weights = forecast(run, op, by, variant.data, run.ahead)
            found.append((line | _spectrum(op, cosines(run, simulated, weights)), weights))
    window = simulated.window.transpose(0, 1)
    for method, options in BASELINES.items():
        line = {"method": method, "by": None, "setting": "baseline", "data": "all snapshots", "fit": method}
        line |= dict.fromkeys(ONLY_OPERATORS) | {"snapshots": run.window + 1}
        found.append((line, linalg.combine(METHODS[method](window, run.ahead, **options), window)))
    return [_evaluated(run, simulated, study, line, weights) for line, weights in found]


def _spectrum(op: koopt.Operator, towards: Tensor) -> dict[str, Any]:
    """The leading eigenvalues, and how forecasts fare where these turn; `towards` `(seeds, outputs)` is a cosine."""
    leading = op.eigenvalues[..., 0]
    line = {
        "max_modulus": metrics.median(leading.abs()),
        "turning": None,
        "cosine_turning": None,
        "cosine_steady": None,
    }
    if op.difference or leading.shape[1] > towards.shape[1]:  # increments; single weights
        return line
    turning = (leading.imag != 0) | (leading.real < 0)
    line["turning"] = turning.double().mean().item()
    turning = turning.expand(towards.shape)
    return line | {
        key: towards[which].mean().item() if bool(which.any()) else None
        for key, which in {"cosine_turning": turning, "cosine_steady": ~turning}.items()
    }


def _evaluated(
    run: online.Run, simulated: online.Simulation, study: str, line: dict[str, Any], weights: Tensor
) -> Evaluated:
    start, trained = simulated.error[run.window], simulated.error[-1]
    error = online.expected_error(weights, simulated.teacher)
    row = {
        "study": study,
        "teacher": run.teacher,
        "n_1": run.n_1,
        "window": run.window * run.stride,
        "stride": run.stride,
        "horizon": run.ahead,
        "seeds": run.seeds,
        **line,
        "success": (error < start).double().mean().item(),
        "beats_training": (error < trained).double().mean().item(),
    }
    for key, values in {"error_start": start, "error_trained": trained, "error": error}.items():
        row[key], row[f"{key}_se"] = mean_and_error(values)
    row |= {
        "cosine_to_mean": cosines(run, simulated, weights).mean().item(),
        "largest_share": largest_share(weights.nan_to_num(), simulated.teacher.shape),
        "norm_ratio": (weights.norm(dim=-1) / simulated.final.norm(dim=-1)).median().item(),
        "broken": (~weights.isfinite().all(dim=-1)).double().mean().item(),
    }
    return Evaluated(row, error, start, trained)


def cosines(run: online.Run, simulated: online.Simulation, weights: Tensor) -> Tensor:
    """`(seeds, outputs)`, the cosine of each unit's weights with their mean over the window."""
    shape = run.seeds, run.outputs, run.n_1
    mean = simulated.window.mean(dim=0)
    return (online.unit(weights.nan_to_num().reshape(shape)) * online.unit(mean.reshape(shape))).sum(dim=-1)


def largest_share(weights: Tensor, shape: Sequence[int]) -> float:
    """The share of its squared length that a unit's largest weight holds, averaged over units and simulations.

    >>> round(largest_share(torch.tensor([[3.0, 4.0]]), (1, 1, 2)), 3)
    0.64
    """
    return online.unit(weights.reshape(*shape)).square().amax(dim=-1).mean().item()


def smoothed(mistakes: Tensor, steps: int) -> Tensor:
    """The training error as a mean over the last `steps` steps, `(time - steps + 1,)`.

    >>> smoothed(torch.tensor([0.0, 1.0, 1.0]), 2)
    tensor([0.5000, 1.0000])
    """
    return mistakes.unfold(0, steps, 1).mean(dim=-1)


def check(settings: Settings) -> None:
    """Refuse settings that cannot be run, before anything is written."""
    if settings.seeds < 2:
        raise ValueError(f"--seeds is {settings.seeds}, expected at least 2: a standard error is taken over them")
    system.require_seeds(settings.seed)
    if settings.size_seeds < 2:
        raise ValueError(f"size_seeds is {settings.size_seeds}, expected at least 2")
    if settings.outputs < 1:
        raise ValueError(f"outputs is {settings.outputs}, expected at least 1")
    if not settings.sizes or settings.sizes[0] < 2 or any(size % settings.sizes[0] for size in settings.sizes):
        raise ValueError(f"sizes is {settings.sizes}, expected at least one, the first 2 or more, all multiples of it")
    if list(settings.sizes) != sorted(set(settings.sizes)):
        raise ValueError(f"sizes is {settings.sizes}, expected rising numbers")
    if not BASELINES["line"]["span"] <= settings.window < settings.steps:
        raise ValueError(
            f"window and steps are {settings.window} and {settings.steps}, expected a window of at least "
            f"{BASELINES['line']['span']} steps, shorter than the training"
        )
    if not 1 <= settings.smoothing <= settings.window:
        raise ValueError(f"smoothing is {settings.smoothing}, expected 1 to {settings.window} steps, the window's")
    left = settings.window - settings.dropped
    if settings.block < 1 or not 2 * settings.block <= left <= settings.window or left % settings.block:
        raise ValueError(
            f"block and dropped are {settings.block} and {settings.dropped}, expected at least two blocks, and whole "
            f"ones, in what is left of the {settings.window} steps"
        )
    largest = 2 * settings.sizes[0] / (settings.sizes[0] + 2)
    if not 0 < settings.rate < largest:
        raise ValueError(f"rate is {settings.rate}, expected above 0 and below {largest:.3g}, where training diverges")
    if not 0 < settings.start < math.inf:
        raise ValueError(f"start is {settings.start}, expected a positive standard deviation")


def reproduce(settings: Settings, folder: Path, progress: Callable[[str, int, int], None]) -> list[dict[str, Any]]:
    """Simulate, forecast, draw; writes figures and ``result.json`` to `folder`.

    Args:
        settings: what to run; see :func:`check`.
        folder: where figures and the result go.
        progress: called with a stage's name, how much of it is done and its total.

    Returns:
        Rows of the studies "operators" (the smallest perceptron), "size", and "finding" (claims, whether they hold,
        and what was measured, in words).

    Raises:
        ValueError: if a setting is out of range.
        OSError: if the folder cannot be written.

    Source: in the manner of Dogra & Redman (2020), S8.
    """
    check(settings)
    system.require_folder(folder, "--output")
    folder.mkdir(parents=True, exist_ok=True)
    with system.one_thread():
        return _reproduce(settings, folder, progress)


def _reproduce(settings: Settings, folder: Path, progress: Callable[[str, int, int], None]) -> list[dict[str, Any]]:
    begin = time.perf_counter()
    first = [settings.run(teacher, settings.sizes[0], settings.seeds) for teacher in online.TEACHERS]
    larger = [
        settings.run(teacher, size, settings.size_seeds, stride, longer)
        for size in settings.sizes
        for stride, longer in samplings(settings, size)
        for teacher in online.TEACHERS
    ]
    total, done = sum(run.strides * run.stride for run in first + larger), 0
    shown: list[figure_s4.Shown] = []
    found: list[list[Evaluated]] = []
    for run in first + larger:

        def tell(steps: int, before: int = done) -> None:
            progress("perceptron", before + steps, total)

        simulated = online.simulate(run, tell)
        done += run.strides * run.stride
        main = len(found) < len(first)
        found.append(evaluate(run, simulated, VARIANTS if main else SIZE_VARIANTS, "operators" if main else "size"))
        smoothing = settings.smoothing * run.window * run.stride // settings.window
        mistakes = smoothed(simulated.mistakes, smoothing)
        for line in found[-1]:
            line.row["training_error_start"] = mistakes[run.window * run.stride - smoothing].item()
            line.row["training_error_trained"] = mistakes[-1].item()
        if main:
            shown.append(figure_s4.Shown(run, simulated, mistakes, _paths(run, simulated)))
    rows = [line.row for batch in found for line in batch]
    claims = []
    for batch, given in zip(found, shown, strict=False):
        share = largest_share(given.simulated.teacher.flatten(1), given.simulated.teacher.shape)
        claims += perceptron_claims.about_operators(batch, share)
    for batch in _largest(found[len(first) :]):
        claims += perceptron_claims.about_size(batch)
    figures = [figure_s4.draw_errors(shown, folder), figure_s4.draw_weights(shown[-1], folder)]
    figures.append(figure_s4.draw_sizes([row for row in rows if row["study"] == "size"], folder))
    seconds = time.perf_counter() - begin
    report.write_result(folder, "perceptron", asdict(settings), rows + claims, figures, seconds)
    return rows + claims


def tables(
    settings: Settings, rows: Sequence[dict[str, Any]]
) -> list[tuple[str, dict[str, str], list[dict[str, Any]]]]:
    """Title, columns and rows of each table."""
    return [
        (
            f"{teacher.capitalize()} teacher, n_1 = {settings.sizes[0]}, {settings.seeds:,} simulations",
            COLUMNS,
            [row for row in rows if row["study"] == "operators" and row["teacher"] == teacher],
        )
        for teacher in online.TEACHERS
    ]


def samplings(settings: Settings, size: int) -> list[tuple[int, int]]:
    """How the windows of a size are recorded, as (stride, how many times the strides): fixed, scaled, and strided."""
    longer = size // settings.sizes[0]
    return sorted({(1, 1), (longer, 1)} | ({(1, longer)} if size <= settings.dense else set()))


def _largest(batches: list[list[Evaluated]]) -> list[list[Evaluated]]:
    """Of every sampling and teacher, the batch with the largest perceptron, if it is not the smallest of all."""
    smallest = min((batch[0].row for batch in batches), key=lambda row: row["n_1"])
    chosen = {}
    for batch in batches:
        row = batch[0].row
        if row["n_1"] > smallest["n_1"]:  # by rising n_1
            chosen[row["window"] > smallest["window"], row["stride"] > 1, row["teacher"]] = batch
    return list(chosen.values())


def _partition(run: online.Run, by: str) -> koopt.Partition:
    return koopt.partition(nn.ParameterList([torch.empty(run.outputs, run.n_1)]), by)  # a node is a row


def _paths(run: online.Run, simulated: online.Simulation) -> dict[str, Tensor]:
    """Forecasts of the paper's operators along the way, `(horizons, seeds, weights)` by partition."""
    paths = {}
    for by in PARTITIONS:
        op = fit(run, simulated, by, PAPER)
        paths[by] = torch.stack([forecast(run, op, by, PAPER.data, ahead) for ahead in figure_s4.horizons(run)])
    return paths
