"""What the machine has to give: seeds, a thread, space on disk, a folder to oneself, Ctrl-C without loss."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from typing import TYPE_CHECKING

import numpy as np
import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LAST_SEED = 2**64 - 1  # of torch.manual_seed


def require_seeds(seed: int, seeds: int = 1) -> None:
    """Refuse seeds that torch does not take: from `seed` on, so many."""
    if seeds < 1:
        raise ValueError(f"--seeds is {seeds}, expected at least 1")
    if not 0 <= seed <= LAST_SEED - seeds + 1:
        several = f"the last of {seeds} seeds " if seeds > 1 else ""
        raise ValueError(f"--seed is {seed}, expected 0 or more, and {several}below 2^64")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, so that times are comparable."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def require_folder(folder: Path, name: str) -> None:
    """Refuse, before any work, an output folder that could not be written; `name` is what the user calls it."""
    place = _existing(folder)
    if not place.is_dir():
        raise NotADirectoryError(f"{name} is {folder}, but {place} is a file; choose a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{name} is {folder}, but {place} cannot be written; choose another folder")


def require_space(folder: Path, nbytes: int) -> None:
    """Refuse to start what the disk cannot hold; the folder need not exist yet."""
    place = _existing(folder)
    free = shutil.disk_usage(place).free
    if nbytes > free:
        raise OSError(
            f"{place}: {nbytes / 2**20:,.0f} MiB are needed on disk, {free / 2**20:,.0f} MiB are free; "
            "choose another disk or fewer seeds"
        )


def bytes_on_disk(path: Path) -> int:
    """What a file takes; 0 if there is none."""
    if not path.exists():
        return 0
    status = path.stat()
    return 512 * status.st_blocks if hasattr(status, "st_blocks") else status.st_size


def allocated(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A new float64 array on disk with all its space taken."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float64, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:  # a full disk is an error here, not a bus error at some later write
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from None
    return array


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes, where the system can do that."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{folder}: another process writes here; wait for it or choose another folder") from None
        except OSError:
            pass  # some network disks have no locks
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def interrupts(ignored: bool = False) -> Iterator[list[int]]:
    """Collect Ctrl-C in a list instead of raising it at any place; only the main thread ever gets it."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else lambda number, _: seen.append(number))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
