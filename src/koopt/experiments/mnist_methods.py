"""The ways to forecast a classifier's weights from its window, and what their losses are compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

import koopt
from koopt import linalg
from koopt.experiments import classifier, minibatch
from koopt.forecasters import METHODS

if TYPE_CHECKING:
    from torch import Tensor

    from koopt.experiments.data import Mnist
    from koopt.experiments.minibatch import Group, Run


@dataclass(frozen=True)
class Settings:
    """One reproduction; the choices below were made on other seeds (benchmarks/mnist_settings.py).

    Attributes:
        seeds, seed, epochs: as in ``minibatch.Run``.
        ranks, ahead: of the recommended setting: those of its operators, and how many blocks beyond the last it aims.
        strided_rank: rank of the paper's operators on every look'th step.
        repeats: how often each jump is timed.
    """

    seeds: int = 25
    seed: int = 0
    epochs: int = 16
    ranks: tuple[int, ...] = (2, 3)
    ahead: int = 18
    strided_rank: int = 6
    repeats: int = 21

    @property
    def run(self) -> Run:
        return minibatch.Run(seeds=self.seeds, seed=self.seed, epochs=self.epochs)


QUICK = Settings(seeds=4, epochs=9, repeats=5)


@dataclass(frozen=True, eq=False)
class Method:
    """One way to forecast.

    Attributes:
        method, by, setting: as they stand in a row of the result.
        what: in words, what of the window it looks at.
        source: which part of a ``minibatch.Group`` that is.
        snapshots: how many of them, back from t2; None: all.
        horizon: snapshot steps beyond the last one.
        options: of the method, and `max_size` of the partition.
    """

    method: str
    by: str
    setting: str
    what: str
    source: str
    snapshots: int | None = None
    horizon: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


def methods(settings: Settings) -> list[Method]:
    """The rows of the table, in order."""
    run = settings.run
    strided = {"rank": settings.strided_rank, "max_modulus": 1.0, "max_size": classifier.QUASI_NODE}
    block, epoch = f"means of {run.look} steps", run.epoch_steps // run.look
    return [
        Method("koopman", "quasi-node", "paper", "every step", "every_step", None, run.horizon, {"rtol": run.rtols[0]}),
        Method(
            "koopman",
            "quasi-node",
            "paper",
            "every step, |λ| ≤ 1",
            "every_step",
            None,
            run.horizon,
            {"rtol": run.rtols[0], "max_modulus": 1.0},
        ),
        Method(
            "koopman",
            "quasi-node",
            "paper",
            f"every {run.look} steps, |λ| ≤ 1",
            "samples",
            None,
            run.horizon / run.look,
            strided,
        ),
        Method("ensemble", "network", "recommended", block, "blocks", None, settings.ahead, {"ranks": settings.ranks}),
        Method("last", "network", "baseline", "no change", "samples"),
        Method("line", "network", "baseline", f"line, {block}", "blocks", epoch, -3, {"span": epoch - 1}),
        Method("regression", "network", "baseline", f"regression, {block}", "blocks", _blocks(run) * 5 // 6, -6),
        Method("mean", "network", "baseline", "mean of the last epoch", "blocks", epoch),
        *(
            Method("ema", "network", "baseline", f"EMA {decay}", "averages", options={"decay": decay})
            for decay in run.decays
        ),
        Method("dema", "network", "baseline", f"double EMA, {block}", "blocks", None, -4, {"decay": 0.96}),
    ]


def forecast(run: Run, group: Group, method: Method) -> Tensor:
    """Forecast weights `(networks, weights)` of one group, float32."""
    if method.source == "every_step":
        limit = run.limits.index(method.options.get("max_modulus"))
        return group.every_step[run.rtols.index(method.options["rtol"]), limit]
    if method.source == "averages":
        return group.averages[run.decays.index(method.options["decay"])]
    snapshots = getattr(group, method.source)
    snapshots = snapshots[-(method.snapshots or len(snapshots)) :].transpose(0, 1)
    options = dict(method.options)
    if method.method != "koopman":
        return linalg.combine(METHODS[method.method](snapshots, method.horizon, **options), snapshots)
    most, limit = options.pop("max_size", None), options.pop("max_modulus", None)
    parts = koopt.partition(classifier.Classifier(), partition_of(method), max_size=most)
    return torch.stack([_continued(parts, window, method.horizon, limit, options) for window in snapshots])


def _continued(
    parts: Any, window: Tensor, horizon: float, max_modulus: float | None, options: dict[str, Any]
) -> Tensor:
    operators = [koopt.fit(patches.transpose(0, 1), **options) for patches in parts.gather_flat(window)]
    return parts.scatter_flat([operator.forecast(horizon, max_modulus) for operator in operators])


def partition_of(method: Method) -> str:
    """As ``koopt.partition`` takes it; a quasi-node is a node with a largest size."""
    return "node" if method.by == "quasi-node" else method.by


def _blocks(run: Run) -> int:
    return run.window_steps // run.look


@dataclass(frozen=True)
class Protocol:
    """What a forecast's loss is compared with.

    Attributes:
        name: "validation" (the split) or "test" (the paper's own).
        images, labels: what the loss is measured on.
        loss, accuracy: `(epochs + 1, seeds)` at the end of each epoch.
        dips: `(looks, seeds)` losses more often, from t2 on, or None.
    """

    name: str
    images: Tensor
    labels: Tensor
    loss: Tensor
    accuracy: Tensor
    dips: Tensor | None = None


def validation(run: Run, groups: list[Group], digits: Mnist) -> Protocol:
    loss = torch.cat([group.loss for group in groups], dim=1)
    accuracy = torch.cat([group.accuracy for group in groups], dim=1)
    looks = run.epoch_steps // run.look
    return Protocol(
        "validation",
        classifier.normalized(digits.train_images[run.images - run.held_out : run.images]),
        digits.train_labels[run.images - run.held_out : run.images],
        loss[::looks],
        accuracy[::looks],
        loss[run.t2 * looks :],
    )


def test(epochs: Tensor, digits: Mnist) -> Protocol:
    images, labels = classifier.normalized(digits.test_images), digits.test_labels
    found = [classifier.loss_and_accuracy(weights, images, labels) for weights in epochs]
    return Protocol("test", images, labels, *(torch.stack(values) for values in zip(*found, strict=True)))
