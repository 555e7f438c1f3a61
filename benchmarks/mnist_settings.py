"""How the settings of the MNIST experiment were chosen: seeds 1000 to 1024, validation split, every way tuned alike.

    python benchmarks/mnist_settings.py --output results/mnist-settings

Trains the 25 networks (some ten minutes on two cores) and prints, for each way to forecast, its best settings by mean
validation loss. None of these seeds, and no test image, stands in a published table.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from koopt import metrics, report
from koopt.experiments import classifier, data, minibatch, mnist_methods

RTOLS = (1e-3, 3e-4, 1e-4, 5e-5, 1e-5)
COLUMNS = {
    "what": "way",
    "window": "steps",
    "rank": "rank",
    "ranks": "ranks",
    "rtol": "rtol",
    "max_modulus": "limit",
    "horizon": "snapshots\nahead",
    "decay": "decay",
    "loss": "loss",
    "success": "success",
    "teq_over_T": "T_eq/T",
    "teq_over_T_mean": "…\nmean",
    "teq_over_T_error": "…\n± s.e.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/mnist-settings"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=25)
    parser.add_argument("--shown", type=int, default=3, help="best settings of each way that are printed")
    given = parser.parse_args()
    begin = time.perf_counter()
    run = minibatch.Run(seed=given.seed, seeds=given.seeds, rtols=RTOLS)
    if not minibatch.record_all(run, given.output / "recordings", lambda *_: None):
        sys.exit(130)
    torch.set_num_threads(1)
    groups = [minibatch.opened(run, first, given.output / "recordings") for first in run.firsts]
    protocol = mnist_methods.validation(run, groups, data.mnist())
    rows = [
        line(run, protocol, method, torch.cat([mnist_methods.forecast(run, group, method) for group in groups]))
        for method in candidates(run)
    ]
    rows.sort(key=lambda row: row["loss"])
    console = Console(width=150)
    for what in dict.fromkeys(row["what"] for row in rows):
        report.print_table(console, what, COLUMNS, [row for row in rows if row["what"] == what][: given.shown])
    seconds = time.perf_counter() - begin
    report.write_result(given.output, "mnist-settings", {"seed": given.seed, "seeds": given.seeds}, rows, [], seconds)


def candidates(run: minibatch.Run) -> list[mnist_methods.Method]:
    """Every setting that is tried."""
    blocks = run.window_steps // run.look
    shares = [blocks // 3, blocks // 2, 2 * blocks // 3, 5 * blocks // 6, blocks]

    def of(what: str, method: str, source: str, snapshots: int | None, horizon: float, **options: object):
        by = "quasi-node" if "max_size" in options else "network"
        return mnist_methods.Method(method, by, "baseline", what, source, snapshots, horizon, options)

    strided = {"max_modulus": 1.0, "max_size": classifier.QUASI_NODE}
    ahead = (1, 3, 6, 9, 12, 15, 18, 24, 32)
    behind = (-9, -6, -3, 0, 3, 6, 9, 12, 18)
    return [
        *(
            of("network operator, block means", "koopman", "blocks", n, h, rank=r, projected=True, max_modulus=1.0)
            for n, r, h in itertools.product(shares[1:], range(1, 7), ahead)
        ),
        *(
            of("network operators of several ranks, block means", "ensemble", "blocks", None, h, ranks=ranks)
            for ranks in ((2, 3), (2, 3, 4), (2, 3, 4, 5), (3, 5), (3, 6), (2, 3, 4, 5, 6, 8))
            for h in ahead
        ),
        *(
            of("quasi-node operators, every step, aimed at T", "koopman", "every_step", None, run.horizon, **more)
            for more in ({"rtol": rtol, "max_modulus": limit} for rtol in run.rtols for limit in run.limits)
        ),
        *(
            of("quasi-node operators, samples, aimed at T", "koopman", "samples", None, run.horizon / run.look, **more)
            for more in (strided | {"rank": r, "projected": p} for r in (1, 2, 3, 4, 5, 6, 8) for p in (False, True))
        ),
        *(
            of("line, block means", "line", "blocks", n, h, span=n - 1)
            for n, h in itertools.product(shares, (-3, 0, 1, 3, 6, 12))
        ),
        *(of("regression, block means", "regression", "blocks", n, h) for n, h in itertools.product(shares, behind)),
        *(of("mean", "mean", "blocks", n, 0) for n in (5, 10, 15, 20, 25, 30, 40, blocks)),
        *(of("EMA", "ema", "averages", None, 0, decay=decay) for decay in run.decays),
        *(
            of("double EMA, block means", "dema", "blocks", None, h, decay=decay)
            for decay, h in itertools.product((0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.99), (-6, -4, -2, 0, 2, 4, 8))
        ),
    ]


def line(
    run: minibatch.Run, protocol: mnist_methods.Protocol, method: mnist_methods.Method, weights: torch.Tensor
) -> dict:
    """What one setting reaches."""
    loss, _ = classifier.loss_and_accuracy(weights, protocol.images, protocol.labels)
    after = protocol.loss[run.t2 :]
    steps, censored = metrics.equivalent_steps(loss, after, every=run.epoch_steps)
    shares = steps.double() / run.horizon
    return {
        "what": method.what,
        "window": (method.snapshots or run.window_steps // run.look) * run.look,
        "rank": method.options.get("rank"),
        "ranks": ", ".join(map(str, method.options.get("ranks", ()))) or None,
        "rtol": method.options.get("rtol"),
        "max_modulus": method.options.get("max_modulus"),
        "projected": method.options.get("projected"),
        "horizon": method.horizon,
        "decay": method.options.get("decay"),
        "loss": loss.mean().item(),
        "success": metrics.success(loss, after).double().mean().item(),
        "teq_over_T": metrics.median(shares),
        "teq_over_T_mean": shares.mean().item(),
        "teq_over_T_error": shares.std().item() / len(shares) ** 0.5,
        "censored": censored.double().mean().item(),
    }


if __name__ == "__main__":
    main()
