"""What a command shows in a terminal: bars while it works, tables when it is done."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console
    from rich.progress import Progress


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Bars of what is done of so many, with an ETA, one a stage; nothing is shown before the first.

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

    def tell(stage: str, done: int, total: int) -> None:
        if not tasks:
            bars.start()
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=min(done, total))

    try:
        yield tell
    finally:
        if tasks:
            bars.stop()


def wide_console() -> Console:
    """A console for tables, at least 100 wide.

    >>> wide_console().width >= 100
    True
    """
    from rich.console import Console

    console = Console()
    console.width = max(console.width, 100)  # a wrapped table is easier to read than a cut one
    return console
