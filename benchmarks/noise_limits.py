"""How far can any forecast from recorded weights get in noisy training, and any jump to one?

    python benchmarks/noise_limits.py

AdamW at a constant rate. Along the principal directions of the block means that `koopt.forecast()` is made of, the
lowest loss is searched by L-BFGS: on the validation set itself, which no method may do, so that it tells about how far
any that combines these means could get; or on what a method may use, the guard's 500 examples or 4,000 of training.
"In place": the same every 75 steps with the means since the last time, and the weights are moved all the way there,
half of it, or not at all. Printed are the steps until these weights reach the losses of AdamW with a cosine schedule at
its tuned rate at 50, 75 and 100 % of its steps, as a share of these (geometric mean over seeds; a loss that is missed
counts 1.5), and the final loss. Schedule-Free, at the setting that its search chose, is the best optimizer of the first
two targets; the same is asked of its own weights.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from reaching import mean_shares
from torch.func import functional_call

import koopt
from koopt.bench.method import Trainer
from koopt.bench.methods.training import searched, start_plain, start_schedule_free, weights_of, write
from koopt.bench.protocol import losses_at_shares
from koopt.bench.run import run
from koopt.bench.tasks import TASKS, digits, making
from koopt.experiments import classifier, data
from koopt.live.guard import buffers_kept
from koopt.live.window import BlockMeans, cut
from koopt.partitions import trainable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    from koopt.bench.methods.training import Run
    from koopt.bench.task import Problem

RATES = {"mnist-mlp": 2e-3, "mnist-cnn": 8e-3}
FREE = {"mnist-mlp": 4e-3, "mnist-cnn": 16e-3}  # rates of Schedule-Free
WINDOW = 56  # block means, as koopt.attach has it
LOOKS = 20  # at the validation loss: a search takes a second
EVERY = 75  # steps from one move in place to the next
ITERATIONS = 12  # of L-BFGS
WAYS: dict[str, dict[str, Any]] = {
    "koopt.forecast(), without a guard": {},
    "best of 3 directions, by validation": {"by": "validation", "rank": 3},
    "best of 12 directions, by validation": {"by": "validation", "rank": 12},
    "best of 3 directions, by the guard": {"by": "guard", "rank": 3},
    "best of 3 directions, by 4,000 of training": {"by": "training", "rank": 3},
    "every 75 steps, by validation, not moved": {"by": "validation", "rank": 12, "moved": 0.0},
    "every 75 steps, by validation, moved by half": {"by": "validation", "rank": 12, "moved": 0.5},
    "every 75 steps, by validation, moved there": {"by": "validation", "rank": 12, "moved": 1.0},
    "Schedule-Free": {"free": True},
    "Schedule-Free, best of 12 directions, by validation": {"free": True, "by": "validation", "rank": 12},
}


@functools.cache
def examples(split: str) -> tuple[Tensor, Tensor]:
    mnist = data.mnist()
    training, guard, validation = digits.splits(len(mnist.train_labels))
    some = training[torch.randperm(len(training), generator=torch.Generator().manual_seed(1))[:4_000]]
    index = {"training": some, "guard": guard, "validation": validation}[split]
    return classifier.normalized(mnist.train_images[index]), mnist.train_labels[index]


def best_in_span(model: nn.Module, rows: Tensor, rank: int, split: str) -> list[Tensor]:
    """The weights with the lowest loss near the mean of the last quarter of the rows, along principal directions."""
    images, labels = examples(split)
    names, parameters = list(trainable(model)), weights_of(model)
    center = rows[-max(1, len(rows) // 4) :].mean(dim=0)
    _, spread, directions = torch.linalg.svd(rows - center, full_matrices=False)
    basis = directions[:rank] * (spread[:rank, None] / math.sqrt(len(rows)))
    coefficients = torch.zeros(len(basis), requires_grad=True)
    search = torch.optim.LBFGS([coefficients], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        weights = dict(zip(names, cut(center + coefficients @ basis, parameters), strict=True))
        found = making.cross_entropy(functional_call(model, weights, (images,)), labels)
        found.backward()
        return found

    # BatchNorm as the guard has it: with the statistics of these examples
    with buffers_kept(model), making.mode(model, training=True), torch.enable_grad():
        search.step(loss)
    return cut(center + coefficients.detach() @ basis, parameters)


def started(problem: Problem, setting: Mapping[str, Any], steps: int) -> Run:
    free = "free" in setting
    found = (start_schedule_free if free else start_plain)(problem, setting, steps)
    if "by" not in setting:
        if not free:
            found.swapped = koopt.attach(found.optimizer, problem.model, mode="forecast").forecast_weights
        return found
    parameters, moved, best = weights_of(problem.model), setting.get("moved"), list[Any]()
    means = BlockMeans(parameters, WINDOW, torch.float32, torch.device("cpu"))
    taken, own = 0, found.swapped

    def after() -> None:
        nonlocal taken, best
        means.add(parameters)
        taken += 1
        if moved is not None and taken % EVERY == 0:
            best = best_in_span(problem.model, means.with_open(), setting["rank"], setting["by"])
            write(parameters, [p.detach() + moved * (b - p.detach()) for p, b in zip(parameters, best, strict=True)])
            means.clear()

    @contextlib.contextmanager
    def swapped() -> Iterator[None]:
        rows = means.with_open()
        with own():
            if moved is None and len(rows):
                write(parameters, best_in_span(problem.model, rows, setting["rank"], setting["by"]))
            elif best:
                write(parameters, best)
            problem.model.zero_grad()
            yield

    found.after, found.swapped = after, swapped
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[3000, 3001, 3002, 3003])
    parser.add_argument("--only", default="", help="ways with this in their names")
    arguments = parser.parse_args()
    for name in arguments.tasks:
        task, rate = replace(TASKS[name], looks=LOOKS), {"optimizer": "adamw", "rate": RATES[name]}
        plain, searching = Trainer("plain", start_plain, searched), Trainer("span", started, searched, guard=True)
        tuned = rate | {"schedule": "cosine"}
        aims = [losses_at_shares(run(task, plain, tuned, seed)[0], task) for seed in arguments.seeds]
        for title, way in WAYS.items():
            if arguments.only not in title:
                continue
            own = rate | {"schedule": "constant"} | way
            if "free" in way:
                own |= {"rate": FREE[name], "warmup": 0.05, "decay": 0.01}
            curves = [run(task, searching, own, seed)[0].curve for seed in arguments.seeds]
            means = mean_shares(curves, aims, task.steps)
            final = sum(float(curve.loss[-1]) for curve in curves) / len(curves)
            print(f"{name:9s}  {title:50s} {' '.join(f'{mean:.2f}' for mean in means)}  {final:.4f}", flush=True)


if __name__ == "__main__":
    main()
