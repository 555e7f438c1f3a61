"""A wider transformer with larger batches than the benchmark's: what bases of longer sides bring there.

    python benchmarks/wide_transformer.py --seeds 3000 3001

The task shakespeare with width 128 and batches of 64 windows (4,096 characters), AdamW at a constant rate with koopt
attached, whose forecast is evaluated: with the optimizer's own moves, with bases of sides up to 256 (small weights up
to 1,024), and by default, where examples are counted. Printed are the steps to the losses of AdamW with a cosine
schedule at 50, 75 and 100 % of its own (geometric mean over seeds; a loss that is missed counts 1.5), the same of
processor time, and the final losses.
"""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import mock

from reaching import cells

from koopt.bench.method import Trainer
from koopt.bench.methods import attached
from koopt.bench.methods.training import searched, start_plain
from koopt.bench.protocol import losses_at_shares
from koopt.bench.run import run
from koopt.bench.tasks import TASKS, shakespeare
from koopt.live import eigenbases

if TYPE_CHECKING:
    from collections.abc import Iterator

WIDTH, BATCH = 128, 64
NEVER = 2**40  # examples for each row or column
WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "own moves": ({"precondition": 0}, NEVER),
    "sides up to 256": ({}, NEVER),
    "default": ({}, eigenbases.SHARE),
}


@contextlib.contextmanager
def wide(share: int) -> Iterator[None]:
    """The task's network and batches are larger within, and examples for each row of a longer side as given."""
    with (
        mock.patch.object(shakespeare, "WIDTH", WIDTH),
        mock.patch.object(shakespeare, "BATCH", BATCH),
        mock.patch.object(eigenbases, "SHARE", share),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3000, 3001])
    parser.add_argument("--rate", type=float, default=2e-3, help="of all ways")
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    task = replace(TASKS["shakespeare"], steps=arguments.steps)
    given = {"optimizer": "adamw", "rate": arguments.rate, "schedule": "cosine"}
    with wide(NEVER):
        runs = [run(task, Trainer("plain", start_plain, searched), given, seed)[0] for seed in arguments.seeds]
    aims = [losses_at_shares(one, task) for one in runs]
    whole = sum(float(one.curve.seconds[-1]) for one in runs) / len(runs)
    finals = " ".join(f"{one.final:.4g}" for one in runs)
    print(f"| AdamW, cosine | {whole / task.steps * 1e3:.0f} ms a step | | {finals} |", flush=True)
    own = given | {"schedule": "constant", "evaluated": "forecast"}
    for title, (options, share) in WAYS.items():
        trainer = Trainer("koopt", attached.start(start_plain, **options), attached.grid(), guard=True)
        with wide(share):
            found = [run(task, trainer, own, seed)[0] for seed in arguments.seeds]
        print(f"| {title} | {cells(found, aims, task.steps, whole)} |", flush=True)


if __name__ == "__main__":
    main()
