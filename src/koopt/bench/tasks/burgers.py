"""Burgers' equation, solved by a network of 8,577 weights without data: a sine that steepens to a layer at the wall."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from koopt.bench.task import Problem, Task
from koopt.bench.tasks import making

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

HIDDEN = 64
VISCOSITY = 0.05
POINTS = 160
GRID = 41  # points of the test grid an axis


class Burgers(nn.Module):
    """The tanh network 2:64:64:64:1 N, its output ``sin(pi x) + t x (1 - x) N(t, x)``: start and walls hold exactly.

    Source: Cole (1951) for the problem; Lagaris et al. (1998) for the form; Raissi et al. (2019).
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, HIDDEN)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.third = nn.Linear(HIDDEN, HIDDEN)
        self.last = nn.Linear(HIDDEN, 1)
        for layer in (self.first, self.second, self.third, self.last):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.double()

    def forward(self, points: Float[Tensor, "points 2"]) -> Float[Tensor, " points"]:
        hidden = torch.tanh(self.first(2 * points - 1))
        hidden = torch.tanh(self.third(torch.tanh(self.second(hidden))))
        t, x = points.unbind(1)
        return torch.sin(math.pi * x) + t * x * (1 - x) * self.last(hidden).squeeze(1)


def residual(network: Burgers, points: Float[Tensor, "points 2"]) -> Float[Tensor, " points"]:
    """``u_t + u u_x - nu u_xx``, the derivatives carried forward through the layers.

    Args:
        network: gives u.
        points: `(points, 2)`, t and x.
    """
    by_t, by_x = (2 * network.first.weight).unbind(1)  # the same at all points
    value = torch.tanh(network.first(2 * points - 1))
    gain = 1 - value.square()
    flow_t, flow_x, flow_xx = gain * by_t, gain * by_x, value * gain * (-2 * by_x.square())
    for layer in (network.second, network.third):
        value = torch.tanh(layer(value))
        by_t, by_x, by_xx = (flow @ layer.weight.T for flow in (flow_t, flow_x, flow_xx))
        gain = 1 - value.square()
        flow_t, flow_x = gain * by_t, gain * by_x
        flow_xx = gain * by_xx - 2 * value * flow_x * by_x
    n = network.last(value).squeeze(1)
    n_t, n_x, n_xx = (flow @ network.last.weight[0] for flow in (flow_t, flow_x, flow_xx))
    t, x = points.unbind(1)
    sine, bump, slope = torch.sin(math.pi * x), x * (1 - x), 1 - 2 * x
    u = sine + t * bump * n
    u_t = bump * (n + t * n_t)
    u_x = math.pi * torch.cos(math.pi * x) + t * (slope * n + bump * n_x)
    u_xx = -(math.pi**2) * sine + t * (2 * slope * n_x + bump * n_xx - 2 * n)
    return u_t + u * u_x - VISCOSITY * u_xx


def collocation() -> Float[Tensor, "points 2"]:
    """Where the equation is to hold: the first Sobol points (t, x) of the unit square, `(160, 2)` float64."""
    return torch.quasirandom.SobolEngine(2).fast_forward(1).draw(POINTS, dtype=torch.float64)  # without the corner


def solution(points: Float[Tensor, "points 2"]) -> Float[Tensor, " points"]:
    """The exact u, by the transform of Cole and Hopf and Gauss-Hermite quadrature.

    >>> from koopt.bench.tasks.burgers import solution
    >>> solution(torch.tensor([[0.0, 0.5]], dtype=torch.float64)).item()  # the start is sin(pi x)
    1.0

    Source: Basdevant et al. (1986).
    """
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    t, x = points.numpy().T
    y = x[:, None] - 2 * np.sqrt(VISCOSITY * t)[:, None] * nodes
    weights = weights * np.exp((np.cos(np.pi * y) - 1) / (2 * np.pi * VISCOSITY))
    return torch.from_numpy((weights * np.sin(np.pi * y)).sum(1) / weights.sum(1))


def problem(seed: int, guarded: bool) -> Problem:
    """Burgers' equation from the initial weights of `seed`; without a split to hold out, `guarded` changes nothing."""
    network = making.initialized(Burgers, seed)

    def test() -> float:
        axis = torch.linspace(0, 1, GRID, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)
        with torch.no_grad():
            return ((network(grid) - solution(grid)).norm() / solution(grid).norm()).item()

    return making.full_batch(network, collocation(), lambda points: residual(network, points).square().mean(), test)


TASK = Task(
    name="burgers",
    about="Burgers' equation, tanh network 2:64:64:64:1, full batch",
    steps=4000,
    looks=40,
    full_batch=True,
    optimizers=("adam",),
    rates=(2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    schedules=("cosine", "constant"),
    problem=problem,
)
