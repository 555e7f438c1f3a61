"""What options of `koopt.attach` bring on the full-batch tasks of `koopt bench`, on seeds of the development.

    python benchmarks/jump_options.py --option history 50 --option history 25
    python benchmarks/jump_options.py --tasks de-solver --rate 0.08 --beta2 0.9
    python benchmarks/jump_options.py --tasks de-solver --rate 0.16 --beta2 0.95 --rounding

Prints the cost, a guard evaluation counted as a third of a step, until the losses that Adam with a cosine schedule has
at 50, 75 and 100 % of its steps at the same rate, as a share of these steps (geometric mean over the seeds; a loss that
is missed counts 1.5), the processor time to the last one, and how many runs end more than 2 % above the plain one with
the same schedule: with the defaults and with each option. With --rounding also of plain runs whose first weight is one
rounding larger: where training is chaotic, as many of them end worse as better.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from reaching import mean_shares

from koopt.bench.method import Trainer
from koopt.bench.methods import attached
from koopt.bench.methods.jumping import LINE, LINES, start_line
from koopt.bench.methods.training import searched, start_plain
from koopt.bench.protocol import losses_at_shares
from koopt.bench.run import run
from koopt.bench.statistics import crossing
from koopt.bench.task import BETA2
from koopt.bench.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from koopt.bench.methods.training import Run
    from koopt.bench.task import Problem

RATES = {"de-solver": 0.04, "burgers": 0.008}


def nudged(problem: Problem, setting: Mapping[str, Any], steps: int) -> Run:
    """A plain run whose first weight is one rounding larger."""
    found = start_plain(problem, setting, steps)
    first = next(found.model.parameters()).detach().view(-1)[:1]
    first.copy_(torch.nextafter(first, torch.full_like(first, math.inf)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(3000, 3008)))
    parser.add_argument("--schedule", choices=("cosine", "constant"), default="cosine")
    parser.add_argument("--rate", type=float, help=f"of all tasks; else {RATES}")
    parser.add_argument("--beta2", type=float, default=BETA2)
    parser.add_argument("--option", nargs=2, action="append", default=[], metavar=("NAME", "JSON"), help="of attach")
    parser.add_argument("--rounding", action="store_true", help="plain runs that begin one rounding beside, too")
    parser.add_argument("--lines", action="store_true", help="the guarded straight line too, at all its settings")
    arguments = parser.parse_args()
    ways: dict[str, tuple[Trainer, Mapping[str, Any]]] = {}
    for name, text in [("", ""), *arguments.option]:
        options = {name: json.loads(text)} if name else {}
        ways[f"{name} {text}".strip() or "defaults"] = (
            Trainer("koopt", attached.start(start_plain, **options), searched),
            {},
        )
    if arguments.rounding:
        ways["a rounding"] = Trainer("plain", nudged, searched), {}
    for setting in (LINE, *LINES) if arguments.lines else ():
        title = "line, " + ", ".join(f"{key} {value}" for key, value in setting.items())
        ways[title] = Trainer("line", start_line, searched, guard=True), setting
    for task in (TASKS[name] for name in arguments.tasks):
        given = {"optimizer": task.optimizers[0], "rate": arguments.rate or RATES[task.name], "schedule": "cosine"}
        given["beta2"] = arguments.beta2
        plain = Trainer("plain", start_plain, searched)
        records = [run(task, plain, given, seed)[0] for seed in arguments.seeds]
        aims = [losses_at_shares(record, task) for record in records]
        if arguments.schedule != "cosine":
            other = given | {"schedule": arguments.schedule}
            records = [run(task, plain, other, seed)[0] for seed in arguments.seeds]
        ends = [float(record.curve.loss[-1]) for record in records]
        for title, (trainer, setting) in ways.items():
            own = given | dict(setting) | {"schedule": arguments.schedule, "evaluated": "trained"}
            curves = [run(task, trainer, own, seed)[0].curve for seed in arguments.seeds]
            means = mean_shares(curves, aims, task.steps, "cost")
            last = [crossing(curve.seconds, curve.loss, losses[-1]) for curve, losses in zip(curves, aims, strict=True)]
            seconds, reached = np.median(last), sum(map(math.isfinite, last))
            worse = sum(curve.loss[-1] > 1.02 * end for curve, end in zip(curves, ends, strict=True))
            print(
                f"{task.name:10s} {title:24s} {' '.join(f'{mean:.3f}' for mean in means)}  "
                f"{reached}/{len(curves)} reach the last, {seconds:.1f} s; {worse} end worse",
                flush=True,
            )


if __name__ == "__main__":
    main()
