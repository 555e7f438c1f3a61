"""Figure 3 of the paper: a classifier's loss and accuracy, the forecasts, and their spectra."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.figure
import numpy as np
import torch

import koopt
from koopt import linalg, metrics, plot
from koopt.experiments import classifier, panels
from koopt.experiments.figure2 import one_legend, save
from koopt.forecasters import ensemble

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from koopt.experiments.minibatch import Group, Run
    from koopt.experiments.mnist_methods import Method, Protocol, Settings


def draw(
    settings: Settings,
    protocols: list[Protocol],
    measured: dict[str, dict[Method, tuple[Tensor, Tensor]]],
    groups: list[Group],
    folder: Path,
) -> str:
    """Loss, accuracy, T_eq, baselines and eigenvalues in one figure; returns the file's name.

    `measured` is, by protocol and method, the loss and accuracy of each seed's forecast.
    """
    figure = matplotlib.figure.Figure(figsize=(12, 8.6), layout="constrained")
    rows = figure.subfigures(2, 1, squeeze=False)[
        :, 0
    ]  # each with a margin of its own: the names of the lower row are long
    axes = np.stack([row.subplots(1, 3) for row in rows])
    run = settings.run
    validation, test = protocols
    found = measured["test"]
    paper, best, mean = (
        next(m for m in found if label in (m.setting, m.method)) for label in ("paper", "recommended", "mean")
    )
    shown = {"quasi-node, every step (paper)": paper, "network, block means": best, "mean of the last epoch": mean}

    last = min(settings.epochs, run.t2 + 3 * run.ahead)
    epochs = np.arange(1, last + 1)
    aims = [run.t2 + run.ahead, run.t2 + _beyond(best.horizon, run), run.t2]
    for axis, protocol, which, name in ((axes[0, 0], validation, 0, "loss"), (axes[0, 1], test, 1, "accuracy")):
        curve = (protocol.loss, protocol.accuracy)[which][1 : last + 1].numpy()
        points = {
            label: (aim, measured[protocol.name][m][which].numpy())
            for (label, m), aim in zip(shown.items(), aims, strict=True)
        }
        panels.epoch_curves(axis, epochs, curve, (run.t1, run.t2), points)
        axis.set_ylabel(f"{protocol.name} {name} (median, quartiles)")
    axes[0, 0].set_title("a  Validation loss and the forecasts", loc="left", fontsize=11)
    axes[0, 1].set_title("b  Test accuracy and the forecasts", loc="left", fontsize=11)

    shares = {}
    for label, m in zip(
        ("quasi-node\n(paper)", "network,\nblock means", "mean of\nlast epoch"), shown.values(), strict=True
    ):
        steps, censored = metrics.equivalent_steps(measured["test"][m][0], test.loss[run.t2 :], every=run.epoch_steps)
        shares[label] = steps.numpy() / run.horizon, censored.numpy()
    top = (settings.epochs - run.t2) / run.ahead
    plot.equivalent_steps(axes[0, 2], shares, top=top)
    axes[0, 2].set_title("c  Equivalent steps, test set", loc="left", fontsize=11)

    gains = {
        label_of(m): ((measured["validation"][m][0] - validation.loss[run.t2]) / validation.loss[run.t2]).numpy()
        for m in found
        if m.method != "last"
    }
    panels.paired_changes(axes[1, 0], gains, bold=label_of(best))
    axes[1, 0].set_title("d  Validation loss against that at $t_2$", loc="left", fontsize=11)

    sweep = _sweep(settings, groups, validation)
    panels.horizon_sweep(axes[1, 1], *sweep, mark=_beyond(best.horizon, run))
    axes[1, 1].set_title("e  How far ahead to aim", loc="left", fontsize=11)

    spectra = {
        "quasi-node, every step (paper)": _complex(groups[0].spectrum[0]),
        "network, block means": _network_spectrum(settings, groups),
    }
    plot.eigenvalues(axes[1, 2], spectra, zoom=0.3)
    axes[1, 2].set_title("f  Eigenvalues: one seed; all seeds", loc="left", fontsize=11)
    one_legend(figure, [axes[0, 0], axes[0, 1], axes[1, 2]])
    figure.suptitle(
        f"After Figure 3 of the paper: MNIST, 784:20:20:20:10, Adadelta, batch {run.batch}, {settings.seeds} seeds, "
        f"window: epochs {run.t1 + 1} to {run.t2}, T = {run.ahead} epochs"
    )
    return save(figure, folder, "figure3.png")


def label_of(method: Method) -> str:
    """How a method is called in figures."""
    return method.what if method.setting == "baseline" else f"{method.by}, {method.what}"


def _beyond(blocks: float, run: Run) -> float:
    """Epochs from t2 to the block that a forecast from block means aims at."""
    return (blocks * run.look - (run.look - 1) / 2) / run.epoch_steps


def _complex(values: Tensor) -> np.ndarray:
    return torch.view_as_complex(values.double().contiguous()).numpy()


def _network_spectrum(settings: Settings, groups: list[Group]) -> np.ndarray:
    windows = torch.cat([group.blocks for group in groups], dim=1).transpose(0, 1)
    return koopt.fit(windows, rank=max(settings.ranks), projected=True).eigenvalues.flatten().numpy()


def _sweep(settings: Settings, groups: list[Group], validation: Protocol) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Relative change of the loss for network operators on block means, against epochs ahead, by rank."""
    run = settings.run
    windows = torch.cat([group.blocks for group in groups], dim=1).transpose(0, 1)
    blocks = np.array([1, 3, 6, 9, 12, 16, 20, 25, 30, 40])
    start = validation.loss[run.t2].mean()
    curves = {}
    for ranks in ((1,), (2,), (3,), (5,), settings.ranks):
        losses = [
            classifier.loss_and_accuracy(
                linalg.combine(ensemble(windows, int(n), ranks), windows), validation.images, validation.labels
            )[0].mean()
            for n in blocks
        ]
        curves[f"rank {', '.join(map(str, ranks))}"] = (torch.stack(losses) / start - 1).numpy()
    return np.array([_beyond(int(n), run) for n in blocks]), curves
