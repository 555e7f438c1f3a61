"""Time to target on training loops on which no setting of jumps was chosen (`unseen_tasks.py`).

    python benchmarks/unseen.py                      # all; rerunning it resumes
    python benchmarks/unseen.py sines logistic --seeds 3 --quick

Full batches: what koopt with its defaults needs, a guard evaluation counted as a third of a step, until the lowest
loss of the same run without it, as a share of that run's steps. First with the learning rate as it stands in the
loop; beside it a guarded straight line, guarded Anderson mixing, L-BFGS and, as a measure of chance, the same run from
a first weight that is one rounding larger. Then each method with the best of four rates, from a third of that to ten
times as much, chosen on two other seeds by the median of the lowest losses; beside it SOAP and L-BFGS.

Mini-batches: the validation loss of `koop.forecast_weights()` and of averages, the best of their settings by the same
two seeds, over that of the weights as they are, at half of the run and at its end.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fresh_tasks import FRESH, FRESH_NOISY
from jump_options import nudged
from unseen_report import CHANCE, PLAIN, STANDS, TUNED, draw, markdown
from unseen_tasks import FULL, LATER, LATEST, NOISY

from koopt import plot, report, terminal
from koopt.bench.method import Observer, Trainer
from koopt.bench.methods import METHODS
from koopt.bench.methods.training import searched
from koopt.bench.protocol import losses_at_shares
from koopt.bench.results import WORSE, over
from koopt.bench.statistics import crossing, median_interval
from koopt.bench.trials import Trials, Way

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from koopt.bench.run import Record
    from koopt.bench.task import Task

TASKS = {task.name: task for task in (*FULL, *LATER, *LATEST, *FRESH, *NOISY, *FRESH_NOISY)}
TUNING = (1000, 1001)
NUDGED = Trainer("rounding", nudged, searched, title="one rounding")
COMPARED = {  # the optimizer first; with the rate as it stands, and each with its own
    STANDS: ("optimizer", "koopt", "koopt-jumps", "line", "anderson", "lbfgs"),
    TUNED: ("optimizer", "koopt", "koopt-jumps", "soap", "lbfgs"),
}
AVERAGES = ("ema", "dema", "lawa")


def trainer(name: str) -> Trainer:
    found = METHODS.get(name, NUDGED)
    assert isinstance(found, Trainer)
    return found


def at_rates(name: str, task: Task) -> list[Way]:
    """A method with each rate of the task."""
    found = trainer(name)
    if name == "lbfgs":
        return [Way(name, found, {"history": 100})]
    own = {"evaluated": "trained"} if name.startswith("koopt") else {}
    return [Way(name, found, setting | own) for setting in found.grid(task)]


def as_it_stands(name: str, task: Task) -> Way:
    return next(way for way in at_rates(name, task) if way.setting.get("rate", task.rates[1]) == task.rates[1])


def tuned(name: str, task: Task, trials: Trials) -> Way:
    """With the rate whose lowest losses have the lowest median on the tuning seeds."""
    ways = at_rates(name, task)
    return ways[0] if len(ways) == 1 else best(ways, trials)


def best(ways: Sequence[Way], trials: Trials) -> Way:
    """Of the lowest median final loss on the tuning seeds; of full batches that is the lowest of the run."""
    return min(ways, key=lambda way: float(np.median([record.final for record in records(way, trials, TUNING)])))


def full_rows(
    task: Task, trials: Trials, seeds: Sequence[int], rates: Sequence[str] = tuple(COMPARED)
) -> list[dict[str, Any]]:
    """What each method needs to the lowest loss of the optimizer's run of the same seed."""
    rows = []
    for rate in rates:
        names = COMPARED[rate]
        ways = [as_it_stands(name, task) if rate == STANDS else tuned(name, task, trials) for name in names]
        if rate == STANDS:
            ways.append(Way("rounding", NUDGED, ways[0].setting))
        plain = records(ways[0], trials, seeds)
        whole = {name: [float(getattr(record.curve, name)[-1]) for record in plain] for name in ("cost", "seconds")}
        for way in ways:
            found = records(way, trials, seeds)
            runs = list(zip(found, plain, strict=True))
            spent = {
                name: [crossing(getattr(own.curve, name), own.curve.loss, other.final) for own, other in runs]
                for name in whole
            }
            shares = {name: np.divide(spent[name], whole[name]) for name in whole}
            share, low, high = median_interval(shares["cost"].tolist())
            halves = [crossing(own.curve.cost, own.curve.loss, losses_at_shares(other, task)[0]) for own, other in runs]
            ratios = [over(own, other) for own, other in runs]
            rows.append(
                {
                    "task": task.name,
                    "about": task.about,
                    "rate_is": rate,
                    "method": title(way.method),
                    "setting": way.shown,
                    "share": share,
                    "low": low,
                    "high": high,
                    "half": float(np.median(np.divide(halves, whole["cost"]))),
                    "cpu": float(np.median(shares["seconds"])),
                    "final_ratio": float(np.median(ratios)),
                    "worse": sum(ratio > WORSE for ratio in ratios),
                }
            )
    return rows


def noisy_rows(task: Task, trials: Trials, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Validation losses over those of the optimizer's weights, at half of the run and at its end."""
    ways = beside(task)
    plain = ways[0]
    shown = {CHANCE: ways[1], "trained with koopt": ways[2], "**koopt**, forecast": ways[3]}
    for name in AVERAGES:
        shown[title(name)] = best([way for way in ways if way.method == name], trials)
    rows = []
    for name, way in shown.items():
        pairs = list(zip(records(way, trials, seeds), records(plain, trials, seeds), strict=True))
        half, end = (
            [float(a.curve.loss[place] / b.curve.loss[place]) for a, b in pairs] for place in (task.looks // 2, -1)
        )
        ends = {"half": float(np.median(half)), "end": float(np.median(end))}
        rows.append({"task": task.name, "about": task.about, "method": name, "setting": way.shown} | ends)
    return rows


def records(way: Way, trials: Trials, seeds: Sequence[int]) -> list[Record]:
    return [record for seed in seeds if (record := trials.get(way, seed)) is not None]


def title(name: str) -> str:
    return {"optimizer": PLAIN, "rounding": CHANCE}.get(name) or METHODS[name].title.strip("*")


def wanted_of(task: Task, seeds: Sequence[int], rates: Sequence[str]) -> list[tuple[Way, int]]:
    """The runs that need no choice, and those that choices are made from."""
    if not task.full_batch:
        return [(way, seed) for way in beside(task) for seed in (*seeds, *TUNING)]
    plain = as_it_stands("optimizer", task)
    fixed = [*(as_it_stands(name, task) for name in COMPARED[STANDS]), Way("rounding", NUDGED, plain.setting)]
    searched = [way for name in COMPARED[TUNED] if name != "lbfgs" for way in at_rates(name, task)]
    choosing = [(way, seed) for way in searched for seed in TUNING] if TUNED in rates else []
    return [(way, seed) for way in fixed for seed in seeds] + choosing


def make(
    task: Task,
    trials: Trials,
    seeds: Sequence[int],
    progress: Callable[[str, int, int], None],
    rates: Sequence[str] = tuple(COMPARED),
) -> None:
    """All runs, those with the chosen rates last."""
    trials.make(wanted_of(task, seeds, rates), task.name, progress)
    if task.full_batch and TUNED in rates:
        chosen = [tuned(name, task, trials) for name in COMPARED[TUNED]]
        trials.make([(way, seed) for way in chosen for seed in seeds], f"{task.name}, tuned", progress)


def beside(task: Task) -> list[Way]:
    """The runs of a noisy task: koopt's weights and those that it evaluates, and averages beside the plain run."""
    plain, koop = as_it_stands("optimizer", task), as_it_stands("koopt", task)
    forecast = Way("koopt", koop.trainer, koop.setting | {"evaluated": "forecast"})
    found = [plain, Way("rounding", NUDGED, plain.setting), koop, forecast]
    for name in AVERAGES:
        observer = METHODS[name]
        assert isinstance(observer, Observer)
        found += [Way(name, plain.trainer, plain.setting, observer, setting) for setting in observer.grid]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}; all of them, if none is given"
    )
    parser.add_argument("--seeds", type=int, default=6, help="from 0 on")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--quick", action="store_true", help="full batches only with the rate as it stands")
    parser.add_argument("--output", type=Path, default=Path("results/unseen"), metavar="DIR")
    given = parser.parse_args()
    if unknown := set(given.tasks) - set(TASKS):
        parser.error(f"unknown tasks {', '.join(sorted(unknown))}, expected some of {', '.join(TASKS)}")
    seeds, rates = range(given.seeds), (STANDS,) if given.quick else tuple(COMPARED)
    rows: list[dict[str, Any]] = []
    for name in given.tasks or TASKS:
        task, trials = TASKS[name], Trials(TASKS[name], given.output / name, given.jobs)
        with terminal.progress() as progress:
            make(task, trials, seeds, progress, rates)
        for line in trials.failed.values():
            print(line)
        rows += full_rows(task, trials, seeds, rates) if task.full_batch else noisy_rows(task, trials, seeds)
    given.output.mkdir(parents=True, exist_ok=True)
    report.write_text(given.output / "tables.md", markdown(rows))
    draw(rows, lambda figure: plot.save(figure, given.output / "unseen.png"))
    settings = {"seeds": list(seeds), "tuning seeds": list(TUNING)}
    report.write_result(given.output, "unseen", settings, rows, ["unseen.png"])
    print(markdown(rows))


if __name__ == "__main__":
    main()
