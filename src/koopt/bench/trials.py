"""Trials: runs by method, setting and seed, made in parallel, each kept in a file of its own and never made twice."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import math
import os
import re
import sys
import traceback
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import koopt
from koopt import report
from koopt.bench.run import Curve, Record, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from koopt.bench.method import Observer, Trainer
    from koopt.bench.task import Task

    Progress = Callable[[str, int, int], None]

# koopt's part in a run of one process
ENGINE = ("live/*.py", "forecasters.py", "least_squares.py", "linalg.py", "operator.py", "reductions.py")


@dataclass(frozen=True)
class Way:
    """A method with one setting of its search.

    Attributes:
        method: its name.
        trainer: trains; of an observer the one beside which it is.
        setting: of the trainer.
        observer: None for a trainer.
        observing: the observer's setting.
    """

    method: str
    trainer: Trainer
    setting: Mapping[str, Any]
    observer: Observer | None = None
    observing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The whole setting."""
        return ", ".join(f"{name} {_short(value)}" for name, value in {**self.setting, **self.observing}.items())

    @property
    def alone(self) -> Way:
        """The trainer without the observer."""
        return Way(self.trainer.name, self.trainer, self.setting)

    def identity(self, task: Task, seed: int) -> dict[str, Any]:
        """All that determines the trial but the source of other code than koopt's own."""
        found: dict[str, Any] = {"task": task.name, "steps": task.steps, "looks": task.looks}
        found |= {"method": self.method, "setting": dict(self.setting), "seed": seed}
        if self.observer is not None:
            found |= {"beside": self.trainer.name, "observing": dict(self.observing)}
        if self.method.startswith("koopt"):
            found["koopt"] = {"attach": _attach_defaults(), "source": _source_of_engine()}
        return json.loads(json.dumps(found))


class Trials:
    """The trials of a task on disk.

    Attributes:
        failed: method -> what went wrong, in one line.
        outdated: sources that have changed since some of the trials were made.

    Args:
        task: whose trials.
        folder: where they are, in a subfolder.
        jobs: how many at a time, as joblib counts; None: what ``joblib.parallel_config`` says, or one.
        frozen: whether none is made, and only what is there is read.
    """

    def __init__(self, task: Task, folder: Path, jobs: int | None = None, frozen: bool = False) -> None:
        self.task, self.folder, self.jobs, self.frozen = task, folder / "trials", jobs, frozen
        self.failed: dict[str, str] = {}
        self.outdated: set[str] = set()
        self._read: dict[Path, Record] = {}

    def get(self, way: Way, seed: int) -> Record | None:
        """The record of a trial; None if there is none.

        Raises:
            ValueError: if its file is damaged.
        """
        path, identity = self.path(way, seed)
        if path not in self._read:
            if not path.exists():
                return None
            try:
                kept = json.loads(path.read_text())
                record, source = _from_json(kept), dict(kept["source"])
                if kept["identity"] != identity:
                    raise ValueError("another trial")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is damaged; delete it, and the same command makes it again") from error
            self.outdated |= {name for name, digest in _sources(self.task, way).items() if source.get(name) != digest}
            self._read[path] = record
        return self._read[path]

    def make(self, asked: Iterable[tuple[Way, int]], stage: str, progress: Progress, test: bool = False) -> None:
        """Make those trials that are not there; a method that fails is put down in `failed`, and others go on.

        Args:
            asked: ways and seeds; observers of the same run are served by one.
            stage: what the progress is called.
            progress: called with the stage, the runs done and those in all.
            test: whether the test split is read at the end.

        Raises:
            OSError: if a process is killed, or the disk fails.
        """
        if self.frozen:
            return
        groups: dict[str, tuple[Way, int, list[Way]]] = {}
        for way, seed in asked:
            if self.get(way, seed) is None and way.method not in self.failed:
                name = json.dumps([way.alone.identity(self.task, seed)])
                groups.setdefault(name, (way.alone, seed, []))[2].append(way)
        if not groups:
            return
        import joblib
        from joblib.externals.loky.process_executor import BrokenProcessPool

        self.folder.mkdir(parents=True, exist_ok=True)
        progress(stage, done := 0, len(groups))
        parallel: Any = joblib.Parallel(n_jobs=self.jobs, return_as="generator_unordered")
        listed = list(groups.values())
        tasks = (joblib.delayed(_attempt)(i, self.task, *group, test) for i, group in enumerate(listed))
        try:
            for i, records, error in parallel(tasks):
                alone, seed, ways = listed[i]
                served = [alone, *(way for way in ways if way.observer is not None)]
                if records is None:
                    self._fail(ways, error)
                else:
                    for way, record in zip(served, records, strict=True):
                        self._keep(way, seed, record)
                progress(stage, done := done + 1, len(groups))
        except BrokenProcessPool as error:
            raise OSError("a process was killed, perhaps for want of memory; the same command goes on") from error

    def path(self, way: Way, seed: int) -> tuple[Path, dict[str, Any]]:
        """Where a trial is kept, and its identity."""
        identity = way.identity(self.task, seed)
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / f"{re.sub('[^a-z0-9]+', '-', way.method.lower())}-seed{seed}-{digest}.json", identity

    def _keep(self, way: Way, seed: int, record: Record) -> None:
        path, identity = self.path(way, seed)
        if path.exists():
            return
        content = {"identity": identity, "source": _sources(self.task, way), "machine": report.machine()}
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(content | _to_json(record), allow_nan=False))
        os.replace(temporary, path)

    def _fail(self, ways: Sequence[Way], error: str) -> None:
        for way in ways:
            path = self.folder.parent / f"failed-{re.sub('[^a-z0-9]+', '-', way.method.lower())}.txt"
            path.write_text(error)
            self.failed.setdefault(way.method, f"{way.method}: {error.strip().splitlines()[-1]}; see {path}")


def _attempt(
    place: int, task: Task, alone: Way, seed: int, ways: list[Way], test: bool
) -> tuple[int, list[Record] | None, str]:
    """One run with those who observe it; an error is returned, so that other methods go on."""
    observed = [(way.observer, way.observing) for way in ways if way.observer is not None]
    try:
        return place, run(task, alone.trainer, alone.setting, seed, observed, test), ""
    except Exception:
        return place, None, traceback.format_exc()


def _to_json(record: Record) -> dict[str, Any]:
    curve = {f.name: [_plain(value) for value in getattr(record.curve, f.name).tolist()] for f in fields(Curve)}
    return {"diverged": record.diverged, "test": record.test and _plain(record.test), "curve": curve}


def _from_json(kept: dict[str, Any]) -> Record:
    columns = {
        f.name: np.array([math.inf if v is None else v for v in kept["curve"][f.name]], float) for f in fields(Curve)
    }
    return Record(Curve(**columns), kept["test"], kept["diverged"])


def _plain(value: float) -> float | None:
    if not math.isfinite(value):
        return None
    return int(value) if abs(value) < 1e15 and value == int(value) else value


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@functools.cache
def _attach_defaults() -> dict[str, str]:
    """koopt's settings: its runs use the defaults of ``koopt.attach``."""
    given = inspect.signature(koopt.attach).parameters.values()
    return {one.name: repr(one.default) for one in given if one.default is not inspect.Parameter.empty}


def _source_of_engine() -> str:
    folder = Path(koopt.__file__).parent
    return _digest(*sorted(path for pattern in ENGINE for path in folder.glob(pattern)))


def _sources(task: Task, way: Way) -> dict[str, str]:
    """Digests of the code that a trial depends on; of a method also of what it takes from koopt itself."""
    own = _file_of(way.trainer.start if way.observer is None else way.observer.start)
    return {
        f"task {task.name}": _digest(_file_of(task.problem)),
        f"method {way.method}": _digest(own, *_taken_from_koopt(own)),
        "bench/run.py": _digest(Path(__file__).with_name("run.py")),  # what is counted and timed, and how
    }


def _file_of(function: Any) -> Path:
    while isinstance(function, functools.partial):
        function = function.func
    return Path(sys.modules[function.__module__].__file__ or "")


@functools.cache
def _taken_from_koopt(path: Path) -> tuple[Path, ...]:
    """The modules outside of the benchmark that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        package, *parts = (node.module or "").split(".")
        if package == "koopt" and parts[:1] != ["bench"]:
            whole = Path(koopt.__file__).parent.joinpath(*parts)
            listed = [whole.with_suffix(".py"), *(whole / f"{name.name}.py" for name in node.names)]
            found.update(one for one in listed if one.is_file())
    return tuple(sorted(found))


@functools.cache
def _digest(*paths: Path) -> str:
    """Of what the code does: comments, docstrings, layout and the types of arguments make no difference."""
    found = hashlib.sha256()
    for path in paths:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
            if isinstance(node, ast.FunctionDef):
                node.returns = None
            if isinstance(node, ast.arg):
                node.annotation = None
        found.update(ast.dump(tree).encode())
    return found.hexdigest()[:12]
