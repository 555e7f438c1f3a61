"""Shakespeare's plays, character by character, by a small transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from koopt.bench.task import Problem, Task
from koopt.bench.tasks import making
from koopt.experiments import data

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

CONTEXT, BATCH = 64, 16
WIDTH, HEADS, BLOCKS = 64, 4, 2
SHARES = (0.9, 0.05)  # of the text: trained on, with the guard's windows at its end; validation; the rest is the test
GUARD, VALIDATION, TEST = 32, 128, 512  # windows
CHUNK = 32  # windows evaluated at a time


class Block(nn.Module):
    """Causal attention and a perceptron, each after LayerNorm and added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mixed = nn.Linear(WIDTH, 3 * WIDTH)
        self.joined = nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, hidden: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        heads = self.mixed(self.norm1(hidden)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        hidden = hidden + self.joined(seen.transpose(1, 2).flatten(2))
        return hidden + self.perceptron(self.norm2(hidden))


class Transformer(nn.Module):
    """A decoder of two blocks of width 64; its output are logits.

    Source: Radford et al. (2019) for the architecture and the initial weights.
    """

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.character = nn.Embedding(characters, WIDTH)
        self.position = nn.Parameter(torch.empty(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.last = nn.Linear(WIDTH, characters)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, text: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time characters"]:
        hidden = self.blocks(self.character(text) + self.position[: text.shape[1]])
        return self.last(self.norm(hidden))


def encoded(text: str) -> tuple[Int[Tensor, " length"], int]:
    """Each character's number in the order of their codes, and how many there are.

    >>> from koopt.bench.tasks.shakespeare import encoded
    >>> encoded("banana")
    (tensor([1, 0, 2, 0, 2, 0]), 3)
    """
    found, numbers = np.unique(np.frombuffer(text.encode("latin-1"), np.uint8), return_inverse=True)
    return torch.from_numpy(numbers.astype(np.int64)), len(found)


def splits(length: int) -> tuple[range, range, range, range]:
    """Where in a text of `length` characters training, guard, validation and test lie, one after the other."""
    end, held = int(SHARES[0] * length), int((SHARES[0] + SHARES[1]) * length)
    start = end - GUARD * (CONTEXT + 1)
    return range(start), range(start, end), range(end, held), range(held, length)


def windows(
    text: Int[Tensor, " length"], where: range, count: int
) -> tuple[Int[Tensor, "count time"], Int[Tensor, "count time"]]:
    """Up to `count` windows, evenly spaced and without overlap, each with the same one character ahead."""
    parts = text[where.start : where.stop].unfold(0, CONTEXT + 1, CONTEXT + 1)
    parts = parts[torch.linspace(0, len(parts) - 1, min(count, len(parts))).long()]
    return parts[:, :-1], parts[:, 1:]


def problem(seed: int, guarded: bool) -> Problem:
    """The plays for the transformer of `seed`, in batches of 16 windows that `seed` draws with replacement."""
    text, characters = encoded(data.shakespeare())
    train, guard, validation, test = splits(len(text))
    network = making.initialized(lambda: Transformer(characters), seed)
    generator = torch.Generator().manual_seed(seed)
    places = (train if guarded else range(guard.stop)).stop - CONTEXT
    ahead = torch.arange(CONTEXT + 1)
    guard_windows, held_windows = windows(text, guard, GUARD), windows(text, validation, VALIDATION)

    def batch() -> tuple[Tensor, Tensor]:
        parts = text[torch.randint(places, (BATCH, 1), generator=generator) + ahead]
        return parts[:, :-1], parts[:, 1:]

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        seen, following = batch
        return making.cross_entropy(network(seen), following)

    return Problem(
        model=network,
        batch=batch,
        loss=loss,
        guard=lambda: making.batch_loss(network, *guard_windows),
        validate=lambda: making.mean_loss(network, *held_windows, CHUNK),
        test=lambda: making.mean_loss(network, *windows(text, test, TEST), CHUNK),
        refresh=lambda: None,
    )


TASK = Task(
    name="shakespeare",
    about="Tiny Shakespeare, transformer of 2 blocks, context 64, batches of 16",
    steps=1_500,
    looks=30,
    full_batch=False,
    optimizers=("adamw",),
    rates=(1e-3, 2e-3, 4e-3, 8e-3),
    schedules=("cosine", "constant"),
    problem=problem,
)
