"""Adam's decay of squared gradients beside jumps, on the full-batch tasks of `koopt bench`: how much each saves.

    python benchmarks/adam_beta2.py --tasks de-solver --seeds 6000 6001 6002 6003 6004

Prints the cost, a guard evaluation counted as a third of a step, until the losses that Adam with torch's defaults and a
cosine schedule has at 50, 75 and 100 % of its steps, as a share of these steps (geometric mean over the seeds; a loss
that is missed counts 1.5), and that mean of the final losses: at each decay and rate, without koopt and with it.
"""

from __future__ import annotations

import argparse
import functools

import numpy as np
import torch
from jump_options import RATES
from reaching import mean_shares

from koopt.bench.method import Trainer
from koopt.bench.methods import attached
from koopt.bench.methods.training import OPTIMIZERS, searched, start_plain
from koopt.bench.protocol import losses_at_shares
from koopt.bench.run import run
from koopt.bench.tasks import TASKS

WAYS = {
    "plain": Trainer("plain", start_plain, searched),
    "koopt": Trainer("koopt", attached.start(start_plain), searched),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5000, 5005)))
    parser.add_argument("--decays", type=float, nargs="+", default=[0.999, 0.99, 0.95])
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 1.0], help="of the task's rate")
    arguments = parser.parse_args()
    for task in (TASKS[name] for name in arguments.tasks):
        given = {"optimizer": "adam", "rate": RATES[task.name], "schedule": "cosine", "evaluated": "trained"}
        aims = [losses_at_shares(run(task, WAYS["plain"], given, seed)[0], task) for seed in arguments.seeds]
        for decay in arguments.decays:
            name = f"adam, beta2 {decay:g}"
            OPTIMIZERS[name] = functools.partial(torch.optim.Adam, betas=(0.9, decay))
            for title, trainer in WAYS.items():
                for rate in (RATES[task.name] * factor for factor in arguments.factors):
                    own = given | {"optimizer": name, "rate": rate}
                    records = [run(task, trainer, own, seed)[0] for seed in arguments.seeds]
                    means = mean_shares([record.curve for record in records], aims, task.steps, "cost")
                    final = np.exp(np.mean([np.log(record.final) for record in records]))
                    print(
                        f"{task.name:10s} beta2 {decay:<6g} rate {rate:<6g} {title} "
                        f"{' '.join(f'{mean:.2f}' for mean in means)}  final {final:.3g}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
