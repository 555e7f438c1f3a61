"""Training loops as people write them, on which no setting of jumps was chosen: tasks of `unseen.py`."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from koopt.bench.task import Problem, Task
from koopt.bench.tasks import making
from koopt.experiments import classifier, data

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

RATES = (1 / 3, 1.0, 3.0, 10.0)  # times the rate of the loop as it stands


def drawn(seed: int) -> torch.Generator:
    """What a task's data are made with: the same whatever the seed of a run."""
    return torch.Generator().manual_seed(seed)


def perceptron(*sizes: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers of these sizes with activations between them."""
    layers = [(nn.Linear(a, b), activation()) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*[module for pair in layers for module in pair][:-1])


@dataclass(frozen=True)
class Split(Problem):
    """A problem whose test reads one half of what was held out.

    Attributes:
        beside: the loss on the other half, for a guard; NaN where nothing was held out.
    """

    beside: Callable[[], Tensor]


def on_all(
    network: nn.Module,
    loss: Callable[[], Tensor],
    held: Callable[..., Tensor] | None = None,
    others: tuple[Tensor, ...] = (),
) -> Split:
    """Full batches.

    Args:
        network: what is trained.
        loss: on all that it is trained on.
        held: the loss on rows that it is not trained on; None: there are none.
        others: these.
    """
    count = len(others[0]) if others else 0
    halves = torch.randperm(count, generator=drawn(30)).split([count // 2, count - count // 2])

    @torch.no_grad()
    def on_half(half: Tensor) -> Tensor:
        return torch.tensor(math.nan) if held is None else held(*(rows[half] for rows in others))

    made = making.full_batch(network, None, lambda _: loss(), lambda: on_half(halves[1]).item())
    return Split(**vars(made), beside=lambda: on_half(halves[0]))


def fit(
    make: Callable[[], nn.Module],
    points: Callable[[], tuple[Tensor, Tensor]],
    others: Callable[[], tuple[Tensor, Tensor]] | None,
    seed: int,
    guarded: bool,
) -> Problem:
    """Least squares on all points; `others` are held out."""
    network = making.initialized(make, seed)

    def misses(inputs: Tensor, wanted: Tensor) -> Tensor:
        return functional.mse_loss(network(inputs), wanted)

    known = partial(misses, *points())
    return on_all(network, known) if others is None else on_all(network, known, misses, others())


def two_sines(count: int = 256) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1, 1, count)[:, None]
    return x, torch.sin(6 * x) + 0.3 * torch.sin(17 * x)


def signed_root(count: int = 200) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1, 1, count)[:, None]
    return x, x.sign() * x.abs().sqrt()


def badly_scaled() -> tuple[Tensor, Tensor]:
    generator = drawn(4)
    x = torch.randn(100, 20, generator=generator) * torch.logspace(0, -1.5, 20)
    return x, x @ torch.randn(20, 10, generator=generator)


def four_layers() -> nn.Module:
    return nn.Sequential(*[nn.Linear(20, width, bias=False) for width in (20, 20, 20, 10)])


def waves(draw: int = 2) -> tuple[Tensor, Tensor]:
    """Sixteen sines, each to be forecast one step ahead."""
    generator = drawn(draw)
    phase, frequency = torch.rand(2, 16, 1, generator=generator)
    series = torch.sin(math.tau * phase + (0.5 + frequency) * 0.3 * torch.arange(33))[..., None]
    return series[:, :-1], series[:, 1:]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(1, 24, batch_first=True)
        self.out = nn.Linear(24, 1)

    def forward(self, series: Tensor) -> Tensor:
        return self.out(self.gru(series)[0])


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * x)


def siren() -> nn.Module:
    """Source: Sitzmann et al. (2020), with their initialization."""
    network = nn.Sequential(nn.Linear(2, 48), Sine(), nn.Linear(48, 48), Sine(), nn.Linear(48, 1))
    with torch.no_grad():
        network[0].weight.uniform_(-1 / 2, 1 / 2)
        for layer in (network[2], network[4]):
            layer.weight.uniform_(-math.sqrt(6 / 48) / 30, math.sqrt(6 / 48) / 30)
    return network


def picture() -> tuple[Tensor, Tensor]:
    """A digit, as values at places."""
    axis = torch.linspace(-1, 1, 28)
    return torch.cartesian_prod(axis, axis), data.mnist().train_images[0].float()[:, None] / 255


def poisson_residual(network: nn.Module, points: Tensor) -> Tensor:
    """Of the Poisson equation on the unit square, squared; derivatives by autograd, boundary values built in."""
    source = -2 * math.pi**2 * torch.sin(math.pi * points).prod(dim=1)
    with torch.enable_grad():
        places = points.clone().requires_grad_()
        x, y = places.unbind(1)
        u = x * (1 - x) * y * (1 - y) * network(places).squeeze(1)
        (slope,) = torch.autograd.grad(u.sum(), places, create_graph=True)
        bends = [torch.autograd.grad(slope[:, i].sum(), places, create_graph=True)[0][:, i] for i in (0, 1)]
        return (bends[0] + bends[1] - source).square().mean()


def poisson(seed: int, guarded: bool) -> Problem:
    """A physics-informed network for the Poisson equation."""
    network = making.initialized(partial(perceptron, 2, 32, 32, 1), seed)
    points = torch.rand(100, 2, generator=drawn(0))

    def error(places: Tensor) -> Tensor:
        """Of the solution, squared."""
        u = (places * (1 - places)).prod(dim=1) * network(places).squeeze(1)
        return (u - torch.sin(math.pi * places).prod(dim=1)).square().mean()

    others = torch.rand(2000, 2, generator=drawn(20))
    return on_all(network, partial(poisson_residual, network, points), error, (others,))


def digits(first: int, last: int) -> tuple[Tensor, Tensor]:
    mnist = data.mnist()
    return classifier.normalized(mnist.train_images[first:last]), mnist.train_labels[first:last]


def classify(make: Callable[[], nn.Module], count: int, seed: int, guarded: bool) -> Problem:
    """Some digits, all of them at each step; 4,000 others are held out."""
    network = making.initialized(make, seed)

    def misses(images: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(network(images), labels)

    return on_all(network, partial(misses, *digits(0, count)), misses, digits(count, count + 4000))


def autoencoder(activation: type[nn.Module], seed: int, guarded: bool) -> Problem:
    network = making.initialized(partial(perceptron, 784, 64, 16, 64, 784, activation=activation), seed)
    images, others = (data.mnist().train_images[:2200].float() / 255).split([200, 2000])

    def misses(images: Tensor) -> Tensor:
        return functional.mse_loss(torch.sigmoid(network(images)), images)

    return on_all(network, partial(misses, images), misses, (others,))


class Factors(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.left, self.right = (nn.Parameter(0.1 * torch.randn(size, 8)) for _ in range(2))


def completion(seed: int, guarded: bool) -> Problem:
    """A matrix of rank 5 from two fifths of its entries."""
    network, generator = making.initialized(partial(Factors, 100), seed), drawn(1)
    truth = torch.randn(100, 5, generator=generator) @ torch.randn(5, 100, generator=generator)
    known = torch.rand(100, 100, generator=generator) < 0.4

    def misses(i: Tensor, j: Tensor) -> Tensor:
        return (network.left @ network.right.T - truth)[i, j].square().mean()

    return on_all(network, partial(misses, *known.nonzero().unbind(1)), misses, (~known).nonzero().unbind(1))


class Graph(nn.Module):
    """Two layers of graph convolutions with dropout; source: Kipf & Welling (2017)."""

    def __init__(self, adjacency: Tensor, dropout: float) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(50, 16), nn.Linear(16, 4)
        self.adjacency, self.dropout = adjacency, dropout

    def forward(self, features: Tensor) -> Tensor:
        hidden = torch.relu(self.adjacency @ self.first(self.drop(features)))
        return self.adjacency @ self.last(self.drop(hidden))

    def drop(self, values: Tensor) -> Tensor:
        return functional.dropout(values, self.dropout, self.training)


def graph(dropout: float, seed: int, guarded: bool) -> Problem:
    """Nodes in four communities, of which a fifth are labelled; with dropout steps are noisy."""
    generator, labels = drawn(3), torch.arange(400) % 4
    likely = torch.where(labels[:, None] == labels, 0.03, 0.01)
    edges = torch.rand(400, 400, generator=generator) < likely
    adjacency = (edges | edges.T | torch.eye(400, dtype=torch.bool)).float()
    degrees = adjacency.sum(dim=1)
    adjacency /= (degrees[:, None] * degrees).sqrt()
    centres = torch.randn(4, 50, generator=generator)
    features = 0.3 * centres[labels] + torch.randn(400, 50, generator=generator)
    known, guard, held = torch.randperm(400, generator=generator)[:240].split(80)
    network = making.initialized(partial(Graph, adjacency, dropout), seed)

    def evaluated(nodes: Tensor) -> Tensor:
        with making.mode(network, training=False), torch.no_grad():
            return functional.cross_entropy(network(features)[nodes], labels[nodes])

    problem = on_all(
        network,
        lambda: functional.cross_entropy(network(features)[known], labels[known]),
        evaluated,
        (torch.cat([guard, held]),),
    )
    if not dropout:
        return problem
    return replace(problem, guard=lambda: evaluated(guard), validate=lambda: evaluated(held).item())


class Flow(nn.Module):
    """Six affine couplings; source: Dinh et al. (2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(perceptron(1, 32, 32, 2) for _ in range(6))

    def forward(self, points: Tensor) -> Tensor:
        """The negative logarithm of the density, up to a constant."""
        first, last = points.split(1, dim=1)
        total = torch.zeros(len(points))
        for coupling in self.couplings:
            scale, shift = coupling(first).chunk(2, dim=1)
            scale = torch.tanh(scale)
            first, last = last * scale.exp() + shift, first
            total = total + scale.squeeze(1)
        return 0.5 * (first.square() + last.square()).squeeze(1) - total


def moons(seed: int, guarded: bool) -> Problem:
    """The density of two moons; 5 is added to the loss, so that shares of it make sense."""
    network, generator = making.initialized(Flow, seed), drawn(5)

    def points(count: int) -> Tensor:
        angle, up = math.pi * torch.rand(count, generator=generator), torch.arange(count) % 2
        moon = torch.stack([torch.cos(angle) + up - 0.5, torch.sin(angle) * (1 - 2 * up) + 0.5 * up], dim=1)
        return moon + 0.08 * torch.randn(count, 2, generator=generator)

    moon, others = points(256), points(2000)
    return on_all(network, lambda: 5 + network(moon).mean(), lambda points: 5 + network(points).mean(), (others,))


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(50, dtype=torch.float64))


def quadratic(seed: int, guarded: bool) -> Problem:
    """Fifty dimensions, condition number 1,000."""
    network, generator = making.initialized(Point, seed), drawn(6)
    axes, _ = torch.linalg.qr(torch.randn(50, 50, generator=generator, dtype=torch.float64))
    bends = (axes * torch.logspace(0, -3, 50, dtype=torch.float64)) @ axes.T
    return on_all(network, lambda: 0.5 * network.place @ bends @ network.place)


def heat(seed: int, guarded: bool) -> Problem:
    """A physics-informed network for the heat equation with a source, initial and boundary values built in."""
    network = making.initialized(partial(perceptron, 2, 24, 24, 1), seed)
    places, others = torch.rand(150, 2, generator=drawn(11)), torch.rand(2000, 2, generator=drawn(25))

    def residual(places: Tensor) -> Tensor:
        with torch.enable_grad():
            points = places.clone().requires_grad_()
            x, t = points.unbind(1)
            u = torch.sin(math.pi * x) + t * x * (1 - x) * network(points).squeeze(1)
            slopes = torch.autograd.grad(u.sum(), points, create_graph=True)[0]
            bend = torch.autograd.grad(slopes[:, 0].sum(), points, create_graph=True)[0][:, 0]
            return (slopes[:, 1] - 0.1 * bend - torch.sin(5 * x * t)).square().mean()

    return on_all(network, partial(residual, places), residual, (others,))


class Running(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(1, 16, batch_first=True), nn.Linear(16, 1)

    def forward(self, series: Tensor) -> Tensor:
        return self.out(self.lstm(series)[0])


def largest_so_far(draw: int = 12) -> tuple[Tensor, Tensor]:
    series = torch.randn(40, 16, 1, generator=drawn(draw))
    return series, series.cummax(dim=1).values


def hills(draw: int = 13) -> tuple[Tensor, Tensor]:
    x = 2 * torch.rand(300, 2, generator=drawn(draw)) - 1
    return x, (torch.sin(3 * x[:, :1]) * torch.cos(3 * x[:, 1:]))


class Reversing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(6, 16), nn.Parameter(0.1 * torch.randn(8, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.out = nn.Linear(16, 6)

    def forward(self, text: Tensor) -> Tensor:
        return self.out(self.layer(self.symbols(text) + self.places))


def reversing(seed: int, guarded: bool) -> Problem:
    """Words of eight letters, to be spelled backwards."""
    network, text = making.initialized(Reversing, seed), torch.randint(0, 6, (96, 8), generator=drawn(14))
    return on_all(network, lambda: making.cross_entropy(network(text), text.flip(1)))


class Mixture(nn.Module):
    """Six normal distributions in the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.means = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.randn(6, 2))
        self.roots = nn.Parameter(torch.eye(2).repeat(6, 1, 1))

    def forward(self, points: Tensor) -> Tensor:
        """The negative logarithm of the density, up to a constant."""
        whitened = torch.einsum("kij,nkj->nki", self.roots, points[:, None] - self.means)
        volume = torch.linalg.det(self.roots).abs().log()
        logs = torch.log_softmax(self.weights, dim=0) + volume - 0.5 * whitened.square().sum(dim=2)
        return -torch.logsumexp(logs, dim=1)


def mixture(seed: int, guarded: bool) -> Problem:
    """Points about six centres; 5 is added to the loss, so that shares of it make sense."""
    network, generator = making.initialized(Mixture, seed), drawn(15)
    spread = 0.3 * torch.randn(600, 2, generator=generator)
    centres = (2 * torch.randn(6, 2, generator=generator)).repeat(100, 1)
    points, others = centres + spread, centres + 0.3 * torch.randn(600, 2, generator=generator)
    return on_all(network, lambda: 5 + network(points).mean(), lambda points: 5 + network(points).mean(), (others,))


def convolutions() -> nn.Module:
    layers = (nn.Conv2d(1, 6, 5, 2), nn.SiLU(), nn.Conv2d(6, 12, 5, 2), nn.SiLU(), nn.Flatten(), nn.Linear(192, 10))
    return nn.Sequential(nn.Unflatten(1, (1, 28, 28)), *layers)


class Process(nn.Module):
    """A Gaussian process: a length for each of four inputs, a size and a noise, as logarithms."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths, self.others = (nn.Parameter(0.5 * torch.randn(size, dtype=torch.float64)) for size in (4, 2))

    def forward(self, places: Tensor, values: Tensor) -> Tensor:
        """The negative logarithm of the evidence; source: Rasmussen & Williams (2006), eq. 2.30."""
        size, noise = self.others.exp()
        apart = (places[:, None] - places) / self.lengths.exp()
        covariance = size * torch.exp(-0.5 * apart.square().sum(dim=2)) + noise * torch.eye(len(values))
        return -torch.distributions.MultivariateNormal(torch.zeros_like(values), covariance).log_prob(values)


def process(seed: int, guarded: bool) -> Problem:
    """What kernel a function of four variables has; per value, and 5 is added, so that shares of it make sense."""
    network, generator = making.initialized(Process, seed), drawn(16)
    places = 2 * torch.rand(120, 4, generator=generator, dtype=torch.float64) - 1
    values = torch.sin(4 * places[:, 0]) + places[:, 1].square()
    values += 0.1 * torch.randn(120, generator=generator, dtype=torch.float64)
    return on_all(network, lambda: 5 + network(places, values) / len(values))


def trajectories(seed: int, guarded: bool) -> Problem:
    """The law of a damped pendulum from where it was, through 20 Runge-Kutta steps of a network."""
    network = making.initialized(partial(perceptron, 2, 32, 2), seed)
    starts, others = torch.randn(12, 2, generator=drawn(17)), torch.randn(200, 2, generator=drawn(24))

    def pendulum(state: Tensor) -> Tensor:
        angle, speed = state.unbind(1)
        return torch.stack([speed, -2 * torch.sin(angle) - 0.2 * speed], dim=1)

    def followed(law: Callable[[Tensor], Tensor], starts: Tensor) -> Tensor:
        states = [starts]
        for _ in range(20):
            first = law(states[-1])
            second = law(states[-1] + 0.05 * first)
            third = law(states[-1] + 0.05 * second)
            fourth = law(states[-1] + 0.1 * third)
            states.append(states[-1] + 0.1 / 6 * (first + 2 * second + 2 * third + fourth))
        return torch.stack(states)

    wanted = followed(pendulum, starts)

    def misses(starts: Tensor) -> Tensor:
        return functional.mse_loss(followed(network, starts), followed(pendulum, starts))

    return on_all(network, lambda: functional.mse_loss(followed(network, starts), wanted), misses, (others,))


class Map(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(150, 2))


def scaling_down(seed: int, guarded: bool) -> Problem:
    """150 points of ten dimensions in the plane, with their distances as far as can be: multidimensional scaling."""
    network, apart = making.initialized(Map, seed), torch.pdist(torch.randn(150, 10, generator=drawn(18)))
    return on_all(network, lambda: (torch.pdist(network.places) - apart).square().mean() / apart.square().mean())


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = perceptron(784, 64, 16, activation=nn.ReLU)
        self.decoder = perceptron(8, 64, 784, activation=nn.ReLU)

    def forward(self, images: Tensor) -> Tensor:
        """Minus the evidence lower bound, by one draw an image; source: Kingma & Welling (2014)."""
        mean, spread = self.encoder(images).chunk(2, dim=1)
        logits = self.decoder(mean + spread.exp() * torch.randn_like(mean))
        misses = functional.binary_cross_entropy_with_logits(logits, images, reduction="none").sum(dim=1)
        return (misses + 0.5 * (mean.square() + (2 * spread).exp() - 2 * spread - 1).sum(dim=1)).mean()


def vae(seed: int, guarded: bool) -> Problem:
    """All images at each step, and new noise."""
    network, images = making.initialized(Vae, seed), data.mnist().train_images[:600].float() / 255
    train, guard, held = images.split(200)

    def same_draw(images: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            return network(images)

    problem = on_all(network, lambda: network(train))
    return replace(problem, guard=lambda: same_draw(guard), validate=lambda: same_draw(held).item())


def in_batches(
    network: nn.Module,
    batch: Callable[[], Any],
    loss: Callable[[Any], Tensor],
    guard: Any,
    held: Any,
) -> Problem:
    """Mini-batches, with one batch held out for the guard and one for validation."""

    @torch.no_grad()
    def measured(chosen: Any) -> Tensor:
        return loss(chosen)

    return Problem(
        model=network,
        batch=batch,
        loss=loss,
        guard=lambda: measured(guard),
        validate=lambda: measured(held).item(),
        test=lambda: math.nan,
        refresh=lambda: None,
    )


def rows_in_batches(
    network: nn.Module, rows: tuple[Tensor, ...], train: int, size: int, loss: Callable[[Any], Tensor], seed: int
) -> Problem:
    """The first `train` rows are trained on, the next 500 guard, the rest validate."""
    guard = tuple(row[train : train + 500] for row in rows)
    return in_batches(network, batches(rows, train, size, seed), loss, guard, tuple(row[train + 500 :] for row in rows))


def batches(rows: tuple[Tensor, ...], train: int, size: int, seed: int) -> Callable[[], tuple[Tensor, ...]]:
    """Gives the next batch of the first `train` rows."""
    order = making.shuffled(train, size, seed)

    def batch() -> tuple[Tensor, ...]:
        index = next(order)
        return tuple(row[index] for row in rows)

    return batch


def supervised(network: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], Tensor]:
    """The loss of a batch of inputs and what is wanted."""
    return lambda batch: criterion(network(batch[0]), batch[1])


def digits_in_batches(seed: int, guarded: bool) -> Problem:
    network = making.initialized(partial(perceptron, 784, 64, 10, activation=nn.ReLU), seed)
    return rows_in_batches(network, digits(0, 20_000), 15_000, 128, supervised(network, functional.cross_entropy), seed)


def denoising(seed: int, guarded: bool) -> Problem:
    """Digits are to be restored from digits in noise."""
    network = making.initialized(partial(perceptron, 784, 128, 32, 128, 784, activation=nn.ReLU), seed)
    images = data.mnist().train_images[:12_000].float() / 255
    noisy = images + 0.5 * torch.randn(images.shape, generator=drawn(7))
    loss = supervised(network, lambda found, wanted: functional.mse_loss(torch.sigmoid(found), wanted))
    return rows_in_batches(network, (noisy, images), 9_500, 64, loss, seed)


def noisy_labels(seed: int, guarded: bool) -> Problem:
    """A function of four variables from noisy values; validation has them without noise."""
    network, generator = making.initialized(partial(perceptron, 4, 64, 64, 1), seed), drawn(8)
    x = torch.rand(3000, 4, generator=generator)
    y = torch.sin(3 * x.sum(dim=1, keepdim=True))
    y[:2000] += 0.3 * torch.randn(2000, 1, generator=generator)
    return rows_in_batches(network, (x, y), 1500, 64, supervised(network, functional.mse_loss), seed)


def completion_in_batches(seed: int, guarded: bool) -> Problem:
    """A noisy matrix of rank 5 from a third of its entries, 256 at a time."""
    network, generator = making.initialized(partial(Factors, 200), seed), drawn(1)
    truth = torch.randn(200, 5, generator=generator) @ torch.randn(5, 200, generator=generator)
    truth += 0.1 * torch.randn(200, 200, generator=generator)
    entries = torch.randperm(40_000, generator=generator)[:20_000]
    rows = (entries // 200, entries % 200, truth.flatten()[entries])

    def loss(batch: tuple[Tensor, ...]) -> Tensor:
        i, j, wanted = batch
        return ((network.left[i] * network.right[j]).sum(dim=1) - wanted).square().mean()

    return rows_in_batches(network, rows, 12_000, 256, loss, seed)


class Characters(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.embedding, self.gru = nn.Embedding(count, 24), nn.GRU(24, 64, batch_first=True)
        self.out = nn.Linear(64, count)

    def forward(self, text: Tensor) -> Tensor:
        return self.out(self.gru(self.embedding(text))[0])


def characters(seed: int, guarded: bool) -> Problem:
    """The next character of Shakespeare by a recurrent network."""
    text = data.shakespeare()[:300_000]
    letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
    codes = torch.tensor([letters[letter] for letter in text])
    network, places = making.initialized(partial(Characters, len(letters)), seed), drawn(seed)

    def cut(first: int, last: int, count: int, generator: torch.Generator) -> Tensor:
        starts = torch.randint(first, last - 41, (count, 1), generator=generator)
        return codes[starts + torch.arange(41)]

    return in_batches(
        network,
        lambda: cut(0, 260_000, 16, places),
        lambda batch: making.cross_entropy(network(batch[:, :-1]), batch[:, 1:]),
        cut(260_000, 270_000, 32, drawn(9)),
        cut(270_000, 300_000, 200, drawn(10)),
    )


def half_batches(seed: int, guarded: bool) -> Problem:
    """Half of all points at each step: little noise."""
    network, points = making.initialized(partial(perceptron, 1, 64, 64, 1), seed), two_sines()
    batch = batches(points, len(points[0]), len(points[0]) // 2, seed)
    return in_batches(network, batch, supervised(network, functional.mse_loss), points, points)


def task(
    name: str,
    about: str,
    problem: Callable[[int, bool], Problem],
    steps: int,
    optimizer: str,
    rate: float,
    schedule: str = "constant",
    full_batch: bool = True,
) -> Task:
    rates = tuple(float(f"{factor * rate:.1g}") for factor in RATES)
    return Task(name, about, steps, 20, full_batch, (optimizer,), rates, (schedule,), problem)


small, wide = partial(perceptron, 1, 64, 64, 1), partial(perceptron, 1, 50, 50, 1)
deep = partial(perceptron, 1, *[32] * 10, 1)
FULL = (
    task(
        "sines", "1:64:64:1, tanh, Adam", partial(fit, small, two_sines, partial(two_sines, 2001)), 3000, "adam", 1e-3
    ),
    task(
        "root",
        "1:50:50:1, tanh, RMSprop",
        partial(fit, wide, signed_root, partial(signed_root, 2001)),
        3000,
        "rmsprop",
        1e-3,
        "cosine",
    ),
    task("deep-linear", "four linear layers, SGD", partial(fit, four_layers, badly_scaled, None), 4000, "sgd", 2e-3),
    task("waves", "a GRU of 24 units, Adam", partial(fit, Recurrent, waves, partial(waves, 21)), 1000, "adam", 3e-3),
    task("picture", "SIREN, Adam", partial(fit, siren, picture, None), 1500, "adam", 1e-4),
    task("poisson", "physics-informed, 2:32:32:1, Adam", poisson, 1500, "adam", 3e-3, "cosine"),
    task(
        "logistic", "784:10, 1,000 digits, SGD", partial(classify, partial(nn.Linear, 784, 10), 1000), 1500, "sgd", 0.03
    ),
    task(
        "digits",
        "784:32:10, 1,000 digits, AdamW",
        partial(classify, partial(perceptron, 784, 32, 10, activation=nn.ReLU), 1000),
        1000,
        "adamw",
        1e-3,
    ),
    task("autoencoder", "784:64:16:64:784, 200 digits, Adam", partial(autoencoder, nn.ReLU), 1000, "adam", 1e-3),
    task("completion", "a matrix of rank 5, Adam", completion, 3000, "adam", 1e-2),
    task("graph", "graph convolutions, Adam", partial(graph, 0.0), 1500, "adam", 1e-2),
    task("moons", "a normalizing flow, Adam", moons, 1000, "adam", 2e-3),
    task("quadratic", "50 dimensions, SGD with momentum", quadratic, 3000, "sgd", 0.1),
)
LATER = (  # added once steps along secants followed one another, and not looked at before
    task("heat", "physics-informed, 2:24:24:1, Adam", heat, 1200, "adam", 2e-3),
    task(
        "running",
        "an LSTM of 16 units, Adam",
        partial(fit, Running, largest_so_far, partial(largest_so_far, 22)),
        800,
        "adam",
        3e-3,
    ),
    task(
        "hills",
        "2:64:64:1, ReLU, AdamW",
        partial(fit, partial(perceptron, 2, 64, 64, 1, activation=nn.ReLU), hills, partial(hills, 23)),
        1500,
        "adamw",
        1e-3,
    ),
    task("reversing", "a transformer block, AdamW", reversing, 800, "adamw", 2e-3, "cosine"),
    task("mixture", "six normal distributions, Adam", mixture, 1000, "adam", 1e-2),
    task("convolutions", "two convolutions, 300 digits, SGD", partial(classify, convolutions, 300), 500, "sgd", 0.01),
)
LATEST = (  # added once moves were bounded and saddles left, and but for the first not looked at before
    task("saddle", "784:64:16:64:784, tanh, 200 digits, Adam", partial(autoencoder, nn.Tanh), 1000, "adam", 1e-3),
    task(
        "deep",
        "ten layers of 32, tanh, Adam",
        partial(fit, deep, two_sines, partial(two_sines, 2001)),
        1500,
        "adam",
        1e-3,
    ),
    task("process", "a Gaussian process of six parameters, Adam", process, 400, "adam", 0.03),
    task("trajectories", "2:32:2 in Runge-Kutta steps, Adam", trajectories, 600, "adam", 3e-3),
    task("scaling", "multidimensional scaling, Adam", scaling_down, 800, "adam", 0.03),
)
NOISY = (
    task(
        "graph-dropout",
        "graph convolutions with dropout, Adam",
        partial(graph, 0.5),
        1500,
        "adam",
        1e-2,
        full_batch=False,
    ),
    task("vae", "a variational autoencoder, Adam", vae, 1000, "adam", 1e-3, full_batch=False),
    task("digits-batches", "784:64:10, batches of 128, SGD", digits_in_batches, 1500, "sgd", 0.03, "cosine", False),
    task("characters", "a GRU of 64 units, batches of 16, AdamW", characters, 800, "adamw", 4e-3, full_batch=False),
    task(
        "completion-batches",
        "a matrix, 256 entries at a time, Adam",
        completion_in_batches,
        3000,
        "adam",
        1e-2,
        full_batch=False,
    ),
    task("denoising", "an autoencoder, batches of 64, AdamW", denoising, 1500, "adamw", 2e-3, "cosine", False),
    task("noisy-labels", "4:64:64:1, batches of 64, Adam", noisy_labels, 3000, "adam", 2e-3, full_batch=False),
    task("half-batches", "1:64:64:1, half of all points, Adam", half_batches, 3000, "adam", 2e-3, full_batch=False),
)
