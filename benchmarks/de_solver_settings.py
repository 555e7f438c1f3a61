"""Choose the recommended setting of the DE solver on seeds that the reported table does not use.

    python benchmarks/de_solver_settings.py [--optimizer adam] [--output results/de-solver-settings]

Trains 25 networks from seeds 1000 to 1024 (the table uses 0 to 24), forecasts T = 2,500 steps with every combination of
partition, tail of the window, stride and rank, and prints the best by success, then by mean T_eq/T. About four minutes.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, track

from koopt import metrics, report
from koopt.experiments import recording
from koopt.experiments.methods import OPTIMIZERS, Method, forecast, loss_of, weights_at

T = 2_500
COLUMNS = {
    "by": "by",
    "difference": "difference",
    "window": "tail",
    "stride": "stride",
    "rank": "rank",
    "rtol": "rtol",
    "success": "success",
    "teq_over_T": "T_eq/T",
    "teq_over_T_mean": "mean",
    "error_over_motion": "error/motion",
}


def candidates() -> list[Method]:
    """Every setting that is tried."""
    differences = [{"difference": True, "rank": rank} for rank in (4, 6, 8, 10, 12, 16)]
    states = [{"rtol": rtol} for rtol in (1e-6, 1e-8, 1e-10)]
    grid = itertools.product(
        ("network", "layer", "node"), (10_000, 5_000, 2_500), (100, 250, 500), differences + states
    )
    return [Method("koopman", by, "candidate", tail, stride, options) for by, tail, stride, options in grid]


def line(recorded: recording.Recording, method: Method) -> dict[str, object]:
    """How one setting did."""
    t2 = recorded.run.t2
    found = forecast(recorded, method, [T]).weights[T]
    loss = torch.from_numpy(np.array(recorded.loss[t2:]))
    steps, _ = metrics.equivalent_steps(loss_of(found), loss)
    return {
        "optimizer": recorded.run.optimizer,
        "by": method.by,
        "difference": method.options.get("difference", False),
        "window": method.tail,
        "stride": method.stride,
        "rank": method.options.get("rank"),
        "rtol": method.options.get("rtol"),
        "success": metrics.success(loss_of(found), loss).double().mean().item(),
        "teq_over_T": steps.double().median().item() / T,
        "teq_over_T_mean": steps.double().mean().item() / T,
        "error_over_motion": metrics.error_over_motion(found, weights_at(recorded, t2), weights_at(recorded, t2 + T)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    parser.add_argument("--output", type=Path, default=Path("results/de-solver-settings"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    run = recording.Run(given.optimizer, seed=1000)
    with Progress() as bars:
        task = bars.add_task("training", total=run.steps)
        finished = recording.record_all(
            [run], given.output / "recordings", lambda _, done, __: bars.update(task, completed=done)
        )
    if not finished:
        raise SystemExit("interrupted; the same command goes on")
    recorded = recording.opened(run, given.output / "recordings")
    rows = [line(recorded, method) for method in track(candidates(), "forecasting")]
    rows.sort(key=lambda row: (row["success"], row["teq_over_T_mean"]), reverse=True)
    console = Console()
    console.width = max(console.width, 100)
    title = f"{given.optimizer}, T = {T:,}, seeds 1000 to 1024, best 15 of {len(rows)}"
    report.print_table(console, title, COLUMNS, rows[:15])
    report.write_result(given.output, "de-solver-settings", {"T": T, "seed": 1000}, rows, [])


if __name__ == "__main__":
    main()
