"""A training run with koopt that is killed at random moments and resumed: its weights against an uninterrupted run's.

    python benchmarks/killed.py --kills 500

Each life is a fork that is killed with SIGKILL after a random time; it saves every few steps through a temporary file.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import koopt

SAVE_EVERY = 7


class Run:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.003)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10**6)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(16, 2, generator=generator)
        self.y = self.x.prod(dim=1, keepdim=True)
        self.koop = koopt.attach(
            self.optimizer, self.model, self.guard, "jump", cycle=20, tail=12, window=16, max_overhead=0.1, history=8
        )
        self.step = 0

    def guard(self) -> torch.Tensor:
        self.model.eval()
        return nn.functional.mse_loss(self.model(self.x), self.y)

    def train(self) -> None:
        self.optimizer.zero_grad()
        nn.functional.mse_loss(self.model(self.x), self.y).backward()
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1

    def state(self) -> dict[str, object]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "koop": self.koop}
        states = {name: part.state_dict() for name, part in parts.items()}
        return states | {"step": self.step, "random": torch.get_rng_state()}

    def save(self, path: Path) -> None:
        temporary = path.with_suffix(".tmp")
        torch.save(self.state(), temporary)
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.koop.load_state_dict(state["koop"])
        self.step = state["step"]
        torch.set_rng_state(state["random"])


def live(path: Path) -> None:
    """Resume and train until killed."""
    run = Run()
    if path.exists():
        run.load(path)
    while True:
        run.train()
        if run.step % SAVE_EVERY == 0:
            run.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the checkpoint goes (default: a temporary one)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "checkpoint.pt"
        reference, same = Run(), 0
        reference_random = torch.get_rng_state()
        pause = 0.08
        for _ in range(arguments.kills):
            child = os.fork()
            if child == 0:
                live(path)
            time.sleep(moments.uniform(0.0, pause))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed = Run()
            if path.exists():  # if not, it was killed before it had saved, and starts again
                killed.load(path)
            random_state = torch.get_rng_state()
            torch.set_rng_state(reference_random)
            pause = 0.08 if killed.step > reference.step else 2 * pause  # a busy machine needs longer to get anywhere
            while reference.step < killed.step:
                reference.train()
            reference_random = torch.get_rng_state()
            same += _identical(reference, killed) and torch.equal(random_state, reference_random)
        accepted = sum(jump.accepted for jump in reference.koop.jumps)
        print(f"{reference.step} steps, {accepted} of {len(reference.koop.jumps)} jumps accepted")
        print(f"{same} of {arguments.kills} kills: bit-identical")


def _identical(one: Run, other: Run) -> bool:
    return all(
        torch.equal(own.view(-1).view(torch.uint8), its.view(-1).view(torch.uint8))
        for own, its in zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    )


if __name__ == "__main__":
    main()
