"""How to group, how to invert, how to prepare a window: one thing varied at a time, on several tasks.

    python benchmarks/choosing.py [--quick] [--task NAME ...] [--output results/choosing]

Trains 10 networks a task from seeds 2000 to 2009 (no setting was chosen on them), keeps them in the output folder, and
forecasts each with the recommended setting, the paper's, and every variation. What it found stands in docs/choosing.md.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from choosing_forecasts import INVERSES, MULTIPLIED_OUT, Setting, forecast, partition
from choosing_report import draw, markdown, show
from choosing_tasks import MNIST, Regression, Task, de_solver, mnist, regression
from rich.console import Console
from rich.progress import Progress, TaskID

from koopt import metrics, report
from koopt.experiments import minibatch, recording

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

PARTITIONS = ("weight", "node", "layer", "network", "similar motion", "unlike motion", "random")


@dataclass(frozen=True)
class Case:
    """A row to be: `part` is the table, `label` the row."""

    part: str
    label: str
    setting: Setting


def whole(task: Task) -> int:
    """The optimizer steps of the window."""
    return (len(task.window) - 1) * task.grain


def recommended(task: Task) -> Setting:
    """What the README recommends: eleven snapshots over the last T steps; under noise means of blocks, rank 3."""
    if not task.noisy:
        tail = min(task.horizon, 2_500)
        return Setting(tail=tail, stride=tail // 10, rank=6, difference=True)
    block = whole(task) // 60 // task.grain * task.grain
    return Setting(
        tail=whole(task) // block * block, stride=block, average=True, rank=3, projected=True, max_modulus=1.0
    )


def paper(task: Task) -> Setting:
    """Node by node (of MNIST quasi-nodes of 157 weights), all that is kept of the window."""
    return Setting(tail=whole(task), stride=task.grain, by="node", max_size=157 if task.name == "MNIST" else None)


def cases(task: Task) -> Iterator[Case]:
    """Every row of a task's tables."""
    best, original = recommended(task), paper(task)
    assert isinstance(best.rank, int)
    yield Case("peers", "recommended", best)
    yield Case("peers", "paper", original)
    for method in ("last", "line", "regression", "mean", "dema"):
        yield Case("peers", method, replace(best, method=method))

    for about, base in (("recommended", best), ("paper", original)):
        for by in PARTITIONS:
            yield Case(f"partition, {about}", by, replace(base, by=by, max_size=None))
        for size in (157,) if task.name == "MNIST" else (2, 5):
            yield Case(f"partition, {about}", f"quasi-node, q = {size}", replace(base, by="node", max_size=size))

    bases = [("recommended, network", best)]
    if not task.noisy:
        bases += [("recommended, node", replace(best, by="node")), ("paper", original)]
    for about, base in bases:
        plain = replace(base, projected=False, max_modulus=None)  # of the inverses written out
        yield Case(f"inverse, {about}", "koopt.fit", plain)
        for name in INVERSES:
            if name != MULTIPLIED_OUT or about == "paper":  # elsewhere patches are larger than the window is long
                yield Case(f"inverse, {about}", name, replace(plain, inverse=name))
        for ridge in (1e-14, 1e-12, 1e-10, 1e-8):
            label = f"Cholesky, ridge {ridge:.0e}"
            yield Case(f"inverse, {about}", label, replace(plain, inverse="Cholesky", rtol=ridge))

    yield Case("preparation", "recommended", best)
    for name in ("difference", "center", "projected"):
        turned = not getattr(best, name)
        yield Case("preparation", f"{name}={turned}", replace(best, **{name: turned}))
    yield Case("preparation", "center, states", replace(best, center=True, difference=False))
    modulus = None if best.max_modulus else 1.0
    yield Case("preparation", f"max_modulus={modulus}", replace(best, max_modulus=modulus))
    yield Case("preparation", f"average={not best.average}", replace(best, average=not best.average))
    for delays in (2, 3):
        yield Case("preparation", f"delays {delays}", replace(best, delays=delays))
        yield Case("preparation", f"delays {delays}, node", replace(best, delays=delays, by="node"))

    for share, count in itertools.product((1, 2, 4, 8), (5, 10, 20, 40, 100)):
        stride = whole(task) // share // count // task.grain * task.grain
        if stride and count > best.rank:
            label = f"{stride * count:,} steps, {count} strides"
            yield Case("window", label, replace(best, tail=stride * count, stride=stride))

    for rank in range(1, 10):
        yield Case("rank", f"rank {rank}", replace(best, rank=rank))
    yield Case("rank", "default (rounding)", replace(best, rank=None))
    for rtol in (1e-2, 1e-4, 1e-6, 1e-8, 1e-10):
        yield Case("rank", f"rtol {rtol:.0e}", replace(best, rank=None, rtol=rtol))
    for rule, label in (("threshold", "optimal threshold"), ("held out", "held-out error"), ("lowest loss",) * 2):
        yield Case("rank", label, replace(best, rank=rule))
    if not task.noisy:
        yield Case("cut, paper", "default", original)
        for rtol in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-10, 1e-12, 1e-14):
            yield Case("cut, paper", f"rtol {rtol:.0e}", replace(original, rtol=rtol))


def snapshots_of(task: Task, setting: Setting, seed: int) -> tuple[Tensor, float]:
    """`(time, weights)`, and the horizon in snapshot steps."""
    every, count = setting.stride // task.grain, setting.tail // setting.stride
    if not setting.average:
        return task.window[-1 - every * count :: every, seed].contiguous(), task.aim / setting.stride
    blocks = task.means[-every * count :, seed].unflatten(0, (count, every))
    return blocks.mean(dim=1), (task.aim + (setting.stride - 1) / 2) / setting.stride


def attempt(
    task: Task, setting: Setting, seed: int, spoil: Callable[[Tensor], Tensor] = lambda s: s, repeats: int = 0
) -> tuple[Tensor, float, float]:
    """Forecast weights of one seed (NaN if there is none), the largest modulus, and the median milliseconds."""
    snapshots, horizon = snapshots_of(task, setting, seed)
    snapshots = spoil(snapshots)

    def loss_of(weights: Tensor) -> Tensor:
        return task.guard_of(weights.to(task.window.dtype))

    weights, modulus, taken = task.start[seed], math.nan, []
    try:
        parts = partition(task.model, setting, snapshots, seed)
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            if "motion" in setting.by:  # known only once the window is
                parts = partition(task.model, setting, snapshots, seed)
            weights, modulus = forecast(setting, snapshots, horizon, parts, loss_of)
            taken.append(1e3 * (time.perf_counter() - begin))
    except (ValueError, RuntimeError):  # singular, or not finite
        return torch.full_like(task.start[seed], math.nan), math.nan, math.nan
    return weights.to(task.start.dtype), modulus, statistics.median(taken[repeats > 0 :])


def row(task: Task, case: Case, repeats: int) -> dict[str, Any]:
    """One line of a table: how good, how stable, how long."""
    seeds = range(task.window.shape[1])

    def error(spoil: Callable[[Tensor], Tensor]) -> float | None:
        if task.noisy:  # mini-batches spoil more
            return None
        found = torch.stack([attempt(task, case.setting, seed, spoil)[0] for seed in seeds])
        return metrics.error_over_motion(found, task.start, task.truth)

    found, moduli, milliseconds = zip(
        *(attempt(task, case.setting, seed, repeats=repeats if seed == 0 else 0) for seed in seeds), strict=True
    )
    weights = torch.stack(found)
    losses = task.loss_of(weights)
    steps, censored = metrics.equivalent_steps(losses, task.later, task.every)
    known = [modulus for modulus in moduli if not math.isnan(modulus)]
    return {
        "task": task.name,
        "part": case.part,
        "label": case.label,
        **vars(case.setting),
        "horizon": task.aim / case.setting.stride,
        "T": task.horizon,
        "seeds": len(seeds),
        "success": metrics.success(losses, task.later).double().mean().item(),
        "teq_over_T": metrics.median(steps) / task.horizon,
        "teq_over_T_mean": steps.double().mean().item() / task.horizon,
        "censored": censored.double().mean().item(),
        "loss_over_start": metrics.median(losses.nan_to_num(math.inf) / task.later[0]),
        "error_over_motion": metrics.error_over_motion(weights, task.start, task.truth),
        "error_float32": error(lambda s: s.float()),
        "error_1e-9": error(lambda s: s * (1 + 1e-9 * _noise(s))),
        "error_1e-6": error(lambda s: s * (1 + 1e-6 * _noise(s))),
        "modulus": statistics.median(known) if known else None,
        "ms": None if math.isnan(milliseconds[0]) else milliseconds[0],
    }


def _noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=like.dtype)


def made(names: Sequence[str], quick: bool, folder: Path, bars: Progress) -> Iterator[Task]:
    """The tasks, trained where they are not in the folder yet."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = {"adam": (recording.Run("adam", 10, 2000), 2_500), "adagrad": (recording.Run("adagrad", 10, 2000), 15_000)}
    wanted = [runs[name][0] for name in runs if name in names]
    lines = {run.optimizer: bars.add_task(f"training, {run.optimizer}", total=run.steps) for run in wanted}
    if not recording.record_all(wanted, folder, lambda name, done, _: bars.update(lines[name], completed=done)):
        raise SystemExit("interrupted; the same command goes on")
    for name, (run, horizon) in runs.items():
        if name in names:
            yield de_solver(run, folder, horizon)
    small = Regression(seeds=3, t2=2_000, horizon=500, window=1_000, block=25) if quick else Regression()
    for name, batch in (("regression", None), ("mini-batch", 16)):
        if name in names:
            line = bars.add_task(f"training, {name}", total=None)
            yield regression(replace(small, batch=batch), folder, partial(_show, bars, line))
    if "mnist" in names:
        line = bars.add_task("training, MNIST", total=None)
        if not minibatch.record_all(MNIST, folder / "mnist", lambda _, done, total: _show(bars, line, done, total)):
            raise SystemExit("interrupted; the same command goes on")
        yield mnist(folder / "mnist")


def _show(bars: Progress, line: TaskID, done: int, total: int) -> None:
    bars.update(line, completed=done, total=total)


TASKS = ("adam", "adagrad", "regression", "mini-batch", "mnist")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, nargs="+", help="all of them, if not given")
    parser.add_argument("--quick", action="store_true", help="both regressions in small")
    parser.add_argument("--output", type=Path, default=Path("results/choosing"), metavar="DIR")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = given.task or list(TASKS[2:4] if given.quick else TASKS)
    given.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.width = max(console.width, 110)
    rows: list[dict[str, Any]] = []
    finished = True
    try:
        with Progress(console=console) as bars:
            for task in made(names, given.quick, given.output / "recordings", bars):
                listed = list(cases(task))
                for case in bars.track(listed, description=f"forecasting, {task.name}"):
                    rows.append(row(task, case, 2 if given.quick else 7))  # noqa: PERF401, kept when interrupted
    except KeyboardInterrupt:
        finished = False
        console.print("stopped early; what is there is written, without figures")
    settings = {"tasks": names, "quick": given.quick, "seed": 2000, "threads": 1, "finished": finished}
    figures = draw(rows, given.output) if finished else []
    path = report.write_result(given.output, "choosing", settings, rows, figures)
    report.write_text(given.output / "tables.md", markdown(rows))
    show(console, rows)
    console.print(f"wrote {given.output}: {', '.join([path.name, 'tables.md', *figures])}")


if __name__ == "__main__":
    main()
