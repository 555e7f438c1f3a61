"""The command line: ``koopt reproduce de-solver``."""

from __future__ import annotations

import argparse
import contextlib
import io
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import koopt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

COLUMNS = {
    "setting": "setting",
    "by": "operator",
    "success": "success",
    "teq_over_T": "T_eq/T",
    "teq_over_T_mean": "…\nmean",
    "censored": "cen-\nsored",
    "error_over_motion": "error/\nmotion",
    "residual": "resi-\ndual",
    "max_modulus": "max\n|λ|",
    "speedup": "speed-\nup",
    "speedup_with_recording": "… with\nrecord.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, or 2 for bad input with one line on stderr, or 130 after Ctrl-C."""
    given = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter still gets the table
    try:
        return given.command(given)
    except KeyboardInterrupt:
        if arguments is None:  # the process ends here; a second Ctrl-C must not break in
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("koopt: interrupted; what is recorded stays, and the same command goes on", file=sys.stderr)
        return 130
    except ModuleNotFoundError as missing:
        print(
            f"koopt: {(missing.name or '').partition('.')[0]} is not installed; pip install 'koopt[experiments]'",
            file=sys.stderr,
        )
        return 2
    except (ValueError, OSError) as error:
        print(f"koopt: {_one_line(str(error))}", file=sys.stderr)
        return 2


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {_one_line(message)}; see {self.prog} --help\n")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(prog="koopt", description="Koopman training: forecast a network's weights.")
    parser.add_argument("--version", action="version", version=f"koopt {koopt.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    reproduce = commands.add_parser("reproduce", help="rerun an experiment of the paper")
    experiments = reproduce.add_subparsers(required=True, metavar="EXPERIMENT")
    solver = experiments.add_parser("de-solver", help="Table 1 and Figures 2, S5 and S6")
    solver.set_defaults(command=_reproduce_de_solver)
    solver.add_argument("--optimizer", default="all", help="adam, adagrad, adadelta or all (default)")
    solver.add_argument(
        "--output",
        type=Path,
        default=Path("results/de-solver"),
        metavar="DIR",
        help="where recordings, figures and result.json go (%(default)s)",
    )
    solver.add_argument("--seed", type=int, default=0, help="first seed (%(default)s)")
    solver.add_argument("--seeds", type=int, help="how many networks (25; 5 with --quick)")
    solver.add_argument(
        "--horizon",
        type=int,
        action="append",
        metavar="T",
        help="optimizer steps ahead, a multiple of 100; may be repeated",
    )
    solver.add_argument("--quick", action="store_true", help="fewer steps and seeds, about two minutes")
    return parser


def _reproduce_de_solver(given: argparse.Namespace) -> int:
    from dataclasses import replace

    from rich.console import Console

    from koopt.experiments import de_solver, methods, report

    chosen: dict[str, Any] = {"seed": given.seed}
    if given.optimizer != "all":
        chosen["optimizers"] = (given.optimizer,)
    if given.seeds is not None:
        chosen["seeds"] = given.seeds
    if given.horizon:
        chosen["horizons"] = tuple(given.horizon)
    settings = replace(methods.QUICK if given.quick else methods.Settings(), **chosen)
    with _progress() as progress:
        rows = de_solver.reproduce(settings, given.output, progress)
    if rows is None:
        raise KeyboardInterrupt
    console = Console()
    console.width = max(console.width, 100)  # a wrapped table is easier to read than a cut one
    for optimizer in settings.optimizers:
        for horizon in settings.horizons:
            title = f"\n{optimizer.capitalize()}, T = {horizon:,}, {settings.seeds} seeds"
            listed = [row for row in rows if row["optimizer"] == optimizer and row["T"] == horizon]
            console.print(report.table(title, COLUMNS, [*listed, *report.paper_row(listed)]))
    console.print("\nthe paper: T = 2,500, 25 seeds; speed-up without recording", highlight=False)
    console.print(f"figures and result.json: {given.output}", highlight=False)
    return 0


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars with an ETA, one a stage; nothing is shown before the first."""
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
    bars = Progress(*columns, *ends, console=Console(stderr=True))
    tasks: dict[str, Any] = {}

    def tell(stage: str, done: int, total: int) -> None:
        if not tasks:
            bars.start()
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done)

    try:
        yield tell
    finally:
        if tasks:
            bars.stop()
