"""Koopman operators of many patches in one batched call, against a loop over PyDMD, and how the time grows.

Run it with the test extra installed (``pip install -e '.[test]'``):

    python benchmarks/operators.py                 # about two minutes
    python benchmarks/operators.py --quick         # some seconds, coarse
    python benchmarks/operators.py --threads 4 --output results/operators

It prints tables and writes ``result.json`` and ``operators.png`` to the output folder.

What is compared: a rank-8 fit of every patch and one forecast 50 snapshot steps beyond the last snapshot, from the same
float64 numbers in memory, in three ways: ``koopt.fit(...).forecast(50)``; ``pydmd.DMD`` patch by patch; the formula
written out with one batched ``torch.linalg.svd``. The ways take turns, and medians are reported.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pydmd
import torch
from rich.console import Console
from threadpoolctl import threadpool_limits

import koopt
from koopt import report
from koopt.plot import COLORS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from matplotlib.axes import Axes
    from torch import Tensor

    Ways = dict[str, Callable[[Tensor], Tensor]]

RANK = 8
HORIZON = 50
NOISE = 1e-6  # standard deviation of the noise on a weight, relative to how far the weights of its patch move
BASE = {"patches": 1000, "weights": 32, "snapshots": 100}
SWEEPS = {
    "patches": (10, 30, 100, 300, 1000, 3000, 10_000),
    "weights": (8, 32, 100, 300, 1000, 3000, 10_000, 30_000, 100_000),
    "snapshots": (10, 20, 40, 70, 100, 150, 200, 300),
}
QUICK_SWEEPS = {"patches": (10, 100, 1000), "weights": (8, 100, 1000, 10_000), "snapshots": (10, 30, 100)}
NUMBERS = 3_200_000  # in the snapshots of a point of the sweep over weights: the larger the patches, the fewer
PATIENCE = 4.0  # seconds of one pass of PyDMD beyond which its larger sizes are left out

KOOPT, KOOPT_ALL, PYDMD, SVD = "koopt", "koopt, all singular values", "PyDMD", "torch.linalg.svd"
LINES = {KOOPT: "koopt, rank 8", KOOPT_ALL: KOOPT_ALL, PYDMD: "PyDMD in a loop, rank 8"}
MARKERS = {KOOPT: "o", KOOPT_ALL: "s", PYDMD: "^"}
AXES = {
    "patches": ("patches of 32 weights", "seconds for all patches"),
    "weights": ("weights in a patch", "seconds a patch"),
    "snapshots": ("snapshots of 32 weights", "seconds a patch"),
}


class Problem(NamedTuple):
    """Snapshots `(patches, time, weights)`, and where the system without noise is at the horizon."""

    snapshots: Tensor
    truth: Tensor
    motion: Tensor  # from the last snapshot to the truth


def spirals(times: Tensor) -> Tensor:
    """Four decaying oscillations, all well above the noise: sigma_8 / sigma_1 is about 0.1."""
    modulus = torch.tensor([0.999, 0.993, 0.987, 0.98], dtype=torch.float64)
    angle = torch.tensor([0.07, 0.23, 0.41, 0.67], dtype=torch.float64)
    share = 3.0 ** (-torch.arange(4, dtype=torch.float64) / 2)
    powers = share[:, None] * torch.polar(modulus, angle)[:, None] ** times
    return torch.cat([powers.real, powers.imag])


def decays(times: Tensor) -> Tensor:
    """Eight close real decays, hard to tell apart: sigma_8 / sigma_1 is about 1e-6, too small to square."""
    return torch.linspace(0.9, 0.995, 8, dtype=torch.float64)[:, None] ** times


SYSTEMS = {"well resolved": spirals, "hard": decays}


def problem(system: Callable[[Tensor], Tensor], patches: int, weights: int, snapshots: int, seed: int) -> Problem:
    """Snapshots of a known linear system, seen through eight orthonormal modes of its own in each patch, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    modes = torch.linalg.qr(torch.randn(patches, weights, 8, generator=generator, dtype=torch.float64)).Q.mT
    last, truth = (
        (system(torch.tensor([float(at)])).mT @ modes).squeeze(-2) for at in (snapshots - 1, snapshots - 1 + HORIZON)
    )
    motion = truth - last
    recorded = system(torch.arange(snapshots, dtype=torch.float64)).mT @ modes
    scale = NOISE * motion.square().mean(dim=-1).sqrt()[:, None, None]
    recorded += torch.randn(recorded.shape, generator=generator, dtype=torch.float64).mul_(scale)
    return Problem(recorded, truth, motion)


def with_koopt(snapshots: Tensor, rank: int | None = RANK) -> Tensor:
    return koopt.fit(snapshots, rank=rank).forecast(HORIZON)


def with_svd(snapshots: Tensor) -> Tensor:
    """``U^n x_k = B G (D B G)^(n-1) D x_k`` on PyTorch alone, with ``A^+ = G D`` from the SVD cut to the rank."""
    earlier, later = snapshots[:, :-1], snapshots[:, 1:]
    times, values, states = torch.linalg.svd(earlier, full_matrices=False)
    gain = times[..., :RANK] / values[:, None, :RANK]
    directions = states[:, :RANK]
    transition = directions @ later.mT @ gain
    start = directions @ snapshots[:, -1, :, None]
    return (later.mT @ (gain @ (torch.linalg.matrix_power(transition, HORIZON - 1) @ start))).squeeze(-1)


def with_pydmd(snapshots: Tensor) -> Tensor:
    """PyDMD, patch by patch.

    Its default expands the *first* snapshot in the modes; ``opt=-1`` expands the last, which is where koopt starts from
    too. Only the state at the horizon is evaluated: ``reconstructed_data`` would evaluate every step up to it.
    """
    states = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it finds every truncated problem ill-conditioned
        for patch in snapshots.numpy():
            dmd = pydmd.DMD(svd_rank=RANK, exact=True, opt=-1).fit(patch.T)
            states.append((dmd.modes @ (dmd.eigs**HORIZON * dmd.amplitudes)).real)
    return torch.from_numpy(np.stack(states))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """`count` threads for PyTorch and for the BLAS behind NumPy."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)


def take_turns(
    ways: Ways, snapshots: Tensor, repeats: int, patience: float
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Median seconds of each way, and its forecast.

    The ways alternate, so that a busy machine slows all of them; the first turn is warm-up. Turns end after `repeats`,
    or when `patience` seconds are spent; a way that spends them in its first turn has no other.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    forecasts = {}
    begin = time.perf_counter()
    for turn in range(repeats + 1):
        for name, way in ways.items():
            if turn and taken[name][0] > patience:
                continue
            start = time.perf_counter()
            forecasts[name] = way(snapshots)
            taken[name].append(time.perf_counter() - start)
        if turn and time.perf_counter() - begin > patience:
            break
    return {name: statistics.median(seconds[1:] or seconds) for name, seconds in taken.items()}, forecasts


def largest(distance: Tensor, motion: Tensor) -> float:
    return float((distance.norm(dim=-1) / motion.norm(dim=-1)).max())


def side_by_side(system: str, count: int, repeats: int, patience: float, seed: int) -> list[dict[str, Any]]:
    """A row for each way to fit and forecast 1,000 patches of one system, on `count` threads."""
    data = problem(SYSTEMS[system], **BASE, seed=seed)
    ways = {KOOPT: with_koopt, PYDMD: with_pydmd, SVD: with_svd}
    with threads(count):
        seconds, forecasts = take_turns(ways, data.snapshots, repeats, patience)
    values = torch.linalg.svdvals(data.snapshots[:100, :-1])
    return [
        {
            "part": "side by side",
            "system": system,
            "sigma_8_over_sigma_1": float((values[:, RANK - 1] / values[:, 0]).median()),
            "method": name,
            **BASE,
            "rank": RANK,
            "horizon": HORIZON,
            "threads": count,
            "seconds": seconds[name],
            "times_faster_than_pydmd": seconds[PYDMD] / seconds[name],
            "max_difference_from_pydmd_over_motion": largest(forecasts[name] - forecasts[PYDMD], data.motion),
            "max_error_over_motion": largest(forecasts[name] - data.truth, data.motion),
        }
        for name in ways
    ]


def sizes(axis: str, size: int) -> dict[str, int]:
    """The problem at one point of a sweep; large patches are fewer, so that the data stay below 400 MB."""
    chosen = {**BASE, axis: size}
    if axis == "weights":
        chosen["patches"] = min(BASE["patches"], max(1, NUMBERS // (size * BASE["snapshots"])))
    return chosen


def sweep(axis: str, points: tuple[int, ...], repeats: int, patience: float, seed: int) -> Iterator[dict[str, Any]]:
    """A row for each method and point of one axis, on one thread: where BLAS turns to several, lines have kinks."""
    ways = {KOOPT: with_koopt, KOOPT_ALL: lambda snapshots: with_koopt(snapshots, rank=None), PYDMD: with_pydmd}
    for size in points:
        chosen = sizes(axis, size)
        snapshots = problem(spirals, **chosen, seed=seed).snapshots
        with threads(1):
            seconds, _ = take_turns(ways, snapshots, repeats, patience)
        for name, taken in seconds.items():
            yield {
                "part": "growth",
                "axis": axis,
                "system": "well resolved",
                "method": name,
                **chosen,
                "rank": None if name == KOOPT_ALL else RANK,
                "horizon": HORIZON,
                "threads": 1,
                "seconds": taken,
                "seconds_per_patch": taken / chosen["patches"],
            }
        if seconds.get(PYDMD, 0.0) > PATIENCE:
            del ways[PYDMD]


def exponents(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The slope of log time over log size in the upper half of each line, where the fixed cost of a call is small."""
    found = []
    for axis in SWEEPS:
        for name in LINES:
            sizes_of_line, seconds = line(rows, axis, name)
            if len(sizes_of_line) < 2:
                continue
            half = len(sizes_of_line) // 2 if len(sizes_of_line) > 3 else 0
            slope = np.polyfit(np.log(sizes_of_line[half:]), np.log(seconds[half:]), 1)[0]
            span = {"from_size": sizes_of_line[half], "to_size": sizes_of_line[-1]}
            found.append({"part": "exponent", "axis": axis, "method": name, **span, "exponent": float(slope)})
    return found


def line(rows: list[dict[str, Any]], axis: str, method: str) -> tuple[list[int], list[float]]:
    """Sizes and seconds of one line of the figure."""
    key = "seconds" if axis == "patches" else "seconds_per_patch"
    chosen = [row for row in rows if row["part"] == "growth" and row["axis"] == axis and row["method"] == method]
    return [row[axis] for row in chosen], [row[key] for row in chosen]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Three panels, one for each axis; saved through a temporary file."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 4.2), layout="constrained")
    slopes = {(row["axis"], row["method"]): row["exponent"] for row in rows if row["part"] == "exponent"}
    for panel, axis in zip(panels, SWEEPS, strict=True):
        draw_panel(panel, rows, axis, slopes)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=12)
    figure.supxlabel("one thread; at a line's end: the power of the size that its upper half grows with", fontsize=10)
    temporary = path.with_suffix(".tmp")
    figure.savefig(temporary, dpi=160, format="png")
    plt.close(figure)
    os.replace(temporary, path)


def draw_panel(panel: Axes, rows: list[dict[str, Any]], axis: str, slopes: dict[tuple[str, str], float]) -> None:
    ends = []
    for (name, label), color in zip(LINES.items(), (COLORS[0], COLORS[3], COLORS[1]), strict=True):
        at, seconds = line(rows, axis, name)
        panel.loglog(at, seconds, marker=MARKERS[name], ms=5, lw=1.8, color=color, label=label)
        if (axis, name) in slopes:
            ends.append((seconds[-1], at[-1], f"{slopes[axis, name]:.2f}", color))
    xlabel, ylabel = AXES[axis]
    if axis == "snapshots":  # less than two decades
        panel.set_xticks((10, 30, 100, 300), ("10", "30", "100", "300"))
        panel.minorticks_off()
    panel.set_xlabel(xlabel, fontsize=12)
    panel.set_ylabel(ylabel, fontsize=12)
    panel.tick_params(labelsize=10.5)
    panel.margins(x=0.14, y=0.08)
    panel.grid(alpha=0.25, lw=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    low, high = panel.get_ylim()
    apart = (high / low) ** 0.06
    floor = 0.0
    for y, x, text, color in sorted(ends):
        floor = max(y, floor * apart)  # labels of lines that end together are stacked
        panel.annotate(text, (x, floor), (6, 0), textcoords="offset points", va="center", color=color, fontsize=11)


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """The tables, readable on 80 columns."""
    compared = [row | {"ms": 1000 * row["seconds"]} for row in rows if row["part"] == "side by side"]
    columns = {
        "system": "system",
        "threads": "threads",
        "method": "method",
        "ms": "ms",
        "times_faster_than_pydmd": "PyDMD's\n/ this",
        "max_difference_from_pydmd_over_motion": "against\nPyDMD",
        "max_error_over_motion": "against\ntruth",
    }
    title = f"{BASE['patches']:,} patches of {BASE['weights']} weights, {BASE['snapshots']} snapshots, rank {RANK}"
    report.print_table(console, title, columns, compared)
    console.print("against: the largest difference of a patch's forecast, over how far the patch moves to the horizon")
    for system in SYSTEMS:
        for row in [row for row in compared if row["system"] == system][:1]:
            console.print(f"{system}: sigma_8 / sigma_1 = {row['sigma_8_over_sigma_1']:.0e}")
    console.print()
    columns = {
        "axis": "time grows with",
        "method": "method",
        "from_size": "from",
        "to_size": "to",
        "exponent": "exponent",
    }
    powers = [row for row in rows if row["part"] == "exponent"]
    report.print_table(console, "Time as a power of size, one thread", columns, powers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats and sizes: a few seconds, coarse")
    parser.add_argument("--output", type=Path, default=Path("results/operators"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="the comparison is also shown on one (default: 2)")
    options = parser.parse_args()
    console = Console()
    options.output.mkdir(parents=True, exist_ok=True)
    repeats, patience = (2, 0.5) if options.quick else (9, 6.0)
    rows: list[dict[str, Any]] = []
    finished = True
    try:
        with console.status("starting") as status:
            for system in SYSTEMS:
                for count in [options.threads] if options.quick else sorted({1, options.threads}, reverse=True):
                    status.update(f"{system} system on {count} threads")
                    rows += side_by_side(system, count, repeats, patience, options.seed)
            for axis, points in (QUICK_SWEEPS if options.quick else SWEEPS).items():
                for row in sweep(axis, points, repeats, patience / 4, options.seed):
                    rows.append(row)
                    status.update(f"how time grows with {axis}: {row[axis]:,}")
    except KeyboardInterrupt:
        finished = False
        console.print("stopped early; what is there is written")
    rows += exponents(rows)
    figure = options.output / "operators.png"
    draw(rows, figure)
    settings = {"quick": options.quick, "seed": options.seed, "threads": options.threads, "noise": NOISE}
    settings |= {"repeats": repeats, "pydmd": version("pydmd"), "numpy": np.__version__, "finished": finished}
    path = report.write_result(options.output, "operators", settings, rows, [figure.name])
    show(console, rows)
    console.print(f"wrote {path} and {figure}")


if __name__ == "__main__":
    main()
