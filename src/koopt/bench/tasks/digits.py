"""MNIST by a perceptron and by a convolutional network with BatchNorm."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from koopt.bench.task import Problem, Task
from koopt.bench.tasks import making
from koopt.experiments import classifier, data

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int
    from torch import Tensor

    Images = Float[Tensor, "images 784"]
    Labels = Int[Tensor, " images"]

BATCH = 64
GUARD, VALIDATION = 500, 5_000
REFRESH = (8, 250)  # batches and their size, for BatchNorm's statistics


def perceptron() -> nn.Module:
    """784:128:128:10 with ReLU, 118,282 weights."""
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def convolutional() -> nn.Module:
    """Two strided convolutions with BatchNorm and ReLU, and a linear layer; 9,250 weights."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 8, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 10),
    )


def splits(count: int) -> tuple[Int[Tensor, " train"], Int[Tensor, " guard"], Int[Tensor, " validation"]]:
    """Which of `count` training images are trained on, guard and validate: the same whatever the seed.

    With made-up digits, of which there are few, guard and validation take the same shares.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    guard, validation = GUARD * count // 60_000, VALIDATION * count // 60_000
    train, guard, validation = order.split([count - guard - validation, guard, validation])
    return train, guard, validation


def problem(make: Callable[[], nn.Module], seed: int, guarded: bool) -> Problem:
    """MNIST for the network that `make` gives under `seed`, in batches of 64 that `seed` shuffles anew each epoch.

    The guard is the loss in train mode, since a jump leaves BatchNorm's running statistics behind; they do not change.
    """
    mnist = data.mnist()
    train, guard, validation = splits(len(mnist.train_labels))
    if not guarded:
        train = torch.cat([train, guard])
    network = making.initialized(make, seed)
    batches = making.shuffled(len(train), BATCH, seed)
    train_images, train_labels = mnist.train_images[train], mnist.train_labels[train]
    guard_images, guard_labels = classifier.normalized(mnist.train_images[guard]), mnist.train_labels[guard]
    held_images, held_labels = classifier.normalized(mnist.train_images[validation]), mnist.train_labels[validation]
    count, size = REFRESH
    seen = classifier.normalized(train_images[: count * size]).split(size)

    def batch() -> tuple[Images, Labels]:
        index = next(batches)
        return classifier.normalized(train_images[index]), train_labels[index]

    def loss(batch: tuple[Images, Labels]) -> Tensor:
        images, labels = batch
        return making.cross_entropy(network(images), labels)

    def test() -> float:
        return making.mean_loss(network, classifier.normalized(mnist.test_images), mnist.test_labels)

    return Problem(
        model=network,
        batch=batch,
        loss=loss,
        guard=lambda: making.batch_loss(network, guard_images, guard_labels),
        validate=lambda: making.mean_loss(network, held_images, held_labels),
        test=test,
        refresh=lambda: update_bn(seen, network),
    )


MLP = Task(
    name="mnist-mlp",
    about="MNIST, perceptron 784:128:128:10, batches of 64",
    steps=3_000,
    looks=40,
    full_batch=False,
    optimizers=("adamw",),
    rates=(5e-4, 1e-3, 2e-3, 4e-3),
    schedules=("cosine", "constant"),
    problem=partial(problem, perceptron),
)
CNN = Task(
    name="mnist-cnn",
    about="MNIST, two convolutions with BatchNorm, batches of 64",
    steps=3_000,
    looks=30,
    full_batch=False,
    optimizers=("adamw",),
    rates=(2e-3, 4e-3, 8e-3, 1.6e-2),
    schedules=("cosine", "constant"),
    problem=partial(problem, convolutional),
)
