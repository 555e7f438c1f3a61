"""Long tasks, each in a process of its own, with progress, Ctrl-C and no orphans."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import queue
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

import torch

from koopt import system
from koopt.memory import free_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Work = Callable[[Callable[[int], bool]], bool]


def run_all(
    tasks: Sequence[tuple[str, int, Work]], progress: Callable[[str, int, int], None], nbytes: int = 2**28
) -> bool:
    """Run tasks, as many at a time as there are cores and room in memory.

    Ctrl-C asks each to save where it is; a second one stops them at once.

    Args:
        tasks: each with its name, its number of steps and the work: called with a function that takes the current step
            and tells whether to go on; returns whether it is complete. The work must be picklable.
        progress: called with a task's name, its step and its total.
        nbytes: memory that a task takes.

    Returns:
        Whether all are complete; False after Ctrl-C.

    Raises:
        OSError: if a process is killed; the others save where they are.
        Exception: what a task raised, once the others have saved.
    """
    if not tasks:
        return True
    context = multiprocessing.get_context("spawn")
    news, stop = context.Queue(), context.RawValue("b", 0)  # without a lock that a killed worker could hold
    others = set(multiprocessing.active_children())
    free = free_memory(torch.device("cpu"))
    room = math.inf if free is None else max(1, free // nbytes)
    workers = int(min(len(tasks), os.cpu_count() or 1, room))
    with system.interrupts() as interrupts, ProcessPoolExecutor(workers, context, _start_worker, (news, stop)) as pool:
        with system.interrupts(ignored=True):  # by the workers as well, which inherit it: they are told through `stop`
            running = [pool.submit(_work, *task) for task in tasks]
        try:
            while not all(task.done() for task in running):
                if interrupts or any(task.done() and task.exception() for task in running):
                    stop.value = 1
                if len(interrupts) > 1:
                    for worker in set(multiprocessing.active_children()) - others:
                        worker.kill()
                with contextlib.suppress(queue.Empty):
                    progress(*news.get(timeout=0.1))
        finally:
            stop.value = 1
    with contextlib.suppress(queue.Empty):
        while True:
            progress(*news.get(timeout=0.1))
    try:
        complete = [task.result() for task in running]  # of all: a later one may hold the error that stopped the first
    except BrokenProcessPool as error:
        if interrupts:
            return False
        raise OSError(
            "a training process was killed, perhaps for want of memory; the same command goes on where it was"
        ) from error
    return all(complete) and not interrupts


_news: Any = None
_stop: Any = None


def _start_worker(news: Any, stop: Any) -> None:
    global _news, _stop
    _news, _stop = news, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it is not inherited
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # without it a worker whose parent was killed trains on, or waits for work, for ever


def _work(name: str, steps: int, work: Work) -> bool:
    def advance(step: int) -> bool:
        _news.put((name, min(step, steps), steps))
        return not _stop.value

    return work(advance)
