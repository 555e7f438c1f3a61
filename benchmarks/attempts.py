"""10,000 attempts to jump, each measured again by the task's guard: does an accepted one ever raise the loss?

    python benchmarks/attempts.py

Runs of the benchmark's tasks at all their learning rates, with short cycles and each way to treat momentum in turn. The
guard is called at the weights before and after an attempt, outside koopt; refused ones must leave them bit for bit.
Steps along secants that follow one another start where the optimizer's step began, and are compared with that.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections import Counter
from typing import TYPE_CHECKING

import torch

import koopt
from koopt.bench.tasks import TASKS
from koopt.live.moments import POLICIES

if TYPE_CHECKING:
    from koopt.bench.task import Problem, Task

ATTEMPTS = {"de-solver": 4_000, "burgers": 3_000, "mnist-mlp": 1_500, "mnist-cnn": 750, "shakespeare": 750}
CYCLE, TAIL = 32, 12  # steps: one along secants after 20, then those that the next jump is made from
EACH = 250  # attempts in a run, on average; then the next seed, rate and policy
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SEED = 3_000  # of the first run: no other benchmark uses those above


class Check:
    """Looks at the weights and the loss before koopt does, and again after it."""

    def __init__(self, problem: Problem, optimizer: torch.optim.Optimizer, counts: Counter[str]) -> None:
        self.problem, self.counts = problem, counts
        self.weights: list[torch.Tensor] = []
        self.start, self.now = math.nan, math.nan  # where the moves began, and after the last of them
        optimizer.register_step_post_hook(self.before)  # hooks are called in this order
        self.koop: koopt.Live | None = None

    def loss(self) -> float:
        with torch.random.fork_rng(devices=[]):
            return float(self.problem.guard())

    def before(self, *_: object) -> None:
        self.weights = [p.detach().clone() for p in self.problem.model.parameters()]

    def after(self, jump: koopt.Jump) -> None:
        if jump.before is None:  # nothing was evaluated
            self.counts["not evaluated: " + jump.reason.split(":")[0]] += 1
            return
        parameters, now = list(self.problem.model.parameters()), self.loss()
        self.counts["attempts"] += 1
        if not jump.accepted:
            same = all(torch.equal(p, before) for p, before in zip(parameters, self.weights, strict=True))
            self.counts["refused"] += 1
            self.counts["refused, but the weights were changed"] += not same
            return
        before = self.now
        if jump.moves == 1:
            moved = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                torch._foreach_copy_(parameters, self.weights)
                before = self.start = self.loss()
                torch._foreach_copy_(parameters, moved)
        self.now = now
        self.counts["accepted"] += 1
        self.counts["accepted, but the loss rose"] += not now < before
        self.counts["recorded otherwise than measured"] += (jump.before, jump.after) != (self.start, now)


def attempt(task: Task, number: int, attempts: int, counts: Counter[str]) -> None:
    """One run, until it has made so many attempts, diverged, or taken the task's steps twice."""
    problem = task.problem(SEED + number, True)
    rate, policy = task.rates[number % len(task.rates)], POLICIES[number % len(POLICIES)]
    optimizer = OPTIMIZERS[task.optimizers[0]](problem.model.parameters(), lr=rate)
    check = Check(problem, optimizer, counts)
    koop = koopt.attach(
        optimizer,
        problem.model,
        problem.guard,
        "jump",
        cycle=CYCLE,
        tail=TAIL,
        momentum=policy,
        max_overhead=100.0,
        history=50,
    )
    koop.on_jump(check.after)

    def again(jump: koopt.Jump) -> None:
        """Also after a failure the next attempt is made in a cycle."""
        counts["along secants"] += jump.forecaster == "secants"
        if koop._attempts.schedule.due > koop.steps + CYCLE:
            koop._attempts.schedule.succeed(koop.steps)
        koop._attempts.schedule.follow(koop.steps)

    koop.on_jump(again)
    done = counts["attempts"] + attempts
    for _ in range(2 * task.steps):
        optimizer.zero_grad()
        loss = problem.loss(problem.batch())
        loss.backward()
        optimizer.step()
        if counts["attempts"] >= done or not bool(loss.isfinite()):
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the attempts")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    total: Counter[str] = Counter()
    for name in arguments.tasks:
        wanted, counts, started = round(arguments.share * ATTEMPTS[name]), Counter[str](), time.perf_counter()
        for number in itertools.count():
            attempt(TASKS[name], number, min(EACH, wanted - counts["attempts"]), counts)
            if counts["attempts"] >= wanted:
                break
        print(f"{name} ({time.perf_counter() - started:.0f} s): {described(counts)}", flush=True)
        total += counts
    print(f"all: {described(total)}")


def described(counts: Counter[str]) -> str:
    first = ("attempts", "accepted", "accepted, but the loss rose", "refused", "refused, but the weights were changed")
    rest = sorted(counts.keys() - set(first))
    return ", ".join(f"{counts[name]} {name}" for name in (*first, *rest))


if __name__ == "__main__":
    main()
