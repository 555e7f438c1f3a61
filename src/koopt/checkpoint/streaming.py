"""Reading checkpoints side by side, a block at a time: memory does not grow with their size."""

from __future__ import annotations

import contextlib
import os
import queue
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from typing import BinaryIO

    from torch import Tensor

    from koopt.checkpoint.groups import Slab
    from koopt.checkpoint.stored import Checkpoint, Entry

Result = TypeVar("Result")
WORKERS = min(4, os.cpu_count() or 1)  # more than a few only wait for the disk
BUDGET = 256 * 2**20 // WORKERS  # bytes of a block, over all checkpoints; each worker holds one
OPEN = 64 // WORKERS  # files that each worker keeps open; a process may have 256 or 1024 in all
LARGEST = 8 * 2**20  # bytes of a block in one checkpoint


class Block(NamedTuple):
    """A part of one tensor: from number `start` on, `width` of each of `patches` patches, the slab's `first` on."""

    slab: Slab
    name: str
    start: int
    first: int
    patches: int
    width: int

    @property
    def numbers(self) -> int:
        return self.patches * self.width


def blocks(slab: Slab, entries: dict[str, Entry], nbytes: int, skip: Sequence[str] = ()) -> Iterator[Block]:
    """Cut a slab's tensors, but for those to skip, into blocks of at most `nbytes` bytes."""
    for name in slab.group.names:
        if name in skip:
            continue
        width = entries[name].size // slab.group.patches
        numbers = nbytes // entries[name].dtype.itemsize
        if width <= numbers:
            most = numbers // width
            for first in range(slab.first, slab.stop, most):
                patches = min(most, slab.stop - first)
                yield Block(slab, name, first * width, first - slab.first, patches, width)
            continue
        for patch in range(slab.first, slab.stop):
            for column in range(0, width, numbers):
                start = patch * width + column
                yield Block(slab, name, start, patch - slab.first, 1, min(numbers, width - column))


def block_bytes(snapshots: int) -> int:
    """The size of a block in one checkpoint.

    >>> block_bytes(10**9)
    8
    """
    return max(8, min(BUDGET // snapshots, LARGEST) // 8 * 8)


def work_through(
    checkpoints: Sequence[Checkpoint],
    asked: Iterator[Block],
    work: Callable[[Block, Tensor], Result],
    tell: Callable[[int], None] | None = None,
) -> Iterator[tuple[Block, Result]]:
    """Read each block of all checkpoints and do a piece of work on it, a few blocks at a time, in order.

    Plain reads into buffers: the pages of a mapped file would count as memory of this process. Each block is read and
    worked on by one thread, so that reading one overlaps with the arithmetic on another.

    Args:
        checkpoints: in order of time.
        asked: the blocks.
        work: gets a block and its numbers `(checkpoints, numbers)` in the stored dtype, which it must not keep.
        tell: called with the bytes read since the last time.
    """
    desks: queue.SimpleQueue[Desk] = queue.SimpleQueue()
    made = [Desk(checkpoints) for _ in range(WORKERS)]
    for desk in made:
        desks.put(desk)

    def at_a_desk(block: Block) -> tuple[Block, Result, int]:
        desk = desks.get()
        try:
            rows = desk.read(block)
            return block, work(block, rows), rows.numel() * rows.element_size()
        finally:
            desks.put(desk)

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(WORKERS, "koopt", initializer=torch.set_num_threads, initargs=(1,))
    try:
        running = deque(pool.submit(at_a_desk, block) for block in islice(asked, 2 * WORKERS))
        while running:
            block, result, nbytes = running.popleft().result()
            running.extend(pool.submit(at_a_desk, block) for block in islice(asked, 1))
            if tell is not None:
                tell(nbytes)
            yield block, result
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
        for desk in made:
            desk.close()


class Desk:
    """What one worker reads with: a buffer, and an open file for each of the first checkpoints."""

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self._checkpoints = checkpoints
        self._buffer = np.empty(len(checkpoints) * block_bytes(len(checkpoints)), np.uint8)
        self._open: dict[int, tuple[Path, BinaryIO]] = {}

    def read(self, block: Block) -> Tensor:
        """The numbers of a block, `(checkpoints, numbers)` in the stored dtype; valid until the next call."""
        entries = [checkpoint.entries[block.name] for checkpoint in self._checkpoints]
        dtype = entries[-1].dtype
        length = block.numbers * dtype.itemsize
        held = self._buffer[: len(entries) * length]
        for i, entry in enumerate(entries):
            with self._file(i, entry.file) as file:
                file.seek(entry.offset + block.start * dtype.itemsize)
                read_fully(file, held.data[i * length : (i + 1) * length], entry.file, block.name)
        return torch.from_numpy(held).view(dtype).view(len(entries), block.numbers)

    def close(self) -> None:
        """Close the files."""
        for _, file in self._open.values():
            file.close()

    @contextlib.contextmanager
    def _file(self, index: int, path: Path) -> Iterator[BinaryIO]:
        """A checkpoint's file, open; those beyond ``OPEN`` only for as long as it takes."""
        if index >= OPEN:
            with path.open("rb", buffering=0) as file:
                yield file
            return
        if index not in self._open or self._open[index][0] != path:
            if index in self._open:
                self._open.pop(index)[1].close()
            self._open[index] = (path, path.open("rb", buffering=0))
        yield self._open[index][1]


def read_fully(file: BinaryIO, place: memoryview, path: Path, name: str) -> None:
    """Fill `place` from a file; one that ends first was changed while it was read."""
    done = 0
    while done < len(place):
        count = file.readinto(place[done:])  # type: ignore[attr-defined], which opened files have
        if not count:
            raise ValueError(f"{path}: truncated within tensor {name!r} while it was read; copy it again")
        done += count
