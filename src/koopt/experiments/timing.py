"""What a jump costs against the optimizer steps it replaces: one network, one thread, one process."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import koopt
from koopt.experiments import oscillator, recording

if TYPE_CHECKING:
    from torch import Tensor


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


def jump_seconds(
    window: Tensor, stride: int, steps: int, method: str, by: str, options: dict[str, Any], repeats: int
) -> tuple[float, float]:
    """Seconds of a jump and of recording its window.

    Args:
        window: `(time, weights)`, one network's weights at every step.
        stride: steps from snapshot to snapshot.
        steps: how far to jump.
        method, by, options: as ``Trajectory.forecast`` takes them.
        repeats: how often the jump is timed.

    Returns:
        The median of fit, forecast and writing the weights; the sum of all calls of ``record``.
    """
    network = network_at(window[0])
    trajectory = koopt.Trajectory(network, window=(len(window) - 1) // stride + 1, stride=stride)
    whole = koopt.partition(network, "network")
    recording_time = 0.0
    for weights in window:
        koopt.load_into(network, whole.unflatten(weights))
        begin = time.perf_counter()
        trajectory.record()
        recording_time += time.perf_counter() - begin

    def jump(steps: int) -> float:
        begin = time.perf_counter()
        koopt.load_into(network, trajectory.forecast(steps, method, by, **options))
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
