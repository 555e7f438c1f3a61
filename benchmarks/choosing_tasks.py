"""The tasks that choosing.py forecasts: what was recorded up to t2, and where training went from there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from koopt.experiments import classifier, data, minibatch, oscillator, recording
from koopt.experiments.methods import loss_of as oscillator_loss
from koopt.experiments.methods import weights_at

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

WIDTH = 20
POINTS = 128
MNIST = minibatch.Run(seeds=10, seed=2000, rtols=())
GUARD = 2_000  # training images


@dataclass(frozen=True, eq=False)
class Task:
    """Many runs of one training around the step t2.

    Attributes:
        name: how it is called in tables.
        noisy: whether it was trained on mini-batches.
        model: a network of the same parameters, for partitions.
        horizon: T, optimizer steps.
        aim: the optimizer steps that forecasts look ahead: T, but a fifth of the window under noise.
        grain: optimizer steps from one row of `window` and of `means` to the next.
        window: `(time, seeds, weights)`, the last row at t2.
        means: `(blocks, seeds, weights)`, means over `grain` steps, the last block ends at t2.
        loss_of: losses of `(networks, weights)`, by which forecasts are compared.
        guard_of: the losses by which a forecaster may choose, of other data than `loss_of` where that is held out.
        later: `(time, seeds)` losses from t2 on.
        every: optimizer steps from row to row of `later`.
        start, truth: `(seeds, weights)` at t2 and at t2 + T, or the means of blocks that end there.
    """

    name: str
    noisy: bool
    model: nn.Module
    horizon: int
    aim: int
    grain: int
    window: Tensor
    means: Tensor
    loss_of: Callable[[Tensor], Tensor]
    guard_of: Callable[[Tensor], Tensor]
    later: Tensor
    every: int
    start: Tensor
    truth: Tensor


def mnist(folder: Path) -> Task:
    """The paper's classifier, trained on mini-batches; losses are those of the validation split."""
    run = MNIST
    groups = [minibatch.opened(run, first, folder) for first in run.firsts]
    samples, blocks, epochs, losses = (
        torch.cat([getattr(group, name) for group in groups], dim=1) for name in ("samples", "blocks", "epochs", "loss")
    )
    digits = data.mnist()
    images, labels = classifier.normalized(digits.train_images), digits.train_labels
    looks = run.epoch_steps // run.look

    def loss_on(points: slice) -> Callable[[Tensor], Tensor]:
        return lambda weights: classifier.loss_and_accuracy(weights.float(), images[points], labels[points])[0]

    validation = loss_on(slice(-run.held_out, None))
    return Task(
        name="MNIST",
        noisy=True,
        model=classifier.Classifier(),
        horizon=run.horizon,
        aim=run.window_steps // 5,
        grain=run.look,
        window=samples,
        means=blocks,
        loss_of=validation,
        guard_of=loss_on(slice(GUARD)),
        later=losses[run.t2 * looks :: looks],
        every=run.epoch_steps,
        start=epochs[run.t2],
        truth=epochs[run.t2 + run.ahead],
    )


def de_solver(run: recording.Run, folder: Path, horizon: int) -> Task:
    """The paper's solver of a differential equation, from its recording in `folder`."""
    recorded = recording.opened(run, folder)
    window = torch.from_numpy(np.array(recorded.window))
    later = torch.from_numpy(np.array(recorded.loss[run.t2 :]))
    return Task(
        name=f"DE solver, {run.optimizer.capitalize()}",
        noisy=False,
        model=oscillator.Oscillator(),
        horizon=horizon,
        aim=horizon,
        grain=1,
        window=window,
        means=window,
        loss_of=oscillator_loss,
        guard_of=oscillator_loss,
        later=later,
        every=1,
        start=weights_at(recorded, run.t2),
        truth=weights_at(recorded, run.t2 + horizon),
    )


@dataclass(frozen=True)
class Regression:
    """A network 1:20:20:1 with tanh fits sin(4x) + cos(9x)/2 at 128 points; SGD with momentum.

    Attributes:
        seeds, seed: how many networks; network i starts from seed `seed` + i.
        batch: points a step, drawn at random; None: all of them.
        rate: the learning rate; momentum is 0.9.
        t2, horizon, window: steps before the jump, T, and the steps before t2 that are kept.
        block: steps of the means that stand for the weights where there are mini-batches.
    """

    seeds: int = 10
    seed: int = 2000
    batch: int | None = None
    rate: float = 0.05
    t2: int = 5_000
    horizon: int = 1_000
    window: int = 2_000
    block: int = 50

    @property
    def name(self) -> str:
        return f"regression, {'all points' if self.batch is None else f'batches of {self.batch}'}"


def regression_network() -> nn.Module:
    layers = (nn.Linear(1, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
    return nn.Sequential(*layers).double()


def regression_losses(weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared errors of `(networks, weights)`."""
    w1, b1, w2, b2, w3, b3 = weights.split([WIDTH, WIDTH, WIDTH**2, WIDTH, WIDTH, 1], dim=1)
    hidden = torch.tanh(inputs * w1.unsqueeze(1) + b1.unsqueeze(1))
    hidden = torch.tanh(torch.baddbmm(b2.unsqueeze(1), hidden, w2.unflatten(1, (WIDTH, WIDTH)).mT))
    output = torch.baddbmm(b3.unsqueeze(1), hidden, w3.unsqueeze(2)).squeeze(2)
    return (output - targets).square().mean(dim=1)


def regression_data() -> tuple[Tensor, Tensor]:
    inputs = torch.linspace(-1, 1, POINTS, dtype=torch.float64).unsqueeze(1)
    return inputs, (torch.sin(4 * inputs) + 0.5 * torch.cos(9 * inputs)).squeeze(1)


def regression(made: Regression, folder: Path, progress: Callable[[int, int], None]) -> Task:
    """Train the regression, or take it from `folder` if it is there."""
    key = "-".join(str(value) for value in vars(made).values())
    path = folder / f"regression-{key}.npz"
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez(file, **_train_regression(made, progress))
        os.replace(temporary, path)
    with np.load(path) as kept:
        arrays = {name: torch.from_numpy(kept[name]) for name in kept.files}
    inputs, targets = regression_data()

    @torch.no_grad()
    def loss_of(weights: Tensor) -> Tensor:
        return regression_losses(weights, inputs, targets)

    return Task(
        name=made.name,
        noisy=made.batch is not None,
        model=regression_network(),
        horizon=made.horizon,
        aim=made.horizon if made.batch is None else made.window // 5,
        grain=1,
        means=arrays["window"],
        loss_of=loss_of,
        guard_of=loss_of,
        every=1,
        **arrays,
    )


def _train_regression(made: Regression, progress: Callable[[int, int], None]) -> dict[str, Any]:
    starts = []
    for seed in range(made.seed, made.seed + made.seeds):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            starts.append(nn.utils.parameters_to_vector(regression_network().parameters()).detach())
    weights = torch.stack(starts).requires_grad_()
    optimizer = torch.optim.SGD([weights], made.rate, momentum=0.9)
    generator = torch.Generator().manual_seed(made.seed)
    inputs, targets = regression_data()
    last = made.t2 + 3 * made.horizon
    block = 1 if made.batch is None else made.block
    window, later = [], []
    means = {end: torch.zeros_like(weights) for end in (made.t2, made.t2 + made.horizon)}
    for step in range(last + 1):
        if step % 100 == 0:
            progress(step, last)
        with torch.no_grad():
            if made.t2 - made.window <= step <= made.t2:
                window.append(weights.detach().clone())
            for end, total in means.items():
                if end - block < step <= end:
                    total += weights / block
            if step >= made.t2:
                later.append(regression_losses(weights, inputs, targets))
        batch = slice(None) if made.batch is None else torch.randint(POINTS, (made.batch,), generator=generator)
        optimizer.zero_grad()
        regression_losses(weights, inputs[batch], targets[batch]).sum().backward()
        optimizer.step()
    start, truth = means.values()
    return {
        "window": torch.stack(window).numpy(),
        "later": torch.stack(later).numpy(),
        "start": start.detach().numpy(),
        "truth": truth.detach().numpy(),
    }
