"""Second-order ideas on the full-batch tasks of `koopt bench`: what each costs to the targets of Adam with cosine.

    python benchmarks/second_order.py burgers --seeds 1000 1001 1002
    python benchmarks/second_order.py de-solver --ideas lbfgs,history=100 handover,at=300,history=200

The cost is counted: a loss with its gradient is 1, a loss alone 1/3. Targets are the median best loss of Adam at 50, 75
and 100 % of its steps on the same seeds; shown is the median share of Adam's steps until each, 1.5 where it is missed.
Then come the shares of each seed to the last target.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import statistics
import time
from typing import TYPE_CHECKING

import torch
from second_order_ideas import METHODS, Run, Spent

from koopt.bench.tasks import burgers, de_solver

if TYPE_CHECKING:
    from koopt.bench.task import Task

TASKS = {task.name: (task, rate) for task, rate in ((de_solver.TASK, 0.04), (burgers.TASK, 8e-3))}
MISSED = 1.5
IDEAS = [
    "koopt",
    "lbfgs",
    "lbfgs,history=400",
    "scaled",
    "scaled,history=100",
    "scaled,with_koopt=1",
    "lbfgs_koopt",
    "lbfgs_koopt,keep=1",
    "span",
    "span,exact=1",
    "span,beyond=1",
    "span,with_koopt=1",
    "handover,at=100,history=400",
    "handover,at=300,history=400",
    "handover,at=100,history=400,seeded=1",
    "handover,at=100,history=400,diagonal=1",
    "handover,at=100,history=400,scaled=1",
    "alternate,history=400",
    "soap",
    "soap,with_koopt=1",
]


def carry_out(task: Task, rate: float, idea: str, seed: int, budget: float, target: float = 0.0) -> Run:
    """One run of an idea such as ``lbfgs,history=100``."""
    name, *settings = ("adam,with_koopt=1" if idea == "koopt" else idea).split(",")
    if name not in METHODS:
        raise SystemExit(f"--ideas: {name!r} is none of koopt, {', '.join(METHODS)}")
    options = {key: float(value) for key, value in (setting.split("=") for setting in settings)}
    known = list(inspect.signature(METHODS[name]).parameters)[1:]
    if unknown := options.keys() - set(known):
        raise SystemExit(f"--ideas: {name} has no {', '.join(sorted(unknown))}, only {', '.join(known)}")
    run = Run(task, rate, seed, budget, target)
    torch.manual_seed(seed)
    with contextlib.suppress(Spent):
        METHODS[name](run, **{key: int(value) if value == int(value) else value for key, value in options.items()})
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1000, 1001, 1002])
    parser.add_argument("--ideas", nargs="+", default=IDEAS, help="as name,setting=number,...")
    parser.add_argument("--targets", type=float, nargs=3, help="those of an earlier run, which saves the baseline")
    parser.add_argument("--budget", type=float, default=1.0, help="of Adam's steps, where an idea is given up")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task, rate = TASKS[arguments.task]
    targets = arguments.targets
    if targets is None:
        traces = [carry_out(task, rate, "adam", seed, task.steps).trace for seed in arguments.seeds]
        best = [[min(loss for cost, loss in t if cost <= q * task.steps) for t in traces] for q in (0.5, 0.75, 1.0)]
        targets = [statistics.median(losses) for losses in best]
    shown = " ".join(map(str, targets))
    print(f"{task.name}, seeds {arguments.seeds}, Adam {rate} cosine: targets {shown}", flush=True)
    for idea in arguments.ideas:
        started = time.perf_counter()
        runs = [carry_out(task, rate, idea, s, arguments.budget * task.steps, targets[-1]) for s in arguments.seeds]
        shares = [
            [next((cost / task.steps for cost, loss in run.trace if loss <= goal), MISSED) for run in runs]
            for goal in targets
        ]
        medians = " ".join(f"{statistics.median(share):.3f}" for share in shares)
        each = " ".join("miss" if share == MISSED else f"{share:.3f}" for share in shares[-1])
        seconds = (time.perf_counter() - started) / len(runs)
        print(f"{idea:50} {medians} | {each} | {seconds:.1f} s {runs[0].note}", flush=True)


if __name__ == "__main__":
    main()
