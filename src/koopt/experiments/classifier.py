"""The paper's classifier of handwritten digits, many networks at once."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8
    from torch import Tensor

WIDTHS = (784, 20, 20, 20, 10)
QUASI_NODE = 157  # a fifth of a node of the first layer: 784 weights and a bias
MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels


class Classifier(nn.Sequential):
    """The network 784:20:20:20:10 with ReLU; its output are logits.

    Source: Dogra & Redman (2020), Section 5 and S10.
    """

    def __init__(self) -> None:
        layers = [module for pair in pairwise(WIDTHS) for module in (nn.Linear(*pair), nn.ReLU())]
        super().__init__(*layers[:-1])


def normalized(images: UInt8[Tensor, "*batch 784"]) -> Float[Tensor, "*batch 784"]:
    """Pixels with mean 0 and standard deviation 1 over MNIST, float32."""
    return (images / 255 - MEAN) / STD


def initial_weights(seed: int) -> Float[Tensor, " weights"]:
    """One network's weights as PyTorch initializes them under `seed`, `(16750,)` float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier()
    return torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()])


def layers(weights: Float[Tensor, "networks weights"]) -> list[Float[Tensor, "networks ..."]]:
    """Each layer's weights `(networks, out, in)` and biases `(networks, out)`, views in the order of the parameters."""
    shapes = [shape for fan_in, fan_out in pairwise(WIDTHS) for shape in ((fan_out, fan_in), (fan_out,))]
    parts = weights.split([torch.Size(shape).numel() for shape in shapes], dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


def logits(
    parameters: list[Float[Tensor, "networks ..."]], images: Float[Tensor, "networks batch 784"]
) -> Float[Tensor, "networks batch 10"]:
    """The output of many networks, each on images of its own.

    Args:
        parameters: as :func:`layers` gives them.
        images: normalized pixels.
    """
    hidden = images
    for i in range(0, len(parameters), 2):
        hidden = hidden.relu() if i else hidden
        hidden = torch.baddbmm(parameters[i + 1].unsqueeze(1), hidden, parameters[i].mT)
    return hidden


def loss_of(
    output: Float[Tensor, "networks batch 10"], labels: Int[Tensor, "networks batch"]
) -> Float[Tensor, " networks"]:
    """Mean cross-entropy of each network."""
    return nn.functional.cross_entropy(output.mT, labels, reduction="none").mean(dim=1)


@torch.no_grad()
def loss_and_accuracy(
    weights: Float[Tensor, "networks weights"],
    images: Float[Tensor, "points 784"],
    labels: Int[Tensor, " points"],
    chunk: int = 16,
) -> tuple[Float[Tensor, " networks"], Float[Tensor, " networks"]]:
    """Mean cross-entropy and share of right answers of many networks on the same images.

    Args:
        weights: `(networks, 16750)`.
        images: normalized pixels.
        labels: the digits.
        chunk: networks at a time, to bound memory.
    """
    losses, shares = [], []
    for some in weights.split(chunk):
        first, bias, *rest = layers(some)
        hidden = torch.addmm(bias.reshape(-1), images, first.reshape(-1, images.shape[1]).T)  # one large product
        hidden = hidden.unflatten(1, (len(some), -1)).transpose(0, 1).relu()
        for i in range(0, len(rest), 2):
            hidden = hidden.relu() if i else hidden
            hidden = torch.baddbmm(rest[i + 1].unsqueeze(1), hidden, rest[i].mT)
        losses.append(loss_of(hidden, labels.expand(len(some), -1)))
        shares.append((hidden.argmax(dim=2) == labels).double().mean(dim=1))
    return torch.cat(losses), torch.cat(shares)
