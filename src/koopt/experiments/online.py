"""Perceptrons that learn from one fresh example a step, many simulations as one tensor program."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor

TEACHERS = ("even", "uneven")


@dataclass(frozen=True)
class Run:
    """One batch of simulations; times are in strides, so that `stride` stretches all of them.

    Attributes:
        teacher: "even" for Gaussian weights, "uneven" for their cubes: few weights carry the teacher.
        n_1: inputs.
        outputs: output units, each with a teacher of its own.
        seeds: simulations.
        seed: of all random numbers.
        stride: steps from one snapshot to the next.
        window: strides that are recorded, from the first step on.
        strides: length of the training.
        block: strides that a block mean is over.
        dropped: first strides that block means leave out.
        rate: learning rate times n_1.
        start: standard deviation of the first weights.
    """

    teacher: str
    n_1: int
    outputs: int
    seeds: int
    seed: int
    stride: int
    window: int
    strides: int
    block: int
    dropped: int
    rate: float
    start: float

    @property
    def ahead(self) -> int:
        """Strides from the window's end to the end of training."""
        return self.strides - self.window


@dataclass(frozen=True, eq=False)
class Simulation:
    """What a batch of simulations left behind; weights are those of all units in a row.

    Attributes:
        teacher: `(seeds, outputs, n_1)`.
        window: `(window + 1, seeds, weights)`, one snapshot a stride.
        means: `(blocks, seeds, weights)`, means over every step of a block.
        error: `(strides + 1, seeds)`, exact expected error.
        mistakes: `(steps,)`, share of wrong signs at each step, over simulations and outputs, before it was learned.
        final: `(seeds, weights)`, at the end.
        trail: `(strides + 1, weights)` of the first simulation.
    """

    teacher: Tensor
    window: Tensor
    means: Tensor
    error: Tensor
    mistakes: Tensor
    final: Tensor
    trail: Tensor


def expected_error(
    weights: Float[Tensor, "*batch weights"], teacher: Float[Tensor, "*some outputs inputs"]
) -> Float[Tensor, "*batch"]:
    """The exact share of Gaussian inputs at which the signs of student and teacher differ, averaged over the outputs.

    Args:
        weights: `(*batch, outputs * inputs)`; a unit whose weights are zero or not finite guesses, 0.5.
        teacher: `(*batch, outputs, inputs)`, or fewer leading axes.

    Returns:
        `(*batch)`: the angle between the two over pi.

    >>> expected_error(torch.tensor([1.0, 1.0]), torch.tensor([[1.0, 0.0]]))
    tensor(0.2500)
    """
    student = weights.reshape(*weights.shape[:-1], *teacher.shape[-2:])
    usable = student.isfinite().all(dim=-1) & (student != 0).any(dim=-1)
    student, teacher = unit(student), unit(teacher)
    # by half the angle, which is as precise for close directions as for others
    angle = 2 * torch.atan2((student - teacher).norm(dim=-1), (student + teacher).norm(dim=-1))
    return torch.where(usable, angle / math.pi, 0.5).mean(dim=-1)


def unit(vectors: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """Directions of finite vectors, however large; zeros stay.

    >>> unit(torch.tensor([3e30, 4e30]))
    tensor([0.6000, 0.8000])
    """
    largest = vectors.abs().amax(dim=-1, keepdim=True)
    scaled = vectors / torch.where(largest > 0, largest, 1.0)
    return scaled / scaled.norm(dim=-1, keepdim=True).clamp_min(1.0)  # at least 1, unless zero


def simulate(run: Run, progress: Callable[[int], None] = lambda _: None) -> Simulation:
    """Train all simulations at once: ``w += rate / n_1 * (sign(v x) - w x) x``, a fresh Gaussian x a step.

    Args:
        run: which simulations.
        progress: called with the steps done.
    """
    generator = torch.Generator().manual_seed(run.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = run.seeds, run.outputs, run.n_1
    teacher = normal(*shape)
    teacher = teacher**3 if run.teacher == "uneven" else teacher
    weights = run.start * normal(*shape)
    total = torch.zeros_like(weights)
    snapshots, means, errors, mistakes, trail = [], [], [], [], []
    for step in range(run.strides * run.stride + 1):
        stride, rest = divmod(step, run.stride)
        if step:
            x = normal(run.seeds, run.n_1, 1)
            output, label = (weights @ x).squeeze(-1), _sign((teacher @ x).squeeze(-1))
            mistakes.append((_sign(output) != label).double().mean())
            weights = weights + run.rate / run.n_1 * (label - output).unsqueeze(-1) * x.mT
        if run.dropped * run.stride < step <= run.window * run.stride:
            total = total + weights
            if not rest and (stride - run.dropped) % run.block == 0:
                means.append(total.flatten(1) / (run.block * run.stride))
                total = torch.zeros_like(weights)
        if not rest:
            if stride <= run.window:
                snapshots.append(weights.flatten(1))
            errors.append(expected_error(weights.flatten(1), teacher))
            trail.append(weights[0].flatten())
            progress(step)
    return Simulation(
        teacher=teacher,
        window=torch.stack(snapshots),
        means=torch.stack(means),
        error=torch.stack(errors),
        mistakes=torch.stack(mistakes),
        final=weights.flatten(1),
        trail=torch.stack(trail),
    )


def _sign(values: Tensor) -> Tensor:
    return torch.where(values < 0, -1.0, 1.0).to(values.dtype)
