"""The protocol: the baseline is tuned, its losses are the targets, and every other method gets the same search."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from koopt import system
from koopt.bench import statistics
from koopt.bench.method import Trainer
from koopt.bench.run import Record
from koopt.bench.trials import Trials, Way

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from koopt.bench.method import Observer
    from koopt.bench.task import Task

    Progress = Callable[[str, int, int], None]
    Score = tuple[float, ...]

BASELINE = "optimizer"
TUNING = tuple(range(1000, 1006))  # seeds; never reported
FIRST = TUNING[:2]  # on which many settings are tried
SHARES = (0.5, 0.75, 1.0)  # of the baseline's budget, at which its losses are the targets
MISSED = 1.5  # share of the budget that a target counts which is not reached
KEPT = 3  # one setting in so many is tried on the second tuning seed
FINALISTS = 3  # settings of those that are tried on the others


@dataclass(frozen=True)
class Settings:
    """What is compared.

    Attributes:
        methods: names; the baseline is always among them. None: all that are for the task.
        seeds: how many are reported.
        seed: the first of them.
        quick: whether only two settings a method are searched, to look at.
        jobs: runs at a time, as joblib counts; None: what ``joblib.parallel_config`` says, or one.
        frozen: whether nothing is run, and what is there is reported.
        decays: of Adam's average of squared gradients (beta2), that are searched. None: those of the task.
    """

    methods: tuple[str, ...] | None = None
    seeds: int = 10
    seed: int = 0
    quick: bool = False
    jobs: int | None = None
    frozen: bool = False
    decays: tuple[float, ...] | None = None

    @property
    def reported(self) -> range:
        return range(self.seed, self.seed + self.seeds)


@dataclass(frozen=True)
class Search:
    """How a method's setting was found.

    Attributes:
        chosen: with the best score over the tuning seeds; None if there are no trials.
        tried: each setting with its scores by tuning seed, lower is better.
    """

    chosen: Way | None
    tried: list[tuple[Way, list[Score]]]


@dataclass(frozen=True)
class Outcome:
    """All that is reported of a task.

    Attributes:
        task: which.
        targets: losses, one for each of SHARES.
        search: by method.
        records: by method, then by seed.
        without: by method of koopt, then by seed: the same trainer with the same setting, without koopt.
        failed: methods that stopped with an error, and why.
        outdated: sources that have changed since trials were made.
    """

    task: Task
    targets: list[float]
    search: dict[str, Search]
    records: dict[str, dict[int, Record]]
    without: dict[str, dict[int, Record]]
    failed: dict[str, str]
    outdated: set[str]


def check(settings: Settings, tasks: Sequence[Task], methods: Mapping[str, Trainer | Observer]) -> None:
    """Refuse bad settings, naming the command-line option.

    Raises:
        ValueError: if a method is unknown or not for the only task, or seeds are out of range or those of the tuning.
    """
    for name in settings.methods or ():
        if name not in methods:
            raise ValueError(f"--methods names {name!r}, expected some of {', '.join(methods)}, separated by commas")
        if len(tasks) == 1 and not _serves(methods, name, tasks[0]):
            kind = "full-batch" if not tasks[0].full_batch else "noisy"
            raise ValueError(f"--methods names {name!r}, which is for {kind} tasks, and {tasks[0].name} is not one")
    system.require_seeds(settings.seed, settings.seeds)
    if common := set(TUNING) & set(settings.reported):
        raise ValueError(f"--seed is {settings.seed}: seed {min(common)} is for tuning, and never reported")
    if settings.decays is not None and not (settings.decays and all(0 < decay < 1 for decay in settings.decays)):
        given = ",".join(f"{decay:g}" for decay in settings.decays)
        raise ValueError(f"--beta2 is {given!r}, expected numbers between 0 and 1, separated by commas")
    if settings.jobs == 0:
        raise ValueError("--jobs is 0, expected at least 1, or -1 for all cores")


def conduct(
    settings: Settings, task: Task, methods: Mapping[str, Trainer | Observer], trials: Trials, progress: Progress
) -> Outcome:
    """Search, then run the reported seeds; what is on disk is taken over.

    The first tuning seed is tried with every setting of the grid, the second with the best third of them; `options` are
    then tried likewise on top of the two best over both. The best three so far are tried on the other tuning seeds, and
    the best over all seeds is chosen. The baseline's score is its median final loss, that of others the mean share of
    the budget to the baseline's losses on the same seed.

    Args:
        settings: what is compared.
        task: on what.
        methods: all that there are, by name.
        trials: where trials are kept.
        progress: called with a stage, the runs done and those in all.
    """
    task = task if settings.decays is None else replace(task, decays=settings.decays)
    names = serving(settings, methods, task)
    grids = {name: _ways(name, methods, task, settings.quick) for name in names}
    every = [(way, TUNING[0]) for ways in grids.values() for way in ways]
    trials.make(every, f"{task.name}: search", progress)

    def final(record: Record, seed: int) -> Score:
        return (record.final,)

    seeds = tuning_seeds(settings.quick)
    first = {BASELINE: final}
    found = _narrowed({BASELINE: grids[BASELINE]}, first, trials, "baseline", progress)
    found = _retried(found, _finalists(found), first, trials, seeds, "baseline, other seeds", progress)
    tuned = found[BASELINE].chosen
    if tuned is None:
        return Outcome(task, [], found, {}, {}, trials.failed, trials.outdated)
    records = {seed: record for seed in seeds if (record := trials.get(tuned, seed)) is not None}
    aims = {seed: losses_at_shares(record, task) for seed, record in records.items()}

    def share(record: Record, seed: int) -> Score:
        """The mean share of the budget over the targets of this seed, and the final loss where it is the same."""
        aimed = aims.get(seed, [-math.inf])
        shares = [statistics.crossing(record.curve.cost, record.curve.loss, aim) / task.steps for aim in aimed]
        return float(np.mean([one if math.isfinite(one) else MISSED for one in shares])), record.final

    rest = {name: ways for name, ways in grids.items() if name != BASELINE}
    scores = dict.fromkeys(rest, share)
    others = _narrowed(rest, scores, trials, "second seed", progress)
    further = {name: _with_options(others[name], methods[name], settings.quick) for name in rest}
    further = {name: ways for name, ways in further.items() if ways}
    trials.make([(way, TUNING[0]) for ways in further.values() for way in ways], f"{task.name}: options", progress)
    for name, search in _narrowed(further, scores, trials, "options, second seed", progress).items():
        others[name] = _best_of(others[name].tried + search.tried)
    found |= _retried(others, _finalists(others), scores, trials, seeds, "other seeds", progress)

    chosen = {name: search.chosen for name, search in found.items() if search.chosen is not None}
    alone = {name: without for name, way in chosen.items() if (without := _without(way, methods, task)) is not None}
    trials.make(
        [(way, seed) for seed in settings.reported for way in (*chosen.values(), *alone.values())],
        f"{task.name}: seeds",
        progress,
        test=True,
    )
    kept = {name: _records(trials, way, settings) for name, way in chosen.items()}
    kept = {name: kept[name] for name in names if kept.get(name) and name not in trials.failed}
    plain = kept.get(BASELINE, {}).values()
    losses = [losses_at_shares(record, task) for record in plain]
    targets = [statistics.reached_by_half(list(column)) for column in zip(*losses, strict=True)]
    without = {name: records for name, way in alone.items() if (records := _records(trials, way, settings))}
    ordered = {name: found[name] for name in names if name in found}
    return Outcome(task, targets, ordered, kept, without, trials.failed, trials.outdated)


def tuning_seeds(quick: bool) -> tuple[int, ...]:
    """The seeds of the search."""
    return FIRST if quick else TUNING


def serving(settings: Settings, methods: Mapping[str, Trainer | Observer], task: Task) -> tuple[str, ...]:
    """The methods asked for that are for this task, with the baseline."""
    asked = settings.methods or tuple(methods)
    return tuple(n for n in methods if n == BASELINE or (n in asked and _serves(methods, n, task)))


def _serves(methods: Mapping[str, Trainer | Observer], name: str, task: Task) -> bool:
    method = methods[name]
    trainer = method if isinstance(method, Trainer) else methods[method.beside]
    return isinstance(trainer, Trainer) and trainer.full_batch in (None, task.full_batch)


def _ways(name: str, methods: Mapping[str, Trainer | Observer], task: Task, quick: bool) -> list[Way]:
    """The settings of a method that are searched first."""
    method = methods[name]
    most = 2 if quick else None
    if isinstance(method, Trainer):
        return [Way(name, method, setting) for setting in method.grid(task)[:most]]
    beside = methods[method.beside]
    assert isinstance(beside, Trainer)
    runs = beside.grid(task)[:most]
    return [Way(name, beside, setting, method, observing) for setting in runs for observing in method.grid[:most]]


def _without(way: Way, methods: Mapping[str, Trainer | Observer], task: Task) -> Way | None:
    """The same training without koopt."""
    for name in way.trainer.without:
        trainer = methods[name]
        if isinstance(trainer, Trainer) and trainer.full_batch in (None, task.full_batch):
            return Way(name, trainer, {key: value for key, value in way.setting.items() if key != "evaluated"})
    return None


def _with_options(search: Search, method: Trainer | Observer, quick: bool) -> list[Way]:
    """The two best settings of a search, with each of the method's options."""
    if not isinstance(method, Trainer):
        return []
    best = [way for way, _ in _ranked(search.tried)[:2]]
    options = method.options[: 1 if quick else None]
    return [replace(way, setting={**way.setting, **option}) for way in best for option in options]


def _narrowed(
    ways: Mapping[str, Sequence[Way]],
    scores: Mapping[str, Callable[[Record, int], Score]],
    trials: Trials,
    stage: str,
    progress: Progress,
) -> dict[str, Search]:
    """Try the best third by the first tuning seed on the second, and choose by both."""
    found = {name: _best_of(_tried(ways[name], scores[name], trials, FIRST[:1])) for name in ways}
    better = {
        name: [way for way, _ in _ranked(search.tried)[: -(-len(search.tried) // KEPT)]]
        for name, search in found.items()
    }
    return _retried(found, better, scores, trials, FIRST, stage, progress)


def _finalists(found: Mapping[str, Search]) -> dict[str, list[Way]]:
    """The best of those that were tried on both first seeds."""
    both = {
        name: [way for way, score in _ranked(search.tried) if len(score) == len(FIRST)]
        for name, search in found.items()
    }
    return {name: ways[:FINALISTS] for name, ways in both.items()}


def _retried(
    found: Mapping[str, Search],
    again: Mapping[str, Sequence[Way]],
    scores: Mapping[str, Callable[[Record, int], Score]],
    trials: Trials,
    seeds: Sequence[int],
    stage: str,
    progress: Progress,
) -> dict[str, Search]:
    """Some of what was tried, on all of the seeds, with the rest of it as it was, and the choice by both."""
    made = [(way, seed) for ways in again.values() for way in ways for seed in seeds]
    trials.make(made, f"{trials.task.name}: {stage}", progress)
    chosen = {}
    for name, search in found.items():
        renewed = {way.shown: score for way, score in _tried(again[name], scores[name], trials, seeds)}
        chosen[name] = _best_of([(way, renewed.get(way.shown, score)) for way, score in search.tried])
    return chosen


def _tried(
    ways: Sequence[Way], score: Callable[[Record, int], Score], trials: Trials, seeds: Sequence[int]
) -> list[tuple[Way, list[Score]]]:
    """Those of the ways that have trials, with their scores."""
    found = []
    for way in ways:
        records = [(record, seed) for seed in seeds if (record := trials.get(way, seed)) is not None]
        if records:
            found.append((way, [score(record, seed) for record, seed in records]))
    return found


def _ranked(tried: list[tuple[Way, list[Score]]]) -> list[tuple[Way, list[Score]]]:
    """The best first: those on most tuning seeds, by their scores, then the others."""
    return sorted(tried, key=lambda one: (-len(one[1]), overall(*one)))


def overall(way: Way, scores: Sequence[Score]) -> Score:
    """Over the tuning seeds: the mean, of the baseline the median, as single losses may differ a thousandfold."""
    columns = zip(*scores, strict=True)
    if way.method == BASELINE:
        return tuple(float(np.median(column)) for column in columns)
    return tuple(math.fsum(column) / len(column) for column in columns)


def _best_of(tried: list[tuple[Way, list[Score]]]) -> Search:
    ranked = _ranked(tried)
    return Search(ranked[0][0] if ranked else None, tried)


def losses_at_shares(record: Record, task: Task) -> list[float]:
    """The losses of a run at `SHARES` of the budget: what others are to reach."""
    curve = record.curve
    return [float(np.interp(share * task.steps, curve.cost, curve.loss)) for share in SHARES]


def _records(trials: Trials, way: Way, settings: Settings) -> dict[int, Record]:
    return {seed: record for seed in settings.reported if (record := trials.get(way, seed)) is not None}
