"""Train many networks as one tensor program and keep losses and weights on disk, so that a stopped run goes on."""

from __future__ import annotations

import io
import math
import os
import zipfile
import zlib
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from koopt import system
from koopt.experiments import oscillator, workers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    # the betas of the Hamiltonian networks' published code; with PyTorch's own, Adam is still far from smooth at t1
    "adam": lambda weights: torch.optim.Adam(weights, betas=(0.999, 0.9999)),
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
}
TRAIL = 100  # steps between the weights kept of the whole run
SAVE = 1000  # steps between restart points


@dataclass(frozen=True)
class Run:
    """What is trained and what of it is kept.

    Attributes:
        optimizer: "adam", "adagrad" or "adadelta", with the learning rate 8/(1000 + step).
        seeds: how many networks; network i starts from seed `seed` + i.
        seed: the first seed.
        steps: optimizer steps.
        t1, t2: first and last step of the window in which every step's weights are kept.
    """

    optimizer: str
    seeds: int = 25
    seed: int = 0
    steps: int = 60_000
    t1: int = 35_000
    t2: int = 45_000

    @property
    def name(self) -> str:
        return f"{self.optimizer}-{self.seeds}x{self.steps}-seed{self.seed}"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the arrays on disk; see :class:`Recording`."""
        size = len(oscillator.initial_weights(0))
        return {
            "loss": (self.steps + 1, self.seeds),
            "window": (self.t2 - self.t1 + 1, self.seeds, size),
            "trail": (self.steps // TRAIL + 1, self.seeds, size),
        }

    def rows(self, step: int) -> dict[str, int]:
        """How many rows of each array are written before `step` is."""
        return {
            "loss": step,
            "window": min(max(step - self.t1, 0), self.t2 - self.t1 + 1),
            "trail": -(-step // TRAIL),
        }


@dataclass(frozen=True)
class Recording:
    """A finished run, mapped from disk.

    Attributes:
        run: its settings.
        loss: `(steps + 1, seeds)`, loss before each step, and after the last.
        window: `(t2 - t1 + 1, seeds, weights)`, weights at every step of the window.
        trail: `(steps / 100 + 1, seeds, weights)`, weights at every 100th step.
    """

    run: Run
    loss: np.ndarray
    window: np.ndarray
    trail: np.ndarray


def record(run: Run, folder: Path, advance: Callable[[int], bool]) -> bool:
    """Train a run to its end, or go on with it where it stopped.

    Args:
        run: what to train.
        folder: where it is kept, in a subfolder of the run's name.
        advance: called with the current step now and then; returns whether to go on.

    Returns:
        Whether the run is complete.

    Raises:
        ValueError: if what the subfolder holds is of another run, incomplete or damaged.
        OSError: if the disk has less free space than the run needs, or another process is recording the same run.
    """
    state = restart_point(run, folder)
    going = advance(state["step"])
    if state["step"] > run.steps or not going:
        return state["step"] > run.steps
    if state["step"] == 0:
        system.require_space(folder, missing_bytes(run, folder))
    folder = folder / run.name
    folder.mkdir(parents=True, exist_ok=True)
    with system.alone(folder):
        return _train(run, folder, state, advance)


def _train(run: Run, folder: Path, state: dict[str, Any], advance: Callable[[int], bool]) -> bool:
    step, checks = state["step"], state["crc32"]
    weights = torch.stack([oscillator.initial_weights(run.seed + i) for i in range(run.seeds)]).requires_grad_()
    optimizer = OPTIMIZERS[run.optimizer]([weights])
    if step:
        with torch.no_grad():
            weights.copy_(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        arrays = _mapped(run, folder, step, checks, "r+")
    else:
        arrays = {name: system.allocated(folder / f"{name}.npy", shape) for name, shape in run.shapes.items()}
    times = oscillator.time_points()

    def keep(name: str, row: int, values: np.ndarray) -> None:
        arrays[name][row] = values
        checks[name] = _checksum(values, checks[name])

    going = True
    while going and step <= run.steps:
        optimizer.zero_grad()
        loss = oscillator.batched_loss(weights, times)
        values = weights.detach().numpy()
        keep("loss", step, loss.detach().numpy())
        if run.t1 <= step <= run.t2:
            keep("window", step - run.t1, values)
        if step % TRAIL == 0:
            keep("trail", step // TRAIL, values)
            going = advance(step)
        if step < run.steps:
            for group in optimizer.param_groups:
                group["lr"] = 8 / (1000 + step)
            loss.sum().backward()
            optimizer.step()
        step += 1
        if step % SAVE == 0 or not going or step > run.steps:
            for array in arrays.values():
                array.flush()
            state = {"step": step, "crc32": checks, "weights": weights.detach(), "optimizer": optimizer.state_dict()}
            _write_restart_point(run, folder, state)
    return step > run.steps


def record_all(runs: Sequence[Run], folder: Path, progress: Callable[[str, int, int], None]) -> bool:
    """:func:`record` several runs, each in a process of its own, as many at a time as there are cores.

    Ctrl-C lets each save where it is; a second one stops them at once, with up to 1,000 steps to be done again.

    Args:
        runs: what to train.
        folder: where they are kept.
        progress: called with an optimizer's name, its step and its total.

    Returns:
        Whether all are complete; False after Ctrl-C.

    Raises:
        ValueError: if what the folder holds is of another run, incomplete or damaged.
        OSError: if the disk is too small or fails, or a process is killed; the others save where they are.
    """
    steps = {run: restart_point(run, folder)["step"] for run in runs}
    system.require_space(folder, sum(missing_bytes(run, folder) for run in runs if steps[run] == 0))
    left = [run for run in runs if steps[run] <= run.steps]
    for run in runs:
        if run not in left:
            opened(run, folder)  # damage shows before the others are trained
    for run in runs:
        progress(run.optimizer, min(steps[run], run.steps), run.steps)
    return workers.run_all([(run.optimizer, run.steps, partial(record, run, folder)) for run in left], progress)


def opened(run: Run, folder: Path) -> Recording:
    """The arrays of a complete run, read-only.

    Raises:
        ValueError: if the run is not complete, or damaged.
    """
    state = restart_point(run, folder)
    if state["step"] <= run.steps:
        raise ValueError(f"{folder / run.name} holds {state['step']} of {run.steps} steps; call record() to go on")
    return Recording(run, **_mapped(run, folder / run.name, state["step"], state["crc32"], "r"))


def restart_point(run: Run, folder: Path) -> dict[str, Any]:
    """Where a run stands: the step to be done next, and what it takes to do it; step 0 if nothing is kept.

    Raises:
        ValueError: if what is kept is of another run, or damaged.
    """
    path = folder / run.name / "restart.pt"
    if not path.exists():
        return {"step": 0, "crc32": dict.fromkeys(run.shapes, 0)}
    try:
        with zipfile.ZipFile(path) as archive:
            sound = archive.testzip() is None  # torch does not look at the checksums
        kept = torch.load(path, weights_only=True) if sound else {}
        recorded = dict(kept["run"])
        state = {name: kept[name] for name in ("step", "crc32", "weights", "optimizer")}
    except OSError:
        raise
    except Exception as error:  # damage shows in many ways
        raise ValueError(f"{path} is damaged; delete {path.parent} to train this run again") from error
    for name, asked in asdict(run).items():
        if recorded.get(name) != asked:
            raise ValueError(
                f"{path.parent} was recorded with {name} = {recorded.get(name)}, asked for is {asked}; "
                "delete it or choose another folder"
            )
    return state


def missing_bytes(run: Run, folder: Path) -> int:
    """Bytes that a run from its first step will take on disk, beyond those that its files already have."""
    wanted = sum(8 * math.prod(shape) for shape in run.shapes.values())
    return max(0, wanted - sum(system.bytes_on_disk(folder / run.name / f"{name}.npy") for name in run.shapes))


def _write_restart_point(run: Run, folder: Path, state: dict[str, Any]) -> None:
    content = io.BytesIO()
    torch.save({**state, "run": asdict(run)}, content)
    temporary = folder / "restart.tmp"
    temporary.write_bytes(content.getbuffer())
    os.replace(temporary, folder / "restart.pt")


def _mapped(
    run: Run, folder: Path, step: int, checks: dict[str, int], mode: Literal["r", "r+"]
) -> dict[str, np.memmap]:
    """The arrays of a run that stands before `step`, if they hold what was written to them."""
    arrays, rows = {}, run.rows(step)
    for name, shape in run.shapes.items():
        path = folder / f"{name}.npy"
        try:
            # first without "r+", which would fill up a file that is cut off
            array = np.lib.format.open_memmap(path, mode="r")
            sound = array.shape == shape and array.dtype == np.float64
            sound = sound and _checksum(array[: rows[name]]) == checks[name]
        except PermissionError:
            raise
        except Exception:  # damage shows in many ways
            sound = False
        if not sound:
            raise ValueError(f"{path} is missing or damaged; delete {folder} to train this run again")
        arrays[name] = np.lib.format.open_memmap(path, mode=mode)
    return arrays


def _checksum(values: np.ndarray, before: int = 0) -> int:
    return zlib.crc32(values.data, before) if values.size else before
