"""What a jump costs against the optimizer steps it replaces: one network, one thread, one process."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import koopt
from koopt.experiments import classifier, oscillator, recording

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from koopt.experiments.data import Mnist


@dataclass(frozen=True)
class Cost:
    """Seconds, one network, one thread: an optimizer step, a jump (fit, forecast, write), recording the window."""

    step: float
    jump: float
    recording: float


def step_seconds(optimizer: str, start: Tensor, steps: int = 400) -> float:
    """The median time of a real step, by the faster of the two ways to get the time derivative."""
    times = oscillator.time_points()
    medians = []
    for loss_of_network in (oscillator.loss_by_autograd, oscillator.loss_by_forward):
        network = network_at(start)
        stepper = recording.OPTIMIZERS[optimizer](network.parameters())
        taken = []
        for _ in range(steps):
            begin = time.perf_counter()
            stepper.zero_grad()
            loss_of_network(network, times).backward()
            stepper.step()
            taken.append(time.perf_counter() - begin)
        medians.append(statistics.median(taken[steps // 4 :]))
    return min(medians)


def classifier_step_seconds(digits: Mnist, batch: int, steps: int = 600) -> tuple[float, float]:
    """The median time of a real step on mini-batches, from tensors in memory and from a ``DataLoader``."""
    images, labels = classifier.normalized(digits.train_images), digits.train_labels
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).split(batch)
    from_memory = ((images[rows], labels[rows]) for rows in order)
    loader = DataLoader(TensorDataset(images, labels), batch_size=batch, shuffle=True)
    medians = []
    for batches in (from_memory, iter(loader)):
        network = classifier.Classifier()
        stepper = torch.optim.Adadelta(network.parameters(), lr=1.0)
        taken = []
        for _ in range(min(steps, len(order))):
            begin = time.perf_counter()
            inputs, targets = next(batches)
            stepper.zero_grad()
            nn.functional.cross_entropy(network(inputs), targets).backward()
            stepper.step()
            taken.append(time.perf_counter() - begin)
        medians.append(statistics.median(taken[len(taken) // 4 :]))
    return medians[0], medians[1]


def jump_seconds(
    network: nn.Module,
    window: Float[Tensor, "time weights"],
    snapshots: int,
    stride: int,
    steps: float,
    repeats: int,
    average: bool = False,
    **asked: Any,
) -> tuple[float, float]:
    """Seconds of a jump and of recording its window.

    Args:
        network: where the weights are loaded, `record` reads them and the forecast is written.
        window: `(time, weights)`, one network's weights at every step.
        snapshots, stride, average: how the window is recorded, as ``Trajectory`` takes them.
        steps: how far to jump.
        repeats: how often the jump is timed.
        asked: what else ``Trajectory.forecast`` takes: the method, by, options.

    Returns:
        The median of fit, forecast and writing the weights; the sum of all calls of ``record``.
    """
    trajectory = koopt.Trajectory(network, window=snapshots, stride=stride, average=average)
    whole = koopt.partition(network, "network")
    recording_time = 0.0
    for weights in window:
        koopt.load_into(network, whole.unflatten(weights))
        begin = time.perf_counter()
        trajectory.record()
        recording_time += time.perf_counter() - begin

    def jump(steps: float) -> float:
        begin = time.perf_counter()
        koopt.load_into(network, trajectory.forecast(steps, **asked))
        return time.perf_counter() - begin

    try:
        jump(steps)
    except ValueError:  # the forecast is not finite: a failure in the table, that costs as much as a shorter one
        steps = stride
    return statistics.median([jump(steps) for _ in range(repeats + 3)][3:]), recording_time


def network_at(flat: Tensor) -> oscillator.Oscillator:
    """One network with these weights."""
    network = oscillator.Oscillator()
    koopt.load_into(network, koopt.partition(network, "network").unflatten(flat))
    return network
