"""Train many classifiers on mini-batches as one tensor program, and keep what forecasts of their weights need."""

from __future__ import annotations

import itertools
import json
import math
import os
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import koopt
from koopt import system
from koopt.experiments import classifier, data, workers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from jaxtyping import Complex, Float
    from torch import Tensor

GROUP = 5  # networks in one tensor program: fewer cost more each, more need more memory at once
LOOKS = 20  # evaluations an epoch
PATCHES = 25  # fitted at a time, to bound memory
MEMORY = 5 * 2**29  # bytes that training a group takes at most: its window, the images, a few operators


@dataclass(frozen=True)
class Run:
    """What is trained and what of it is kept.

    Attributes:
        seeds: how many networks; network i starts from seed `seed` + i, which also shuffles its data.
        seed: the first seed.
        epochs: passes over the training images.
        t1, t2: epochs after which the window begins and ends: the third to the fifth.
        ahead: T, in epochs: how far the operators on every step are asked to forecast.
        images: how many of MNIST's training images are used.
        held_out: the last so many of them are the validation split.
        batch: images a step.
        rate, gamma: Adadelta's learning rate, and its factor after each epoch.
        decays: of the running averages.
        rtols: cuts of the paper's operators on every step; it states none.
        limits: largest moduli of their eigenvalues when they forecast.
    """

    seeds: int = 25
    seed: int = 0
    epochs: int = 16
    t1: int = 2
    t2: int = 5
    ahead: int = 2
    images: int = 60_000
    held_out: int = 5_000
    batch: int = 64
    rate: float = 1.0
    gamma: float = 0.7
    decays: tuple[float, ...] = (0.99, 0.997, 0.999)
    rtols: tuple[float, ...] = (1e-4,)
    limits: tuple[float | None, ...] = (None, 1.0)

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps an epoch."""
        return -(-(self.images - self.held_out) // self.batch)

    @property
    def look(self) -> int:
        """Optimizer steps from one evaluation on the validation split to the next, and in a block."""
        return max(1, self.epoch_steps // LOOKS)

    @property
    def window_steps(self) -> int:
        """Optimizer steps from t1 to t2."""
        return (self.t2 - self.t1) * self.epoch_steps

    @property
    def horizon(self) -> int:
        """T in optimizer steps."""
        return self.ahead * self.epoch_steps

    def shapes(self, first: int) -> dict[str, tuple[int, ...]]:
        """Of the tensors kept of the group that starts with this seed; see :class:`Group`."""
        networks, size = self.networks(first), len(classifier.initial_weights(0))
        looks, blocks = self.epochs * self.epoch_steps // self.look + 1, self.window_steps // self.look
        return {
            "loss": (looks, networks),
            "accuracy": (looks, networks),
            "epochs": (self.epochs + 1, networks, size),
            "samples": (blocks + 1, networks, size),
            "blocks": (blocks, networks, size),
            "averages": (len(self.decays), networks, size),
            "every_step": (len(self.rtols), len(self.limits), networks, size),
            "spectrum": (networks, size, 2),
            "window": (self.window_steps + 1 if first == self.seed else 0, size),
        }

    @property
    def firsts(self) -> range:
        """The first seed of each group."""
        return range(self.seed, self.seed + self.seeds, GROUP)

    def networks(self, first: int) -> int:
        """How many networks the group that starts with this seed has."""
        return min(GROUP, self.seed + self.seeds - first)


@dataclass(frozen=True)
class Group:
    """A few trained networks, float32.

    Attributes:
        loss, accuracy: `(looks, networks)` on the validation split, every ``Run.look`` steps from the first on.
        epochs: `(epochs + 1, networks, weights)`, weights at the end of each epoch, and before the first.
        samples: `(blocks + 1, networks, weights)`, weights at every ``Run.look``-th step of the window, the last at t2.
        blocks: `(blocks, networks, weights)`, means of the weights after each ``Run.look`` steps, the last ends at t2.
        averages: `(decays, networks, weights)`, exponential moving averages of the weights at t2.
        every_step: `(rtols, limits, networks, weights)`, forecast T ahead by the paper's operators on every step.
        spectrum: `(networks, weights, 2)`, the eigenvalues of those with the first cut (real, imaginary), zeros where
            the rank is lower.
        window: `(steps + 1, weights)`, every step of the first network of the run, to time forecasts.
    """

    loss: Float[Tensor, "looks networks"]
    accuracy: Float[Tensor, "looks networks"]
    epochs: Float[Tensor, "epochs networks weights"]
    samples: Float[Tensor, "times networks weights"]
    blocks: Float[Tensor, "blocks networks weights"]
    averages: Float[Tensor, "decays networks weights"]
    every_step: Float[Tensor, "rtols limits networks weights"]
    spectrum: Float[Tensor, "networks weights 2"]
    window: Float[Tensor, "steps weights"]


def record_all(run: Run, folder: Path, progress: Callable[[str, int, int], None]) -> bool:
    """Train all networks of a run, or those that are still missing, a group a process.

    Ctrl-C loses the groups that are not finished.

    Args:
        run: what to train.
        folder: where it is kept, one file a group.
        progress: called with a group's name, its step and its total.

    Returns:
        Whether all are there; False after Ctrl-C.

    Raises:
        ValueError: if a file there is of another run, or damaged.
        OSError: if there is no data, the disk is too small, or a process is killed.
    """
    data.mnist(progress)  # once, before the processes look for it
    missing = []
    for first in run.firsts:
        if file_of(run, first, folder).exists():
            opened(run, first, folder)
            progress(_name(run, first), run.epochs * run.epoch_steps, run.epochs * run.epoch_steps)
        else:
            missing.append(first)
    system.require_space(folder, sum(_nbytes(run, first) for first in missing))
    folder.mkdir(parents=True, exist_ok=True)
    steps = run.epochs * run.epoch_steps
    with system.alone(folder):
        return workers.run_all(
            [(_name(run, first), steps, partial(record, run, first, folder)) for first in missing], progress, MEMORY
        )


def record(run: Run, first: int, folder: Path, advance: Callable[[int], bool]) -> bool:
    """Train one group and keep it.

    Args:
        run: what to train.
        first: the first seed of the group.
        folder: where it is kept.
        advance: called with the current step now and then; returns whether to go on.

    Returns:
        Whether it is complete; if not, nothing is kept.
    """
    kept = train(run, first, advance)
    if kept is None:
        return False
    path = file_of(run, first, folder)
    temporary = path.with_suffix(".tmp")
    save_file(vars(kept), temporary, metadata={"run": _described(run, first)})
    os.replace(temporary, path)
    return True


def train(run: Run, first: int, advance: Callable[[int], bool]) -> Group | None:
    """Train one group; None if `advance` said to stop."""
    networks = run.networks(first)
    seeds = range(first, first + networks)
    digits = data.mnist()
    images, labels = classifier.normalized(digits.train_images[: run.images]), digits.train_labels[: run.images]
    count = run.images - run.held_out
    kept = Group(**{name: torch.zeros(shape) for name, shape in run.shapes(first).items()})

    parameters = [
        layer.clone().requires_grad_()
        for layer in classifier.layers(torch.stack([classifier.initial_weights(seed) for seed in seeds]))
    ]
    averages = [[parameter.detach().clone() for parameter in parameters] for _ in run.decays]
    optimizer = torch.optim.Adadelta(parameters, lr=run.rate, foreach=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, run.gamma)
    shuffles = [torch.Generator().manual_seed(seed) for seed in seeds]
    t1, t2 = run.t1 * run.epoch_steps, run.t2 * run.epoch_steps
    window = torch.empty(run.window_steps + 1, networks, kept.window.shape[1])  # on disk it would take gigabytes

    def keep(step: int) -> None:
        weights = _flat(parameters)
        if step % run.look == 0:
            found = classifier.loss_and_accuracy(weights, images[count:], labels[count:])
            kept.loss[step // run.look], kept.accuracy[step // run.look] = found
        if step % run.epoch_steps == 0:
            kept.epochs[step // run.epoch_steps] = weights
        if t1 <= step <= t2:
            window[step - t1] = weights
        if step == t2:
            kept.averages.copy_(torch.stack([_flat(average) for average in averages]))
            _keep_window(run, window, kept)

    @torch.no_grad()
    def update_averages() -> None:
        for decay, average in zip(run.decays, averages, strict=True):
            torch._foreach_lerp_(average, parameters, 1 - decay)  # pyright: ignore[reportPrivateImportUsage], as torch.optim takes it

    keep(step := 0)
    for _ in range(run.epochs):
        order = torch.stack([torch.randperm(count, generator=shuffle) for shuffle in shuffles])
        for batch in order.split(run.batch, dim=1):
            optimizer.zero_grad()
            output = classifier.logits(parameters, images[batch])
            classifier.loss_of(output, labels[batch]).sum().backward()
            optimizer.step()
            step += 1
            if step <= t2:
                update_averages()
            keep(step)
            if step % run.look == 0 and not advance(step):
                return None
        schedule.step()
    return kept


def _keep_window(run: Run, window: Tensor, kept: Group) -> None:
    """Fill in what is kept of the window `(steps + 1, networks, weights)`."""
    offset = (len(window) - 1) % run.look
    kept.samples.copy_(window[offset :: run.look])
    kept.blocks.copy_(window[offset + 1 :].unflatten(0, (-1, run.look)).mean(dim=1))
    kept.window.copy_(window[: len(kept.window), 0])
    for network, i in itertools.product(range(window.shape[1]), range(len(run.rtols))):
        found, spectrum = forecast_every_step(window[:, network], run.horizon, run.rtols[i], run.limits)
        kept.every_step[i, :, network] = found
        if i == 0:
            kept.spectrum[network, : len(spectrum)] = torch.view_as_real(spectrum)


def forecast_every_step(
    window: Float[Tensor, "steps weights"], horizon: int, rtol: float, limits: Sequence[float | None]
) -> tuple[Float[Tensor, "limits weights"], Complex[Tensor, " eigenvalues"]]:
    """The paper's forecast: quasi-node operators in the first layer, node operators elsewhere, on every step.

    Args:
        window: one network's weights.
        horizon: optimizer steps.
        rtol: as ``koopt.fit`` takes it.
        limits: as ``Operator.forecast`` takes each as `max_modulus`.

    Returns:
        `(limits, weights)` forecasts, and `(eigenvalues,)` of all operators.
    """
    parts = koopt.partition(classifier.Classifier(), "node", max_size=classifier.QUASI_NODE)
    forecasts, eigenvalues = [], []
    for patches in parts.gather_flat(window):
        operators = [koopt.fit(few, rtol=rtol) for few in patches.transpose(0, 1).split(PATCHES)]
        forecasts.append([torch.cat([operator.forecast(horizon, limit) for operator in operators]) for limit in limits])
        eigenvalues += [operator.eigenvalues.flatten() for operator in operators]
    weights = [parts.scatter_flat(list(some)) for some in zip(*forecasts, strict=True)]
    return torch.stack(weights), torch.cat(eigenvalues)


def opened(run: Run, first: int, folder: Path) -> Group:
    """A group as it was kept; tensors are read from disk when they are used.

    Raises:
        ValueError: if the file is missing, damaged or of another run.
    """
    path = file_of(run, first, folder)
    try:
        with safe_open(path, "pt") as file:
            described = (file.metadata() or {}).get("run", "")
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, the file itself is not iterable
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} is missing or damaged; delete it to train these networks again") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in kept.items()}
    if described != _described(run, first) or shapes != run.shapes(first):
        raise ValueError(f"{path} was recorded with other settings; delete it or choose another folder")
    return Group(**kept)


def file_of(run: Run, first: int, folder: Path) -> Path:
    """Where a group is kept."""
    return folder / f"seeds-{first}-{first + run.networks(first) - 1}.safetensors"


def _flat(parameters: list[Tensor]) -> Tensor:
    return torch.cat([parameter.detach().flatten(1) for parameter in parameters], dim=1)


def _name(run: Run, first: int) -> str:
    return f"seeds {first} to {first + run.networks(first) - 1}"


def _described(run: Run, first: int) -> str:
    settings = asdict(run) | {"seeds": run.networks(first), "seed": first}  # the other groups do not matter
    return json.dumps(settings)


def _nbytes(run: Run, first: int) -> int:
    return 4 * sum(math.prod(shape) for shape in run.shapes(first).values())
