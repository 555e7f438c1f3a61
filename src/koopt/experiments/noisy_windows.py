"""Windows of noisy training and what plans make of them; under mini-batches a distance in weights says nothing."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import koopt
from koopt.experiments import minibatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor


def noise_row(label: str, windows: Sequence[Float[Tensor, "time state"]], tolerance: float = 0.1) -> dict[str, Any]:
    """What plans make of windows from noisy training.

    Args:
        label: what they are.
        windows: `(time, state)` each, one a network.
        tolerance: as :func:`koopt.plan` takes it.
    """
    plans = [koopt.plan(window, tolerance=tolerance) for window in windows]
    reasons = [plan.reason.partition(":")[0] for plan in plans]
    return {
        "kind": "noise",
        "what": label,
        "networks": len(plans),
        "snapshots": len(windows[0]),
        "refused": sum(plan.horizon == 0 for plan in plans) / len(plans),
        "reason": ", ".join(f"{reason} {reasons.count(reason)}" for reason in sorted(set(reasons))),
        "drift_over_noise": median([plan.drift_over_noise for plan in plans]),
        "horizon": median([plan.horizon for plan in plans]),
        "expected_error": median([plan.expected_error for plan in plans]),
    }


def minibatch_windows(
    networks: int, seed: int, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, list[Tensor]]:
    """Weights of small classifiers, trained on mini-batches and on all data, at every 10th step and as block means.

    Args:
        networks: how many; network i starts from seed `seed` + i.
        seed: the first seed.
        progress: called with the stage's name, networks done and their total.
    """
    found: dict[str, list[Tensor]] = {}
    for i in range(networks):
        if progress is not None:
            progress("mini-batches", i, networks)
        for batch, name in ((32, "mini-batches of 32"), (512, "all data")):
            steps = _train_classifier(seed + i, batch)
            found.setdefault(f"{name}, every 10th step", []).append(steps[::10])
            found.setdefault(f"{name}, means of 10 steps", []).append(steps[1:].unflatten(0, (-1, 10)).mean(dim=1))
    if progress is not None:
        progress("mini-batches", networks, networks)
    return found


def mnist_windows(run: minibatch.Run, folder: Path) -> dict[str, list[Tensor]]:
    """Weights of the MNIST classifiers in the window of the paper, as they were recorded.

    Args:
        run: what was trained.
        folder: where its recordings are.

    Raises:
        ValueError: if they are not complete, or damaged.
    """
    found: dict[str, list[Tensor]] = {}
    for first in run.firsts:
        group = minibatch.opened(run, first, folder)
        for label, kept in ((f"every {run.look} steps", group.samples), (f"means of {run.look} steps", group.blocks)):
            found.setdefault(f"MNIST, {label}", []).extend(kept.unbind(dim=1))
    return found


def _train_classifier(seed: int, batch: int, steps: int = 4_000, kept: int = 1_000) -> Tensor:
    """The last weights of an MLP 10:32:3 on 512 labelled points, SGD with momentum, `(kept + 1, weights)` float32."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(512, 10, generator=generator)
    labels = (inputs @ torch.randn(10, 3, generator=generator) + torch.randn(512, 3, generator=generator)).argmax(dim=1)
    shapes = ((32, 10), (32,), (3, 32), (3,))
    weights = [(0.3 * torch.randn(shape, generator=generator)).requires_grad_() for shape in shapes]
    optimizer = torch.optim.SGD(weights, lr=0.01, momentum=0.9)
    window = []
    for step in range(steps + 1):
        if step >= steps - kept:
            window.append(torch.cat([weight.detach().flatten() for weight in weights]))
        rows = torch.randperm(512, generator=generator)[:batch]
        hidden = torch.tanh(nn.functional.linear(inputs[rows], weights[0], weights[1]))
        loss = nn.functional.cross_entropy(nn.functional.linear(hidden, weights[2], weights[3]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.stack(window)
