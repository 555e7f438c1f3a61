"""The paper's differential-equation solver, from initialization."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from koopt.bench.task import Problem, Task
from koopt.bench.tasks import making
from koopt.experiments import oscillator

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def loss(network: oscillator.Oscillator, times: Float[Tensor, "points 1"]) -> Float[Tensor, ""]:
    """As ``oscillator.loss_by_forward``, but for one network, which takes a fifth less time."""
    value = torch.sigmoid(network.first(times))
    slope = value * (1 - value) * network.first.weight[:, 0]
    value = torch.sigmoid(network.second(value))
    slope = value * (1 - value) * (slope @ network.second.weight.T)
    output, output_slope = network.last(value), slope @ network.last.weight.T
    start = torch.tensor([oscillator.X0, oscillator.P0], dtype=times.dtype)
    decay = torch.exp(-times)
    return oscillator.residual_loss(start + (1 - decay) * output, decay * output + (1 - decay) * output_slope)


def solution(times: Float[Tensor, "points 1"], substeps: int = 10) -> Float[Tensor, "points 2"]:
    """x and p at evenly spaced times from 0 on, by the classical Runge-Kutta method.

    >>> from koopt.bench.tasks.de_solver import solution
    >>> solution(torch.tensor([[0.0], [0.1]], dtype=torch.float64))[0].tolist()
    [1.3, 1.0]
    """

    def slope(state: np.ndarray) -> np.ndarray:
        x, p = state
        return np.array([p, -x - x**3])

    step = (times[1] - times[0]).item() / substeps
    states = [np.array([oscillator.X0, oscillator.P0])]
    for _ in range(substeps * (len(times) - 1)):
        state = states[-1]
        k1 = slope(state)
        k2 = slope(state + step / 2 * k1)
        k3 = slope(state + step / 2 * k2)
        k4 = slope(state + step * k3)
        states.append(state + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
    return torch.from_numpy(np.stack(states[::substeps]))


def problem(seed: int, guarded: bool) -> Problem:
    """The oscillator from the initial weights of `seed`; without a split to hold out, `guarded` changes nothing."""
    network, times = making.initialized(oscillator.Oscillator, seed), oscillator.time_points()

    def test() -> float:
        truth = solution(times)
        with torch.no_grad():
            return ((network(times) - truth).norm() / truth.norm()).item()

    return making.full_batch(network, times, lambda points: loss(network, points), test)


TASK = Task(
    name="de-solver",
    about="the paper's nonlinear oscillator, sigmoid network 1:10:10:2, full batch",
    steps=10_000,
    looks=40,
    full_batch=True,
    optimizers=("adam",),
    rates=(0.01, 0.02, 0.04, 0.08, 0.16),
    schedules=("cosine", "constant"),
    problem=problem,
)
