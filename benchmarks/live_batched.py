"""Does one batched forward (torch.func) over candidates take less time than a loop that calls the guard for each?

    python benchmarks/live_batched.py

The guard, a closure without arguments, runs under vmap with the model's parameters exchanged for batched ones.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils.stateless import _reparametrize_module

from koopt.experiments import oscillator

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Guard = Callable[[], Tensor]

NETWORKS = {"10k weights": (64, 64, 64, 10), "118k weights": (784, 128, 128, 10)}


def de_solver() -> tuple[nn.Module, Guard]:
    torch.manual_seed(1000)
    network, times = oscillator.Oscillator(), oscillator.time_points()
    return network, lambda: oscillator.loss_by_forward(network, times)


def classifier(sizes: tuple[int, ...], batch: int) -> tuple[nn.Module, Guard]:
    torch.manual_seed(1000)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    x, y = torch.randn(batch, sizes[0]), torch.randint(0, sizes[-1], (batch,))
    return model, lambda: nn.functional.cross_entropy(model(x), y)


@torch.no_grad()
def looped(model: nn.Module, guard: Guard, candidates: list[dict[str, Tensor]]) -> Tensor:
    parameters = dict(model.named_parameters())
    losses = []
    for weights in candidates:
        torch._foreach_copy_(list(parameters.values()), [weights[name] for name in parameters])
        losses.append(guard().item())
    return torch.tensor(losses)


@torch.no_grad()
def batched(model: nn.Module, guard: Guard, candidates: list[dict[str, Tensor]]) -> Tensor:
    stacked = {name: torch.stack([weights[name] for weights in candidates]) for name in candidates[0]}

    def one(weights: dict[str, Tensor]) -> Tensor:
        with _reparametrize_module(model, weights):
            return guard()

    return torch.func.vmap(one)(stacked)


def compare(model: nn.Module, guard: Guard, count: int) -> tuple[float, float, float]:
    """Milliseconds a candidate by the loop and batched, and the largest relative difference of their losses."""
    candidates = [
        {name: p.detach() + 0.01 * torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(count)
    ]
    taken: dict[Callable[..., Tensor], list[float]] = {looped: [], batched: []}
    losses = [each(model, guard, candidates) for each in taken]
    for _ in range(30):
        for each, seconds in taken.items():
            started = time.thread_time()
            each(model, guard, candidates)
            seconds.append(time.thread_time() - started)
    one, other = (1e3 * statistics.median(seconds) / count for seconds in taken.values())
    return one, other, ((losses[1] - losses[0]).abs() / losses[0].abs()).max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, nargs="+", default=[4, 8])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tasks = {"de-solver, 152 weights": de_solver()}
    for (name, sizes), batch in itertools.product(NETWORKS.items(), (64, 512)):
        tasks[f"{name}, guard of {batch}"] = classifier(sizes, batch)
    for (name, (model, guard)), count in itertools.product(tasks.items(), arguments.candidates):
        one, other, difference = compare(model, guard, count)
        print(
            f"{name}, {count} candidates: loop {one:.3f} ms each, batched {other:.3f} ms, "
            f"{one / other:.2f} times as fast, losses differ by {difference:.0e}"
        )


if __name__ == "__main__":
    main()
