"""What a command shows in a terminal: bars while it works, tables when it is done."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console
    from rich.progress import Progress

PIPED = 160  # letters of a line where no one has to look at it in a window
EVERY = 30.0  # seconds between the lines of a stage where there is no terminal


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Bars of what is done of so many, with an ETA, one a stage; nothing is shown before the first.

    In a file or a pipe there is a line of each every half minute, and one of how far it came.

    >>> with progress() as progress:
    ...     pass
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn())
    ends = (TextColumn("elapsed"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with _shown(Progress(*columns, *ends, console=Console(stderr=True))) as tell:
        yield tell


@contextlib.contextmanager
def progress_in_bytes() -> Iterator[Callable[[str, int, int], None]]:
    """Bars of bytes with an ETA, one a stage; none where no one sees them.

    >>> with progress_in_bytes() as progress:
    ...     progress("read", 1, 2)
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description:<8}"), BarColumn(), DownloadColumn(binary_units=True))
    ends = (TransferSpeedColumn(), TextColumn("left"), TimeRemainingColumn())
    console = Console(stderr=True)
    with _shown(Progress(*columns, *ends, console=console, disable=not console.is_terminal)) as tell:
        yield tell


@contextlib.contextmanager
def _shown(bars: Progress) -> Iterator[Callable[[str, int, int], None]]:
    tasks: dict[str, Any] = {}
    said: dict[str, float] = {}  # when a stage last had a line
    live = bars.console.is_terminal

    def say(stage: str) -> None:
        said[stage] = time.monotonic()
        bars.console.print(bars.make_tasks_table([bars.tasks[tasks[stage]]]))

    def tell(stage: str, done: int, total: int) -> None:
        if not tasks and live:
            bars.start()
        if stage not in tasks:
            tasks[stage], said[stage] = bars.add_task(stage, total=total), time.monotonic()
        bars.update(tasks[stage], completed=min(done, total))
        if not live and not bars.disable and time.monotonic() - said[stage] >= EVERY:
            say(stage)

    try:
        yield tell
    finally:
        if tasks and live:
            bars.stop()
        elif not bars.disable:
            for stage in tasks:
                say(stage)


def wide_console() -> Console:
    """A console for tables, at least 100 wide, more in a file or a pipe; text is printed as it stands.

    >>> wide_console().width >= 100
    True
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    # a wrapped table is easier to read than a cut one
    console.width = max(console.width, 100 if console.is_terminal else PIPED)
    return console
