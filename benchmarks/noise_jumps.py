"""Jumps along the drift of noisy training, in place: do they bring more than a larger learning rate?

    python benchmarks/noise_jumps.py

Every few steps of AdamW on mnist-mlp, at a constant rate, the weights are moved: by half of what the last block mean is
ahead of the one before ("drift"), to the last block mean and beyond it by that difference ("mean"), or by Nesterov
momentum on the weights themselves ("nesterov"); always, or where the guard is then lower. Printed are the steps until
`koopt.forecast()` reaches the losses of AdamW with a cosine schedule at its tuned rate, 0.002, at 50, 75 and 100 % of
its steps, as a share of these (geometric mean over seeds; a loss that is missed counts 1.5), and the share of jumps
that were accepted.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

import torch
from reaching import mean_shares

import koopt
from koopt.bench.method import Trainer
from koopt.bench.methods.training import Counted, searched, start_plain, weights_of, write
from koopt.bench.protocol import losses_at_shares
from koopt.bench.run import run
from koopt.bench.tasks import TASKS
from koopt.live.guard import measure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from koopt.bench.methods.training import Run
    from koopt.bench.task import Problem

TUNED = 0.002
START = 100  # steps before the first jump
WAYS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "drift, every 20 steps": {"kind": "drift", "every": 20},
    "nesterov 0.5, every 20 steps": {"kind": "nesterov", "every": 20},
    "drift, every 50 steps, guarded": {"kind": "drift", "every": 50, "guarded": True},
    "mean, every 50 steps, guarded": {"kind": "mean", "every": 50, "guarded": True},
}


class Jumping:
    """Moves the weights after each `every` steps."""

    def __init__(self, problem: Problem, guard: Counted, kind: str, every: int, guarded: bool) -> None:
        self.model, self.guard, self.kind, self.every, self.guarded = problem.model, guard, kind, every, guarded
        self.parameters = weights_of(problem.model)
        self.total = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.mean: list[Any] | None = None  # of the block before, moved along with the jumps since
        self.origin, self.momentum = self._now(), list[Any]()
        self.steps = self.tried = self.accepted = 0

    @torch.no_grad()
    def after_step(self) -> None:
        self.steps += 1
        torch._foreach_add_(self.total, self.parameters)
        if self.steps % self.every:
            return
        now, mean = self._now(), [total / self.every for total in self.total]
        torch._foreach_zero_(self.total)
        new = self._proposed(now, mean)
        if new is None or self.steps < START:
            self.mean, self.origin = mean, now
            return
        self.tried += 1
        before = float(measure(self.guard, self.model)) if self.guarded else math.inf
        write(self.parameters, new)
        if self.guarded and not float(measure(self.guard, self.model)) < before:
            write(self.parameters, now)
            new = now
        else:
            self.accepted += 1
        moved = torch._foreach_sub(new, now)
        self.mean, self.origin = mean if self.kind == "mean" else list(torch._foreach_add(mean, moved)), self._now()

    def _proposed(self, now: list[Any], mean: list[Any]) -> list[Any] | None:
        if self.kind == "nesterov":
            change = torch._foreach_sub(now, self.origin)
            held = self.momentum or torch._foreach_mul(change, 0.0)
            self.momentum = [0.5 * v + c for v, c in zip(held, change, strict=True)]
            return [o + c + 0.5 * v for o, c, v in zip(self.origin, change, self.momentum, strict=True)]
        if self.mean is None:
            return None
        drift = torch._foreach_sub(mean, self.mean)
        if self.kind == "drift":
            return list(torch._foreach_add(now, torch._foreach_mul(drift, 0.5)))
        return list(torch._foreach_add(mean, drift))

    def _now(self) -> list[Any]:
        return [parameter.detach().clone() for parameter in self.parameters]


def started(problem: Problem, setting: Mapping[str, Any], steps: int) -> Run:
    found = start_plain(problem, setting, steps)
    found.guard = Counted(problem.guard)
    found.swapped = koopt.attach(found.optimizer, problem.model, guard=found.guard, mode="forecast").forecast_weights
    if setting["kind"] != "none":
        jumping = Jumping(problem, found.guard, setting["kind"], setting["every"], setting.get("guarded", False))
        found.after = jumping.after_step
        setting["made"].append(jumping)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3000, 3001, 3002])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3])
    arguments = parser.parse_args()
    task, plain = TASKS["mnist-mlp"], Trainer("plain", start_plain, searched)
    given = {"optimizer": "adamw", "rate": TUNED, "schedule": "cosine"}
    aims = [losses_at_shares(run(task, plain, given, seed)[0], task) for seed in arguments.seeds]
    trainer = Trainer("jumping", started, searched, guard=True)
    for rate in arguments.rates:
        for title, way in WAYS.items():
            made: list[Jumping] = []
            own = {"optimizer": "adamw", "rate": rate, "schedule": "constant", "made": made, **way}
            curves = [run(task, trainer, own, seed)[0].curve for seed in arguments.seeds]
            means = mean_shares(curves, aims, task.steps)
            tried, accepted = (sum(getattr(one, name) for one in made) for name in ("tried", "accepted"))
            kept = f"{accepted / tried:.0%} of {tried} accepted" if tried else ""
            print(f"rate {rate:g}, {title:32s} {' '.join(f'{mean:.2f}' for mean in means)}  {kept}", flush=True)


if __name__ == "__main__":
    main()
