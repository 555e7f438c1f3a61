"""``koopt forecast`` and ``koopt spectrum``: options in, one table out."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from koopt import checkpoint, terminal
from koopt.checkpoint import rules, spectrum
from koopt.checkpoint.groups import BY
from koopt.forecasters import METHODS

if TYPE_CHECKING:
    from collections.abc import Iterator

COLUMNS = {
    "group": "group",
    "weights": "weights",
    "method": "method",
    "rank": "rank",
    "motion": "last step\nover size",
    "step_resolution": "step in\nroundings",
}
HELD_OUT = {"error": "koopt", "error_last": "no\nchange", "error_mean": "mean", "error_line": "line"}
SPECTRUM = {
    "group": "group",
    "weights": "weights",
    "rank": "rank",
    "residual": "residual",
    "eigenvalues": "eigenvalues",
    "half_life": "longest\nhalf-life\n(steps)",
    "growing": "grow",
}
MOST_LINES = 60  # of a table in the terminal; result.json has all


def add_commands(commands: Any) -> None:
    """Add both commands to the parser of ``koopt``."""
    forecast = commands.add_parser("forecast", help="a later checkpoint from saved ones", description=FORECAST)
    _add_shared(forecast, BY, "network")
    forecast.set_defaults(command=run_forecast)
    forecast.add_argument(
        "--ahead", type=float, required=True, metavar="STEPS", help="after the last; inf for the limit"
    )
    forecast.add_argument(
        "-o", "--output", type=Path, metavar="PATH", help="file or folder to write, as the inputs are"
    )
    forecast.add_argument("--force", action="store_true", help="replace the output if it is a file that exists")
    forecast.add_argument("--method", default="koopman", help=f"{', '.join(METHODS)} (%(default)s)")
    forecast.add_argument("--max-modulus", type=float, help="draw larger eigenvalues in to this modulus")
    forecast.add_argument("--holdout", action="store_true", help="first forecast the last checkpoint from the others")
    forecast.add_argument("--dry-run", action="store_true", help="print what would be done, and stop")
    forecast.add_argument("--report", type=Path, metavar="DIR", help="write the table to DIR/result.json")
    spectral = commands.add_parser("spectrum", help="eigenvalues of saved checkpoints", description=SPECTRAL)
    _add_shared(spectral, ("layer", "network"), "layer")
    spectral.set_defaults(command=run_spectrum)
    spectral.add_argument(
        "--output",
        type=Path,
        default=Path("results") / "spectrum",
        metavar="DIR",
        help="where spectrum.png and result.json go (%(default)s)",
    )


FORECAST = "Forecast a later checkpoint: a linear combination of saved ones, read block by block."
SPECTRAL = "Eigenvalues of the operator between saved checkpoints, their half-life, and the operator's residual."


def _add_shared(parser: argparse.ArgumentParser, by: tuple[str, ...], default: str) -> None:
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help=".safetensors, .pt or folder")
    parser.add_argument("--by", default=default, help=f"what shares an operator: {', '.join(by)} (%(default)s)")
    parser.add_argument("--steps", help="optimizer step of each checkpoint, by commas, where names do not tell")
    for option, what in (("--include", "forecast only"), ("--exclude", "copy")):
        parser.add_argument(
            option,
            action="append",
            default=[],
            metavar="PATTERN",
            help=f"{what} tensors of such names; may be repeated",
        )
    parser.add_argument(
        "--rank",
        type=int,
        help="largest rank of an operator (all that is above rounding, if pairs to spare agree on it; else 2)",
    )
    parser.add_argument("--rtol", type=float, help="cut singular values up to this share of the largest")
    for option, what in (
        ("--difference", "fit the steps between checkpoints"),
        ("--center", "fit an affine map"),
        ("--projected", "project on the kept directions, which removes noise"),
    ):
        parser.add_argument(option, action="store_true", help=what)


def run_forecast(given: argparse.Namespace) -> int:
    """``koopt forecast``; returns the exit code."""
    from koopt import system

    if given.output is None and not (given.dry_run or given.holdout):
        raise ValueError("--output is missing; name the file or folder to write, or give --holdout or --dry-run")
    if given.report is not None:
        system.require_folder(given.report, "--report")
    options = _options(given)
    if given.max_modulus is not None:
        options["max_modulus"] = given.max_modulus
    chosen = {"method": given.method, "by": given.by} | _chosen(given)
    with _one_line():
        if given.dry_run:
            print(dry_run(given, options))
            return 0
        with terminal.progress_in_bytes() as progress:
            found = checkpoint.forecast_checkpoints(
                given.checkpoints,
                given.ahead,
                given.output,
                holdout=given.holdout,
                overwrite=given.force,
                progress=progress,
                **chosen,
                **options,
            )
    rows = [row | ({"error_last": 1.0} if given.holdout else {}) for row in found.rows]
    columns = COLUMNS | (HELD_OUT if given.holdout else {})
    title = f"{len(found.plan.times)} checkpoints, steps {found.plan.times[0]:g} to {found.plan.times[-1]:g}"
    _print(
        title + (", last one held out: error over its distance from the one before" if given.holdout else ""),
        columns,
        rows,
    )
    if given.holdout:
        print("koopt below 1: the last checkpoint lay where the forecast pointed; its loss is for you to evaluate")
        if found.error is not None and found.error > 1:
            print("koopt above 1: worse than the last checkpoint as it is; try --difference or --method line")
    if given.report is not None:
        _write(given.report, "forecast", given, rows, [])
    if found.output is not None:
        print(f"\nforecast of step {found.step:g}: {found.output}")
    return 0


def dry_run(given: argparse.Namespace, options: dict[str, Any]) -> str:
    """What a forecast would read, write and hold."""
    rule = rules.Rule(given.method, given.ahead, options)
    rules.check(rule, len(given.checkpoints), given.holdout)
    plan = checkpoint.plan_of(given.checkpoints, given.by, **_chosen(given))
    checkpoint.require_grid(plan, rule, given.holdout)
    if given.output is not None:
        checkpoint.writing.require_output(given.output, plan.checkpoints, given.force)
    patches = sum(group.patches for group in plan.groups)
    lines = [f"step {time:>12g}  {one.path}" for time, one in zip(plan.times, plan.checkpoints, strict=True)]
    lines += [
        f"forecast {plan.weights:,} numbers in {sum(len(group.names) for group in plan.groups)} tensors, "
        f"{patches:,} operator{'s' * (patches != 1)} by {given.by}, {given.method}, "
        f"to step {plan.times[-1] + given.ahead:g}",
        f"copy {len(plan.copied)} other tensors from the last",
        f"read {_size(plan.read)} in two passes, write {_size(plan.written)}, hold at most {_size(plan.memory)}",
    ]
    return "\n".join(lines)


def run_spectrum(given: argparse.Namespace) -> int:
    """``koopt spectrum``; returns the exit code."""
    from matplotlib.figure import Figure

    from koopt import plot, system

    system.require_folder(given.output, "--output")
    with _one_line(), terminal.progress_in_bytes() as progress:
        plan, rows = spectrum.spectrum_of(
            given.checkpoints, given.by, progress=progress, **_chosen(given), **_options(given)
        )
    lines = spectrum.by_group(rows)
    figure = Figure(figsize=(9.5, 4.4), layout="constrained")
    plot.checkpoint_spectra(figure, rows, given.by)
    given.output.mkdir(parents=True, exist_ok=True)
    plot.save(figure, given.output / "spectrum.png")
    _write(given.output, "spectrum", given, rows, ["spectrum.png"])
    _print(f"{len(plan.times)} checkpoints, steps {plan.times[0]:g} to {plan.times[-1]:g}", SPECTRUM, lines)
    unseen = [line["group"] for line in lines if not line["seen"]]
    if unseen:
        print(
            f"below the resolution of the stored numbers, so noise: {', '.join(unseen[:5])}{' ...' * (len(unseen) > 5)}"
        )
    print(f"\n{given.output / 'spectrum.png'}, {given.output / 'result.json'}")
    return 0


def _options(given: argparse.Namespace) -> dict[str, Any]:
    options = {name: getattr(given, name) for name in ("rank", "rtol") if getattr(given, name) is not None}
    return options | {name: True for name in ("difference", "center", "projected") if getattr(given, name)}


def _chosen(given: argparse.Namespace) -> dict[str, Any]:
    """Which checkpoints and tensors."""
    steps = None
    if given.steps is not None:
        try:
            steps = [float(step) for step in given.steps.split(",")]
        except ValueError:
            raise ValueError(f"--steps is {given.steps!r}, expected numbers with commas, such as 100,200,300") from None
    return {"steps": steps, "include": given.include, "exclude": given.exclude}


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """What the command line says in one line: options of another method, no convergence, no memory, an early end."""
    heard = []
    if threading.current_thread() is threading.main_thread():  # no other may listen
        ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        heard = [number for number in ends if signal.getsignal(number) is signal.SIG_DFL]  # nohup ignores one
    for number in heard:
        signal.signal(number, _end)
    try:
        yield
    except TypeError as error:
        raise ValueError(str(error)) from error
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage], which torch documents
        raise ValueError(f"no convergence ({error}); take a lower --rank or --method line") from error
    except MemoryError:
        raise ValueError("not enough memory; see --dry-run for what is needed, and take --by layer") from None
    except KeyboardInterrupt as interrupt:
        number = next((one for one in interrupt.args if isinstance(one, int)), signal.SIGINT)
        how = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
        print(f"koopt: {how}; nothing was written", file=sys.stderr)
        raise SystemExit(128 + number) from None
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, _: object) -> NoReturn:
    """As Ctrl-C does, so that what is half written is removed; once, since a second must not break in on that."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def _print(title: str, columns: dict[str, str], rows: list[dict[str, Any]]) -> None:
    from koopt import report

    print(f"\n{title}")
    report.print_table(terminal.wide_console(), "", columns, rows[:MOST_LINES])
    if len(rows) > MOST_LINES:
        print(f"... and {len(rows) - MOST_LINES} more groups")


def _write(folder: Path, name: str, given: argparse.Namespace, rows: list[dict[str, Any]], figures: list[str]) -> None:
    from koopt import report

    folder.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
    settings["checkpoints"] = [str(path) for path in given.checkpoints]
    del settings["command"]
    report.write_result(folder, name, settings, rows, figures)


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3g} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.3g} MiB"
