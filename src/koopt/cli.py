"""The command line: ``koopt reproduce``, ``bench``, ``forecast`` and ``spectrum``."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import koopt
from koopt import terminal
from koopt.checkpoint import command

if TYPE_CHECKING:
    from collections.abc import Sequence

ORDER = ("de-solver", "mnist", "perceptron", "complexity", "horizon")
HELP = {
    "de-solver": "Table 1 and Figures 2, S5 and S6",
    "mnist": "Section 5, Table 2 and Figure 3",
    "perceptron": "S8, Table S3 and Figure S4",
    "complexity": "S7: what operators cost, in theory and as measured",
    "horizon": "the open question of when to start and stop",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 2 for bad input with one line on stderr, 1 where no one reads on, 130 after Ctrl-C."""
    for name in ("stdout", "stderr"):  # closed by the shell: what is printed goes nowhere
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter still gets the table
    try:
        status = _run(_parser().parse_args(arguments))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        if arguments is None:  # the process ends here; a second Ctrl-C must not break in
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("koopt: interrupted; what is recorded stays, and the same command goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads, as head does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at the end fails again
        return 1
    except (ValueError, OSError) as error:
        print(f"koopt: {_one_line(str(error))}", file=sys.stderr)
        return 2


def _run(given: argparse.Namespace) -> int:
    try:
        return given.command(given)
    except ModuleNotFoundError as missing:
        package, extra = (missing.name or "").partition(".")[0], "bench" if given.command is _bench else "experiments"
        print(f"koopt: {package} is not installed; pip install 'koopt[{extra}]'", file=sys.stderr)
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
    for name, about in [*HELP.items(), ("all", "all of these, and one report of them")]:
        experiment = experiments.add_parser(name, help=about, description=about)
        experiment.set_defaults(command=_reproduce_all if name == "all" else _reproduce_one, name=name)
        experiment.add_argument(
            "--output",
            type=Path,
            default=Path("results") / name,
            metavar="DIR",
            help="where recordings, figures and result.json go (%(default)s)",
        )
        experiment.add_argument("--seed", type=int, default=0, help="first seed (%(default)s)")
        experiment.add_argument(
            "--quick", action="store_true", help="in small, to look at: minutes, not figures to cite"
        )
        if name in ("de-solver", "mnist"):
            experiment.add_argument("--seeds", type=int, help="how many networks (25; 4 or 5 with --quick)")
        if name == "de-solver":
            experiment.add_argument("--optimizer", default="all", help="adam, adagrad, adadelta or all (default)")
            experiment.add_argument(
                "--horizon",
                type=int,
                action="append",
                metavar="T",
                help="optimizer steps ahead, a multiple of 100; may be repeated",
            )
    _add_bench(commands)
    command.add_commands(commands)
    return parser


def _add_bench(commands: Any) -> None:
    about = "time to target against other methods"
    bench = commands.add_parser("bench", help=about, description=about)
    bench.set_defaults(command=_bench)
    bench.add_argument("task", metavar="TASK", help="a task's name, or all")
    bench.add_argument("--methods", metavar="A,B", help="names, separated by commas (all)")
    bench.add_argument("--beta2", metavar="A,B", help="of Adam, searched beside the rate (the task's)")
    bench.add_argument("--seeds", type=int, help="how many are reported (10; 2 with --quick)")
    bench.add_argument("--seed", type=int, default=0, help="first of them (%(default)s)")
    bench.add_argument("--jobs", type=int, default=-1, metavar="N", help="runs at a time; -1: one a core (%(default)s)")
    bench.add_argument("--output", type=Path, metavar="DIR", help="where all goes (results/bench/TASK)")
    bench.add_argument("--quick", action="store_true", help="in small, to look at: not figures to cite")
    bench.add_argument("--report", action="store_true", help="run nothing, report the trials that are there")


def _settings(name: str, given: argparse.Namespace) -> Any:
    """What is asked for: the experiment's own settings, those of --quick, and what was given."""
    from dataclasses import replace

    experiment = _experiment(name)
    chosen: dict[str, Any] = {"seed": given.seed}
    if getattr(given, "optimizer", "all") != "all":
        chosen["optimizers"] = (given.optimizer,)
    if getattr(given, "seeds", None) is not None:
        chosen["seeds"] = given.seeds
    if getattr(given, "horizon", None):
        chosen["horizons"] = tuple(given.horizon)
    settings = experiment.QUICK if given.quick else experiment.Settings()
    if name == "horizon":  # of the same networks
        return replace(settings, solver=_settings("de-solver", given))
    return replace(settings, **chosen)


def _experiment(name: str) -> Any:
    import importlib

    module = "horizon_study" if name == "horizon" else name.replace("-", "_")
    return importlib.import_module(f"koopt.experiments.{module}")


def _reproduce_one(given: argparse.Namespace) -> int:
    with terminal.progress() as progress:
        settings = _settings(given.name, given)
        rows = _experiment(given.name).reproduce(settings, given.output, progress)
    if rows is None:
        raise KeyboardInterrupt
    from koopt import report

    report.add_command(given.output, _command(given.name, given))
    console = terminal.wide_console()
    for title, columns, listed in _experiment(given.name).tables(settings, rows):
        report.print_table(console, f"\n{title}", columns, [*listed, *report.paper_row(listed)])
    for finding in report.findings(given.output):
        console.print(f"- {finding}")
    console.print(f"\nfigures and result.json: {given.output}")
    return 0


def _reproduce_all(given: argparse.Namespace) -> int:
    """Every experiment into a folder of its own, then the report of those that are there."""
    from koopt import report, system
    from koopt.experiments import page

    system.require_folder(given.output, "--output")
    for name in ORDER:
        _experiment(name).check(_settings(name, given))
    folders = {name: given.output / name for name in ORDER}
    failures, interrupted = [], False
    with terminal.progress() as progress:
        for name in ORDER:
            more = _of_the_others(folders, given) if name == "horizon" else {}
            try:
                rows = _experiment(name).reproduce(_settings(name, given), folders[name], progress, **more)
            except (ValueError, OSError) as error:
                failures.append(f"{name}: {_one_line(str(error))}")
                continue
            except KeyboardInterrupt:
                rows = None
            if rows is None:
                interrupted = True
                break
            report.add_command(folders[name], _command(name, given))
    written = page.write(folders, given.output / "report" / "index.html")
    print(f"report: {written}")
    for failure in failures:
        print(f"koopt: {failure}", file=sys.stderr)
    if interrupted:
        raise KeyboardInterrupt
    return 2 if failures else 0


def _of_the_others(folders: dict[str, Path], given: argparse.Namespace) -> dict[str, Any]:
    """What earlier experiments have recorded, for the one that looks at horizons."""
    from koopt.experiments import noisy_windows

    recorded: dict[str, Any] = {"recordings": folders["de-solver"] / "recordings"}
    if (folders["mnist"] / "result.json").exists():
        run = _settings("mnist", given).run
        recorded["noisy"] = noisy_windows.mnist_windows(run, folders["mnist"] / "recordings")
    return recorded


def _decays(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--beta2 is {text!r}, expected numbers between 0 and 1, separated by commas") from None


def _bench(given: argparse.Namespace) -> int:
    from koopt import report
    from koopt.bench import command, results

    methods = None if given.methods is None else tuple(name.strip() for name in given.methods.split(","))
    decays = None if given.beta2 is None else _decays(given.beta2)
    settings = command.settings(methods, given.seeds, given.seed, given.quick, given.jobs, given.report, decays)
    folder = given.output or Path("results/bench") / ("" if given.task == "all" else given.task)
    with terminal.progress() as progress:
        rows, failures = command.bench_named(given.task, settings, folder, progress)
    if (folder / "result.json").exists():
        report.add_command(folder, _bench_command(given))
    console = terminal.wide_console()
    for title, columns, listed in results.tables(rows):
        report.print_table(console, f"\n{title}", columns, listed)
    for finding in report.findings(folder) if rows else ():
        console.print(f"- {finding}")
    if rows:
        console.print(f"\nfigures and result.json: {folder}")
    for failure in failures:
        print(f"koopt: {_one_line(failure)}", file=sys.stderr)
    return 2 if failures else 0


def _bench_command(given: argparse.Namespace) -> str:
    words = ["koopt bench", given.task]
    words += ["--quick"] if given.quick else []
    words += [f"--methods {given.methods}"] if given.methods is not None else []
    words += [f"--beta2 {given.beta2}"] if given.beta2 is not None else []
    words += [f"--seeds {given.seeds}"] if given.seeds is not None else []
    words += [f"--seed {given.seed}"] if given.seed else []
    return " ".join(words)


def _command(name: str, given: argparse.Namespace) -> str:
    """What repeats an experiment; where its output goes does not matter."""
    words = ["koopt reproduce", name]
    words += ["--quick"] if given.quick else []
    words += [f"--seed {given.seed}"] if given.seed else []
    words += [f"--seeds {given.seeds}"] if getattr(given, "seeds", None) is not None else []
    words += [f"--optimizer {given.optimizer}"] if getattr(given, "optimizer", "all") != "all" else []
    words += [f"--horizon {horizon}" for horizon in getattr(given, "horizon", None) or ()]
    return " ".join(words)
