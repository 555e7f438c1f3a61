"""Moves in the eigenbases of gradients, under noise: from when on, of which sides, and beside SOAP.

    python benchmarks/preconditioning.py --tasks mnist-mlp mnist-cnn
    python benchmarks/preconditioning.py --steps     # how much longer a step takes, on all three and wide perceptrons

AdamW at constant rates with koopt attached, whose forecast is evaluated, and SOAP likewise. Printed are the steps to
the losses of AdamW with a cosine schedule at its tuned rate at 50, 75 and 100 % of its own, as a share of these
(geometric mean over seeds; a loss that is missed counts 1.5), the same of processor time, and the final losses.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from drift_and_noise import TUNED
from reaching import cells
from torch import nn
from torch.nn.functional import mse_loss

import koopt
from koopt import system
from koopt.bench.method import Trainer
from koopt.bench.methods import attached
from koopt.bench.methods.training import searched, soap_settings, start_plain, start_soap
from koopt.bench.protocol import losses_at_shares
from koopt.bench.run import run
from koopt.bench.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from koopt.bench.task import Task

    Loop = tuple[nn.Module, Callable[[], Tensor]]

RATES = {name: rate for name, (_, rate, _) in TUNED.items() if not TASKS[name].full_batch}  # of AdamW with a cosine
WIDE = ((512, 512), (512, 2048), (512, 8192), (1024, 4096))  # of a perceptron: width, and examples in a batch
WAYS: dict[str, dict[str, Any]] = {
    "own moves": {"precondition": 0},
    "where noise is found (default)": {},
    "from the start": {"precondition": 256},
    "from the start, sides up to 1,000": {"precondition": 1000},
}


def trainers(task: Task) -> Iterator[tuple[str, Trainer]]:
    for title, options in WAYS.items():
        yield title, Trainer("koopt", attached.start(start_plain, **options), attached.grid(), guard=True)
    soap = attached.start(start_soap)
    yield "SOAP", Trainer("soap", soap, attached.grid(soap_settings), guard=True)


def of_task(task: Task) -> Loop:
    problem = task.problem(0, False)
    return problem.model, lambda: problem.loss(problem.batch())


def wide(width: int, examples: int) -> Loop:
    """A perceptron of three square matrices."""
    torch.manual_seed(0)
    layers = [nn.Linear(width, width) for _ in range(3)]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
    x = torch.randn(examples, width)
    return model, lambda: mse_loss(model(x), x)


def longer(make: Callable[[], Loop], largest: int, repeats: int, steps: int = 20) -> np.ndarray:
    """Processor time of steps in eigenbases over that of the optimizer's own, in turn; of each repeat."""
    loops = []
    for side in (0, largest):
        model, loss = make()
        optimizer = torch.optim.AdamW(model.parameters())
        koopt.attach(optimizer, model, precondition=side)
        loops.append((loss, optimizer))
    spent = np.empty((repeats + 2, 2))
    for repeat in range(repeats + 2):  # bases are found in the first two
        for place, (loss, optimizer) in enumerate(loops):
            begin = time.process_time()
            for _ in range(steps):
                optimizer.zero_grad()
                loss().backward()
                optimizer.step()
            spent[repeat, place] = time.process_time() - begin
    return spent[2:, 1] / spent[2:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=RATES, default=["mnist-mlp", "mnist-cnn"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[3000, 3001, 3002])
    parser.add_argument("--rates", type=float, nargs="+", help="of all ways; the tuned one and half of it if left out")
    parser.add_argument("--steps", action="store_true", help="only how much longer a step takes")
    arguments = parser.parse_args()
    if arguments.steps:
        noisy = [(name, partial(of_task, TASKS[name]), 256, 9) for name in RATES]
        wider = [(f"width {width}, batches of {n}", partial(wide, width, n), width, 3) for width, n in WIDE]
        for title, make, side, repeats in noisy + wider:
            with system.one_thread():
                ratios = longer(make, side, repeats)
            print(f"{title}: {np.median(ratios):.2f} times ({ratios.min():.2f} to {ratios.max():.2f})", flush=True)
        return
    plain = Trainer("plain", start_plain, searched)
    for task in (TASKS[name] for name in arguments.tasks):
        given = {"optimizer": "adamw", "rate": RATES[task.name], "schedule": "cosine"}
        runs = [run(task, plain, given, seed)[0] for seed in arguments.seeds]
        aims = [losses_at_shares(one, task) for one in runs]
        whole = sum(float(one.curve.seconds[-1]) for one in runs) / len(runs)
        for rate in arguments.rates or (RATES[task.name] / 2, RATES[task.name]):
            for title, trainer in trainers(task):
                own = given | {"rate": rate, "schedule": "constant", "evaluated": "forecast"}
                found = [run(task, trainer, own, seed)[0] for seed in arguments.seeds]
                row = cells(found, aims, task.steps, whole)
                print(f"| {task.name} | {rate:g} | {title} | {row} |", flush=True)


if __name__ == "__main__":
    main()
