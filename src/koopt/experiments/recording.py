"""Train many networks as one tensor program and keep losses and weights on disk, so that a stopped run goes on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from koopt.experiments import oscillator

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
    def nbytes(self) -> int:
        """Bytes on disk."""
        size = len(oscillator.initial_weights(0))
        return 8 * self.seeds * ((self.t2 - self.t1 + 1 + self.steps // TRAIL + 1) * size + self.steps + 1)


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
        OSError: if the disk has less free space than the run needs.
    """
    folder = folder / run.name
    folder.mkdir(parents=True, exist_ok=True)
    restart = folder / "restart.pt"
    start = torch.stack([oscillator.initial_weights(run.seed + i) for i in range(run.seeds)])
    weights = start.requires_grad_()
    optimizer = OPTIMIZERS[run.optimizer]([weights])
    step = 0
    if restart.exists():
        state = torch.load(restart, weights_only=True)
        step = state["step"]
        with torch.no_grad():
            weights.copy_(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
    else:
        require_space(folder, run.nbytes)
    shapes = _shapes(run, weights.shape[1])
    maps = {name: _open(folder / f"{name}.npy", shape, fresh=step == 0) for name, shape in shapes.items()}
    times = oscillator.time_points()

    def save() -> None:
        for array in maps.values():
            array.flush()
        state = {"step": step, "weights": weights.detach(), "optimizer": optimizer.state_dict(), "run": asdict(run)}
        torch.save(state, restart.with_suffix(".tmp"))
        os.replace(restart.with_suffix(".tmp"), restart)

    going = advance(step)
    while going and step <= run.steps:
        optimizer.zero_grad()
        loss = oscillator.batched_loss(weights, times)
        values = weights.detach().numpy()
        maps["loss"][step] = loss.detach().numpy()
        if run.t1 <= step <= run.t2:
            maps["window"][step - run.t1] = values
        if step % TRAIL == 0:
            maps["trail"][step // TRAIL] = values
            going = advance(step)
        if step < run.steps:
            for group in optimizer.param_groups:
                group["lr"] = 8 / (1000 + step)
            loss.sum().backward()
            optimizer.step()
        step += 1
        if step % SAVE == 0 or not going or step > run.steps:
            save()
    return step > run.steps


def record_all(runs: Sequence[Run], folder: Path, progress: Callable[[str, int, int], None]) -> bool:
    """:func:`record` several runs, each in a process of its own, as many at a time as there are cores.

    Args:
        runs: what to train.
        folder: where they are kept.
        progress: called with an optimizer's name, its step and its total.

    Returns:
        Whether all are complete; False after Ctrl-C, when each has saved where it was.

    Raises:
        OSError: if a disk is too small or fails; the others save where they are.
    """
    context = multiprocessing.get_context("spawn")
    news, stop = context.Queue(), context.Event()
    workers = min(len(runs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, context, _start_worker, (news, stop)) as pool:
        waiting = [pool.submit(_record_in_worker, run, folder) for run in runs]
        try:
            while not all(task.done() for task in waiting):
                with contextlib.suppress(queue.Empty):
                    progress(*news.get(timeout=0.2))
                if any(task.done() and task.exception() for task in waiting):
                    stop.set()
        except KeyboardInterrupt:
            stop.set()
        complete = [task.result() for task in waiting]
    with contextlib.suppress(queue.Empty):
        while True:
            progress(*news.get(timeout=0.2))
    return all(complete)


def opened(run: Run, folder: Path) -> Recording:
    """The arrays of a complete run, read-only."""
    folder = folder / run.name
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("loss", "window", "trail")}
    return Recording(run, **arrays)


def require_space(folder: Path, nbytes: int) -> None:
    """Refuse to start what the disk cannot hold."""
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise OSError(f"{folder}: the run needs {nbytes / 2**20:,.0f} MiB on disk, {free / 2**20:,.0f} MiB are free")


def _shapes(run: Run, size: int) -> dict[str, tuple[int, ...]]:
    return {
        "loss": (run.steps + 1, run.seeds),
        "window": (run.t2 - run.t1 + 1, run.seeds, size),
        "trail": (run.steps // TRAIL + 1, run.seeds, size),
    }


def _open(path: Path, shape: tuple[int, ...], fresh: bool) -> np.memmap:
    array = np.lib.format.open_memmap(path, mode="w+" if fresh else "r+", dtype=np.float64, shape=shape)
    if fresh and hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:  # a full disk is an error here, not a bus error at some later write
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


_news: Any = None
_stop: Any = None


def _start_worker(news: Any, stop: Any) -> None:
    global _news, _stop
    _news, _stop = news, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells the workers to stop
    torch.set_num_threads(1)


def _record_in_worker(run: Run, folder: Path) -> bool:
    def advance(step: int) -> bool:
        _news.put((run.optimizer, min(step, run.steps), run.steps))
        return not _stop.is_set()

    return record(run, folder, advance)
