"""The recorded window of a model's weights: stride, block mean, device, dtype, memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from koopt import linalg
from koopt.forecasters import METHODS
from koopt.operator import fit
from koopt.partitions import Partition, partition

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from koopt.partitions import Labels


class Trajectory:
    """The last `window` snapshots of a model's trainable weights, and forecasts from them.

    Args:
        model: the module that is trained; frozen parameters are left out, tied ones recorded once.
        window: how many snapshots are kept.
        stride: optimizer steps from one snapshot to the next.
        average: record the mean of each block of `stride` steps instead of the weights at every `stride`-th step.
        dtype: of the snapshots; None: the parameters', at least float32.
        device: where they are kept; None: where the first parameter is.

    Attributes:
        steps: how often :meth:`record` was called.
        nbytes: the memory of the window, all of it taken at the start.

    Raises:
        ValueError: if `window` or `stride` is below 1, the model has nothing to record, or the window needs more memory than
            is free.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> traj = koopt.Trajectory(model, window=3)
    >>> for value in (8.0, 4.0, 2.0):  # stands for training steps
    ...     _ = nn.init.constant_(model.weight, value)
    ...     traj.record()
    >>> traj.forecast(2)
    {'weight': tensor([[0.5000]])}
    """

    def __init__(
        self,
        model: nn.Module,
        window: int = 40,
        stride: int = 1,
        average: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value in (("window", window), ("stride", stride)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number >= 1")
        self._whole = partition(model, by="network")
        named = dict(model.named_parameters())
        self._parameters = [named[name] for name in self._whole.names]
        if dtype is None:
            dtype = torch.float32
            for parameter in self._parameters:
                dtype = torch.promote_types(dtype, parameter.dtype)
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}, expected a floating-point dtype")
        device = torch.device(device) if device is not None else self._parameters[0].device
        self.window, self.stride, self.average = window, stride, average
        self.nbytes = (window + average) * self._whole.size * dtype.itemsize
        free = _free_memory(device)
        if free is not None and self.nbytes > free:
            raise ValueError(
                f"window: {window} snapshots of {self._whole.size:,} weights in {dtype} need {_gib(self.nbytes)}, "
                f"{device} has {_gib(free)} free; take a smaller window, a smaller dtype or another device"
            )
        self._model = model
        self._partitions: dict[tuple[str, int | None], Partition] = {("network", None): self._whole}
        self._rows = torch.empty(window, self._whole.size, dtype=dtype, device=device)
        self._sum = torch.zeros(self._whole.size, dtype=dtype, device=device) if average else None
        self.steps = 0

    def __len__(self) -> int:
        """How many snapshots are held."""
        return min(self._taken, self.window)

    @property
    def names(self) -> tuple[str, ...]:
        """The recorded parameters, in the order of the columns of :meth:`snapshots`."""
        return self._whole.names

    @property
    def age(self) -> float:
        """Optimizer steps since the last snapshot was taken; a block mean that has just closed is (stride - 1)/2 old."""
        if self.average:
            return self.steps % self.stride + (self.stride - 1) / 2
        return (self.steps - 1) % self.stride

    @property
    def _taken(self) -> int:
        return self.steps // self.stride if self.average else -(-self.steps // self.stride)

    @torch.no_grad()
    def record(self) -> None:
        """Record the weights; call it after each optimizer step.

        The first call takes the first snapshot, each `stride`-th call after it another; with ``average`` a snapshot is
        taken when a block of `stride` calls is complete.
        """
        if self._sum is not None:
            torch._foreach_add_(self._pieces(self._sum), self._sources())
            if (self.steps + 1) % self.stride == 0:
                torch.div(self._sum, self.stride, out=self._rows[self._taken % self.window])
                self._sum.zero_()
        elif self.steps % self.stride == 0:
            torch._foreach_copy_(self._pieces(self._rows[self._taken % self.window]), self._sources())
        self.steps += 1

    def snapshots(self) -> Tensor:
        """The window in order of time, a copy `(time, weights)`; columns as ``Partition.flatten`` orders them."""
        return self._ordered().clone()

    def forecast(
        self,
        steps: float,
        method: str = "koopman",
        by: str | Labels = "network",
        max_size: int | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """The weights `steps` optimizer steps after the last recorded one.

        Args:
            steps: optimizer steps >= 0, or ``math.inf``; the horizon is (steps + age)/stride snapshot steps.
            method: "koopman", "last", "mean", "line", "regression", "ema", "dema" or "anderson".
            by, max_size: which weights share an operator, as in :func:`koopt.partition`.
            options: those of :func:`koopt.fit`, and `max_modulus`; for other methods those of the rule of that name.

        Returns:
            New weights by name, in the dtype and on the device of the parameters.

        Raises:
            ValueError: if the method or an option is unknown, there are too few snapshots, or the forecast is not finite.

        Source: Dogra & Redman (2020), Algorithm 1.
        """
        if method not in METHODS:
            raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
        if not steps >= 0:
            raise ValueError(f"steps is {steps}, expected optimizer steps >= 0 after the last recorded one")
        if len(self) == 0:
            raise ValueError("forecast: no snapshot has been taken yet; call record() after each optimizer step first")
        horizon = (steps + self.age) / self.stride
        parts = self._partition(by, max_size)
        forecasts = []
        for patches in parts.gather_flat(self._ordered()):
            window = patches.transpose(0, 1)
            if method == "koopman":
                max_modulus = options.get("max_modulus")
                fitted = fit(window, **{name: value for name, value in options.items() if name != "max_modulus"})
                forecasts.append(fitted.forecast(horizon, max_modulus))
            else:
                forecasts.append(linalg.combine(METHODS[method](window, horizon, **options), window))
        flat = parts.scatter_flat(forecasts)
        weights = parts.unflatten(flat)
        if not bool(flat.sum().isfinite()):
            for name, values in weights.items():
                if not bool(values.isfinite().all()):
                    raise ValueError(
                        f"forecast of {name!r} is not finite {steps} steps ahead; take a shorter horizon or a lower rank"
                    )
        return {
            name: values.to(device=parameter.device, dtype=parameter.dtype)
            for (name, values), parameter in zip(weights.items(), self._parameters, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on recording after a restart: tensors and numbers, loadable with ``weights_only=True``."""
        return {
            "window": self.window,
            "stride": self.stride,
            "average": self.average,
            "steps": self.steps,
            "snapshots": self.snapshots(),
            "sum": None if self._sum is None else self._sum.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`; refused, with nothing changed, if it belongs to another window or model.

        Raises:
            ValueError: naming the setting that differs.
        """
        snapshots = state["snapshots"]
        settings = {"window": self.window, "stride": self.stride, "average": self.average}
        for name, value in settings.items():
            if state[name] != value:
                raise ValueError(
                    f"state: recorded with {name}={state[name]}, this trajectory has {name}={value}; make it the same"
                )
        if snapshots.shape[-1] != self._whole.size:
            raise ValueError(
                f"state: {snapshots.shape[-1]} weights were recorded, this model has {self._whole.size}; load it for the same model"
            )
        self.steps = state["steps"]
        first = max(0, self._taken - self.window)
        for i, row in enumerate(snapshots):
            self._rows[(first + i) % self.window].copy_(row)
        if self._sum is not None:
            self._sum.copy_(state["sum"])

    def _ordered(self) -> Tensor:
        if self._taken <= self.window:
            return self._rows[: self._taken]
        return self._rows.roll(-(self._taken % self.window), dims=0)

    def _partition(self, by: str | Labels, max_size: int | None) -> Partition:
        if callable(by):
            return partition(self._model, by, max_size)
        if (by, max_size) not in self._partitions:
            self._partitions[by, max_size] = partition(self._model, by, max_size)
        return self._partitions[by, max_size]

    def _pieces(self, row: Tensor) -> list[Tensor]:
        pieces = row.split([shape.numel() for shape in self._whole.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self._whole.shapes, strict=True)]

    def _sources(self) -> list[Tensor]:
        device, dtype = self._rows.device, self._rows.dtype
        return [parameter.detach().to(device, dtype) for parameter in self._parameters]


@torch.no_grad()
def load_into(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write weights into a model's parameters in place: all of them, or none if one does not fit.

    Args:
        model: the module to change.
        weights: by the names of ``model.named_parameters()``, any subset; cast to each parameter's dtype and device.

    Raises:
        KeyError: if the model has no parameter of that name.
        ValueError: if a shape differs or a value is NaN or Inf.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> koopt.load_into(model, {"weight": torch.tensor([[2.0]])})
    >>> model.weight.item()
    2.0
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    targets, sources = [], []
    for name, values in weights.items():
        if name not in parameters:
            raise KeyError(
                f"weights: the model has no parameter {name!r}; its names are those of model.named_parameters()"
            )
        parameter = parameters[name]
        if values.shape != parameter.shape:
            raise ValueError(
                f"weights[{name!r}] has shape {tuple(values.shape)}, the parameter {tuple(parameter.shape)}"
            )
        source = values.to(parameter.device, parameter.dtype)
        if not bool(source.isfinite().all()):
            raise ValueError(f"weights[{name!r}] holds NaN or Inf (in {parameter.dtype}); nothing was written")
        targets.append(parameter)
        sources.append(source)
    torch._foreach_copy_(targets, sources)


def _free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device; None where there is no way to know."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pages = "SC_AVPHYS_PAGES"
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") if pages in getattr(os, "sysconf_names", {}) else None


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
