"""The paper's Hamiltonian network: a nonlinear oscillator solved by a small network without data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

HIDDEN = 10
POINTS = 200
END = 4 * math.pi
X0, P0 = 1.3, 1.0


class Oscillator(nn.Module):
    """The network 1:10:10:2 with sigmoids whose output N(t) gives x and p as ``x0 + (1 - exp(-t)) N(t)``.

    Source: Dogra & Redman (2020), S9; Mattheakis et al. (2022) for the parametric solution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1, HIDDEN)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.last = nn.Linear(HIDDEN, 2)
        self.double()

    def forward(self, times: Float[Tensor, "points 1"]) -> Float[Tensor, "points 2"]:
        hidden = torch.sigmoid(self.second(torch.sigmoid(self.first(times))))
        return _start(times) + (1 - torch.exp(-times)) * self.last(hidden)


def loss_by_autograd(network: Oscillator, times: Float[Tensor, "points 1"]) -> Float[Tensor, ""]:
    """Mean squared residual of Hamilton's equations, the time derivative by a second pass of autograd."""
    times = times.detach().requires_grad_()
    solution = network(times)
    slopes = [torch.autograd.grad(solution[:, i].sum(), times, create_graph=True)[0] for i in range(2)]
    return residual_loss(solution, torch.cat(slopes, dim=1))


def loss_by_forward(network: Oscillator, times: Float[Tensor, "points 1"]) -> Float[Tensor, ""]:
    """The same loss, the time derivative carried forward through the layers."""
    flat = torch.cat([parameter.reshape(-1) for parameter in network.parameters()])
    return batched_loss(flat.unsqueeze(0), times).squeeze(0)


def batched_loss(
    weights: Float[Tensor, "networks weights"], times: Float[Tensor, "points 1"]
) -> Float[Tensor, " networks"]:
    """The loss of many networks at once.

    Args:
        weights: `(networks, 152)`, each network's parameters in the order of ``Oscillator().named_parameters()``.
        times: `(points, 1)`, where the equations are to hold.

    Returns:
        `(networks,)` losses.
    """
    w1, b1, w2, b2, w3, b3 = weights.split([HIDDEN, HIDDEN, HIDDEN**2, HIDDEN, 2 * HIDDEN, 2], dim=1)
    w1, w2, w3 = w1.unflatten(1, (1, HIDDEN)), w2.unflatten(1, (HIDDEN, HIDDEN)).mT, w3.unflatten(1, (2, HIDDEN)).mT
    hidden = torch.sigmoid(times * w1 + b1.unsqueeze(1))
    slope = hidden * (1 - hidden) * w1
    hidden = torch.sigmoid(torch.baddbmm(b2.unsqueeze(1), hidden, w2))
    slope = hidden * (1 - hidden) * (slope @ w2)
    output, output_slope = torch.baddbmm(b3.unsqueeze(1), hidden, w3), slope @ w3
    decay = torch.exp(-times)
    return residual_loss(_start(times) + (1 - decay) * output, decay * output + (1 - decay) * output_slope)


def residual_loss(
    solution: Float[Tensor, "*networks points 2"], slope: Float[Tensor, "*networks points 2"]
) -> Float[Tensor, "*networks"]:
    """Mean over time of ``(x' - p)^2 + (p' + x + x^3)^2``."""
    x, p = solution.unbind(-1)
    dx, dp = slope.unbind(-1)
    return ((dx - p).square() + (dp + x + x**3).square()).mean(-1)


def time_points() -> Float[Tensor, "points 1"]:
    """The fixed points in time, `(200, 1)` float64."""
    return torch.linspace(0, END, POINTS, dtype=torch.float64).unsqueeze(1)


def initial_weights(seed: int) -> Float[Tensor, " weights"]:
    """One network's weights as PyTorch initializes them under `seed`, `(152,)` float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Oscillator()
    return torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()])


def _start(times: Tensor) -> Tensor:
    return torch.tensor([X0, P0], dtype=times.dtype, device=times.device)
