"""Training loops that were first run when all of koopt's defaults had been settled: tasks of `unseen.py`."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from unseen_tasks import (
    classify,
    convolutions,
    digits,
    drawn,
    in_batches,
    on_all,
    perceptron,
    picture,
    poisson_residual,
    supervised,
    task,
)

from koopt.bench.tasks import making
from koopt.experiments import data

if TYPE_CHECKING:
    from torch import Tensor

    from koopt.bench.task import Problem


class Free(nn.Module):
    """Parameters that no layer holds, each drawn from a normal distribution."""

    def __init__(self, size: float, dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(size * torch.randn(shape, dtype=dtype)))


def embedding(seed: int, guarded: bool) -> Problem:
    """300 digits in the plane; source: van der Maaten & Hinton (2008), at one width for all and no exaggeration."""
    network = making.initialized(partial(Free, 1e-2, places=(300, 2)), seed)
    images = digits(0, 300)[0].flatten(1)
    apart = torch.cdist(images, images).square()
    near = torch.softmax(-apart / apart.median() * 10 - 1e9 * torch.eye(300), dim=1)
    near = ((near + near.T) / 600).clamp(min=1e-12)

    def divergence() -> Tensor:
        close = 1 / (1 + (network.places[:, None] - network.places).square().sum(dim=2))
        close = close * (1 - torch.eye(300))
        return (near * (near.log() - (close / close.sum()).clamp(min=1e-12).log())).sum()

    return on_all(network, divergence)


def control(seed: int, guarded: bool) -> Problem:
    """The torques of 60 steps that swing a pendulum up and hold it there."""
    network = making.initialized(partial(Free, 0.1, torques=(60,)), seed)

    def cost() -> Tensor:
        angle, speed, total = torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.0)
        for torque in network.torques:
            speed = speed + 0.08 * (torque - 9.81 * torch.sin(angle) - 0.1 * speed)
            angle = angle + 0.08 * speed
            total = total + (1 + torch.cos(angle)) + 0.01 * speed.square() + 0.002 * torque.square()
        return total / 60

    return on_all(network, cost)


class Splats(nn.Module):
    """Sums of 48 normal densities that are not normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(2 * torch.rand(48, 2) - 1)
        self.sizes = nn.Parameter(torch.full((48, 2), -2.0))
        self.turns, self.lights = nn.Parameter(torch.zeros(48)), nn.Parameter(0.1 * torch.randn(48))

    def forward(self, at: Tensor) -> Tensor:
        away = at[:, None] - self.places
        cosine, sine = self.turns.cos(), self.turns.sin()
        along = away[..., 0] * cosine + away[..., 1] * sine
        across = away[..., 1] * cosine - away[..., 0] * sine
        turned = torch.stack([along, across], dim=2) / self.sizes.exp()
        return (self.lights * torch.exp(-0.5 * turned.square().sum(dim=2))).sum(dim=1, keepdim=True)


def splats(seed: int, guarded: bool) -> Problem:
    """A digit by Gaussian splats."""
    network, (places, values) = making.initialized(Splats, seed), picture()
    return on_all(network, lambda: functional.mse_loss(network(places), values))


def atoms(seed: int, guarded: bool) -> Problem:
    """Twenty atoms with Lennard-Jones potentials; the energy of each, and 5, so that shares of it make sense."""
    network = making.initialized(partial(Free, 1.5, torch.float64, places=(20, 3)), seed)

    def energy() -> Tensor:
        sixth = (torch.pdist(network.places).square() + 0.01) ** -3
        return 5 + 4 * (sixth.square() - sixth).sum() / 20

    return on_all(network, energy)


class Adapted(nn.Module):
    """A linear layer that stays, and a change of rank 4; source: Hu et al. (2021)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(4, layer.in_features) / math.sqrt(layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


def adapters(seed: int, guarded: bool) -> Problem:
    """Low-rank changes to a network that knows digits, so that it knows them upside down."""

    def make() -> nn.Module:
        network = perceptron(784, 64, 64, 10, activation=nn.ReLU)
        optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
        images, labels = digits(0, 1000)
        for _ in range(60):
            optimizer.zero_grad()
            functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
        return nn.Sequential(*[Adapted(part) if isinstance(part, nn.Linear) else part for part in network])

    network, (images, labels) = making.initialized(make, seed), digits(2000, 2600)
    return on_all(network, lambda: functional.cross_entropy(network(images.flip(1)), labels))


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.out = nn.Embedding(23, 24), perceptron(48, 64, 23, activation=nn.ReLU)

    def forward(self, pairs: Tensor) -> Tensor:
        return self.out(self.numbers(pairs).flatten(1))


def sums(seed: int, guarded: bool) -> Problem:
    """Sums modulo 23, of which 70 % are known."""
    network = making.initialized(Sums, seed)
    pairs = torch.cartesian_prod(torch.arange(23), torch.arange(23))[torch.randperm(529, generator=drawn(31))]

    def misses(pairs: Tensor) -> Tensor:
        return functional.cross_entropy(network(pairs), pairs.sum(dim=1) % 23)

    return on_all(network, lambda: misses(pairs[:370]), misses, (pairs[370:],))


def deblurring(seed: int, guarded: bool) -> Problem:
    """A digit from a blurred and noisy picture of it, with a penalty on its total variation."""
    network = making.initialized(partial(Free, 0.1, pixels=(28, 28)), seed)
    axis = torch.arange(-3, 4)
    kernel = torch.exp(-0.5 * (axis[:, None].square() + axis.square()) / 1.5**2)
    kernel = (kernel / kernel.sum())[None, None]

    def blurred(image: Tensor) -> Tensor:
        return functional.conv2d(image[None, None], kernel, padding=3)[0, 0]

    image = picture()[1].view(28, 28)
    seen = blurred(image) + 0.02 * torch.randn(28, 28, generator=drawn(32))

    def loss() -> Tensor:
        variation = network.pixels.diff(dim=0).abs().sum() + network.pixels.diff(dim=1).abs().sum()
        return (blurred(network.pixels) - seen).square().sum() + 0.01 * variation

    return on_all(network, loss)


def cameras(seed: int, guarded: bool) -> Problem:
    """Where 60 points and 8 cameras are, from pictures of which some are wrong: bundle adjustment with Huber's loss."""
    generator = drawn(33)
    points = torch.randn(60, 3, generator=generator)
    turns, shifts = 0.3 * torch.randn(8, 3, generator=generator), 0.3 * torch.randn(8, 3, generator=generator)

    def seen(points: Tensor, turns: Tensor, shifts: Tensor) -> Tensor:
        zero = torch.zeros(8)
        x, y, z = turns.unbind(1)
        rows = [torch.stack(row, dim=1) for row in ([zero, -z, y], [z, zero, -x], [-y, x, zero])]
        turned = points @ torch.matrix_exp(torch.stack(rows, dim=1)).mT + shifts[:, None]
        return turned[..., :2] / (turned[..., 2:] + 6).clamp(min=1)

    pictures = seen(points, turns, shifts) + 0.002 * torch.randn(8, 60, 2, generator=generator)
    wrong = torch.rand(8, 60, 1, generator=generator) < 0.05
    pictures = pictures + wrong * torch.randn(8, 60, 2, generator=generator)
    network = making.initialized(partial(Free, 0.2, points=(60, 3), turns=(8, 3), shifts=(8, 3)), seed)
    with torch.no_grad():
        network.points += points
    return on_all(
        network,
        lambda: functional.huber_loss(seen(network.points, network.turns, network.shifts), pictures, delta=0.01),
    )


def phases(seed: int, guarded: bool) -> Problem:
    """A physics-informed network for the Allen-Cahn equation; initial and boundary values are penalties."""
    network = making.initialized(partial(perceptron, 2, 32, 32, 32, 1), seed)
    inside = torch.rand(400, 2, generator=drawn(34)) * torch.tensor([2.0, 0.5]) - torch.tensor([1.0, 0.0])
    start, times = torch.linspace(-1, 1, 64), torch.linspace(0, 0.5, 32)
    begun = torch.stack([start, torch.zeros(64)], dim=1)
    left, right = (torch.stack([torch.full((32,), side), times], dim=1) for side in (-1.0, 1.0))
    wanted = (start.square() * torch.cos(math.pi * start))[:, None]

    def loss() -> Tensor:
        with torch.enable_grad():
            places = inside.clone().requires_grad_()
            u = network(places)
            slopes = torch.autograd.grad(u.sum(), places, create_graph=True)[0]
            bend = torch.autograd.grad(slopes[:, 0].sum(), places, create_graph=True)[0][:, :1]
            residual = slopes[:, 1:] - 0.01 * bend + 5 * (u**3 - u)
            beside = functional.mse_loss(network(left), network(right))
            return residual.square().mean() + 10 * functional.mse_loss(network(begun), wanted) + beside

    return on_all(network, loss)


def normalized() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Linear(32, 10),
    )  # fmt: skip


def resampled(seed: int, guarded: bool) -> Problem:
    """A physics-informed network for the Poisson equation, on new points at each step."""
    network, places = making.initialized(partial(perceptron, 2, 32, 32, 1), seed), drawn(seed)
    guard, held = torch.rand(2, 500, 2, generator=drawn(35))
    loss = partial(poisson_residual, network)
    return in_batches(network, lambda: torch.rand(200, 2, generator=places), loss, guard, held)


def diffusion(seed: int, guarded: bool) -> Problem:
    """A network that takes noise out of points of a spiral; source: Ho et al. (2020)."""
    network = making.initialized(partial(perceptron, 3, 64, 64, 2, activation=nn.SiLU), seed)
    noise, generator = drawn(seed), drawn(36)

    def points(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        along = 3 * math.pi * torch.rand(count, generator=generator).sqrt()
        spiral = torch.stack([along.cos(), along.sin()], dim=1) * along[:, None] / 6
        return spiral, torch.rand(count, 1, generator=generator), torch.randn(count, 2, generator=generator)

    def loss(batch: tuple[Tensor, ...]) -> Tensor:
        clean, time, added = batch
        kept = torch.cos(0.5 * math.pi * time)
        noisy = kept * clean + (1 - kept.square()).sqrt() * added
        return functional.mse_loss(network(torch.cat([noisy, time], dim=1)), added)

    return in_batches(network, lambda: points(128, noise), loss, points(1000, generator), points(4000, generator))


def augmented(seed: int, guarded: bool) -> Problem:
    """2,000 digits, each time shifted by up to two pixels."""
    network, shifts = making.initialized(convolutions, seed), drawn(seed)
    held = digits(2000, 4500)
    order = making.shuffled(2000, 64, seed)
    images, labels = digits(0, 2000)

    def batch() -> tuple[Tensor, Tensor]:
        index = next(order)
        down, right = torch.randint(-2, 3, (2,), generator=shifts).tolist()
        return images[index].unflatten(1, (28, 28)).roll((down, right), (1, 2)).flatten(1), labels[index]

    loss = supervised(network, functional.cross_entropy)
    guard = tuple(rows[:500] for rows in held)
    return in_batches(network, batch, loss, guard, tuple(rows[500:] for rows in held))


def contrasts(seed: int, guarded: bool) -> Problem:
    """Codes of digits in which two noisy copies of one are near; source: Chen et al. (2020)."""
    network, noise = making.initialized(partial(perceptron, 784, 64, 16, activation=nn.ReLU), seed), drawn(seed)
    images = (data.mnist().train_images[:6000].float() / 255).flatten(1)

    def pairs(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return tuple(rows * (torch.rand(rows.shape, generator=generator) < 0.5) for _ in range(2))

    def loss(batch: tuple[Tensor, ...]) -> Tensor:
        one, other = (functional.normalize(network(rows), dim=1) for rows in batch)
        return functional.cross_entropy(one @ other.T / 0.2, torch.arange(len(one)))

    order = making.shuffled(5000, 128, seed)
    return in_batches(
        network,
        lambda: pairs(images[next(order)], noise),
        loss,
        pairs(images[5000:5500], drawn(37)),
        pairs(images[5500:], drawn(38)),
    )


FRESH = (
    task("embedding", "t-SNE of 300 digits, SGD", embedding, 1000, "sgd", 30.0),
    task("control", "60 torques of a pendulum, Adam", control, 400, "adam", 0.05),
    task("splats", "48 Gaussian splats, Adam", splats, 1000, "adam", 1e-2),
    task("atoms", "Lennard-Jones, 20 atoms, Adam", atoms, 1000, "adam", 2e-2),
    task("adapters", "low-rank adapters, AdamW", adapters, 600, "adamw", 3e-3),
    task("sums", "sums modulo 23, AdamW", sums, 1500, "adamw", 1e-3),
    task("deblurring", "total variation, 784 pixels, Adam", deblurring, 800, "adam", 1e-2),
    task("cameras", "bundle adjustment, Huber's loss, Adam", cameras, 800, "adam", 1e-3),
    task("phases", "Allen-Cahn, 2:32:32:32:1, Adam", phases, 1500, "adam", 2e-3),
    task("normalized", "BatchNorm, 500 digits, Adam", partial(classify, normalized, 500), 400, "adam", 1e-3, "cosine"),
)
FRESH_NOISY = (
    task("resampled", "physics-informed, new points each step, Adam", resampled, 1500, "adam", 3e-3, full_batch=False),
    task("diffusion", "a diffusion model, batches of 128, AdamW", diffusion, 1500, "adamw", 2e-3, full_batch=False),
    task("augmented", "convolutions, shifted digits, SGD", augmented, 1500, "sgd", 0.02, "cosine", False),
    task("contrasts", "contrastive, batches of 128, Adam", contrasts, 800, "adam", 1e-3, full_batch=False),
)
