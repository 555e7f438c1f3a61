"""What the window of a run says beforehand: drift or noise, on each task of `koopt bench` at its tuned rate.

    python benchmarks/drift_and_noise.py
    python benchmarks/drift_and_noise.py mnist-mlp --seeds 2000

Training is left alone. At a quarter, half, three quarters and the end of a run, medians over the seeds:
roughness  how badly the next increment of the weights is forecast, in the last 30 steps, in means of two of the last
           60, or in means of more of either where these are smoother; mode "auto" jumps up to 0.3
drift      how far the means of the older and the newer half of the run are apart, over the scatter of the block means
           about the line through them
excess     how much higher the guard's loss is at the weights now than at their mean over the last eighth of the run
accepted   of the attempts to jump so far, in a second run with koopt attached to it
gain       how much lower the guard's loss is at what `forecast()` gives than at that mean
"""

from __future__ import annotations

import argparse
import statistics
from typing import TYPE_CHECKING

import torch

import koopt
from koopt.bench.tasks import TASKS
from koopt.live.candidates import NOISE, combined, smooth
from koopt.live.guard import buffers_kept, measure
from koopt.live.window import BlockMeans, Snapshots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from koopt.bench.task import Problem, Task

TUNED = {  # as `koopt bench` finds them for the plain optimizer
    "de-solver": (torch.optim.Adam, 0.04, "constant"),
    "burgers": (torch.optim.Adam, 0.032, "cosine"),
    "mnist-mlp": (torch.optim.AdamW, 0.002, "cosine"),
    "mnist-cnn": (torch.optim.AdamW, 0.008, "cosine"),
    "shakespeare": (torch.optim.AdamW, 0.004, "cosine"),
}
SHARES = (0.25, 0.5, 0.75, 1.0)
SIGNS = ("roughness", "drift", "excess", "accepted", "gain")


def loss_at(problem: Problem, weights: Sequence[Tensor]) -> float:
    """The guard's loss with BatchNorm's statistics renewed; the run is left as it was."""
    parameters = list(problem.model.parameters())
    now = [p.detach().clone() for p in parameters]
    with buffers_kept(problem.model):
        with torch.no_grad():
            torch._foreach_copy_(parameters, list(weights))
        problem.refresh()
        loss = measure(problem.guard, problem.model)
        with torch.no_grad():
            torch._foreach_copy_(parameters, now)
    return loss


def drift(means: Tensor) -> float:
    """The motion between the halves' means over the root mean square distance from the line through the means."""
    time = torch.linspace(-1.0, 1.0, len(means), dtype=torch.float64)
    rows = means.to(torch.float64) - means.mean(dim=0)
    slope = time @ rows / time.square().sum()
    scatter = (rows - time[:, None] * slope).square().sum(dim=1).mean().sqrt()
    half = len(means) // 2
    return ((rows[-half:].mean(dim=0) - rows[:half].mean(dim=0)).norm() / scatter).item()


def signs(task: Task, seed: int, attached: bool) -> list[dict[str, float]]:
    """One run: what is to be seen at each share of it."""
    kind, rate, schedule = TUNED[task.name]
    problem = task.problem(seed, True)
    parameters = list(problem.model.parameters())
    optimizer = kind(parameters, lr=rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps) if schedule == "cosine" else None
    koop = None
    if attached:
        guard = lambda: loss_at(problem, parameters)  # noqa: E731 - one line, given to one call
        koop = koopt.attach(optimizer, problem.model, guard)
    place = (parameters[0].dtype, parameters[0].device)
    tails = [Snapshots(parameters, 30, *place, block) for block in (1, 2)]
    means = BlockMeans(parameters, 56, *place)
    looks = [round(share * task.steps) for share in SHARES]
    found = []
    for step in range(1, task.steps + 1):
        batch = problem.batch()
        optimizer.zero_grad()
        problem.loss(batch).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        for part in (*tails, means):
            part.add(parameters)
        if step not in looks:
            continue
        rows = means.with_open()
        recent = max(1, round(len(rows) / 8))
        coefficients = torch.zeros(len(rows), dtype=torch.float64)
        coefficients[-recent:] = 1 / recent
        average = combined([p.detach() for p in parameters], rows, coefficients)
        assert average is not None
        least = loss_at(problem, average)
        if koop is None:
            now = loss_at(problem, [p.detach() for p in parameters])
            rough = min(smooth(tail.ordered())[1] for tail in tails)
            found.append({"roughness": rough, "drift": drift(rows), "excess": now / least - 1})
        else:
            tried = [jump for jump in koop.jumps if not jump.reason.startswith("budget")]
            accepted = statistics.mean(jump.accepted for jump in tried) if tried else 0.0
            ahead = loss_at(problem, list(koop.forecast().values()))
            found.append({"accepted": accepted, "gain": 1 - ahead / least})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TUNED))
    parser.add_argument("--seeds", nargs="+", type=int, default=[2000, 2001, 2002])
    arguments = parser.parse_args()
    if unknown := set(arguments.tasks) - set(TUNED):
        parser.error(f"unknown tasks {', '.join(sorted(unknown))}, expected some of {', '.join(TUNED)}")
    torch.set_num_threads(1)
    print(f"noise is a roughness above {NOISE}; medians over seeds {arguments.seeds}")
    print("| task | of the run | " + " | ".join(SIGNS) + " |")
    print("|---" * (2 + len(SIGNS)) + "|")
    for name in arguments.tasks:
        task = TASKS[name]
        runs = [[signs(task, seed, attached) for attached in (False, True)] for seed in arguments.seeds]
        for i, share in enumerate(SHARES):
            both = [plain[i] | koopt_run[i] for plain, koopt_run in runs]
            values = [statistics.median(one[sign] for one in both) for sign in SIGNS]
            print(f"| {name} | {share:.0%} | " + " | ".join(f"{value:.3g}" for value in values) + " |", flush=True)


if __name__ == "__main__":
    main()
