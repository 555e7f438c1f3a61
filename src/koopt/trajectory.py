"""The recorded window of a model's weights: stride, block mean, device, dtype, memory."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch._utils import _unflatten_dense_tensors

from koopt import linalg
from koopt.forecasters import METHODS, require_options
from koopt.horizon import Plan, plan
from koopt.memory import free_memory
from koopt.operator import fit
from koopt.partitions import Partition, bare, partition_of, trainable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float
    from torch import Tensor, nn

    from koopt.partitions import Labels

SLAB = 2**22  # numbers of a window that are fitted at a time, each in several float64 copies
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dtype_of_records(named: Mapping[str, Tensor], dtype: torch.dtype | None) -> torch.dtype:
    """In which parameters are recorded: as is asked for, or their own, at least float32.

    Args:
        named: the parameters by name.
        dtype: what is asked for.

    Raises:
        TypeError: if that is no floating-point dtype, or a parameter is complex.

    >>> dtype_of_records({"weight": torch.zeros(1, dtype=torch.bfloat16)}, None)
    torch.float32
    """
    for name, parameter in named.items():
        if parameter.is_complex():
            raise TypeError(f"model: {name!r} is {parameter.dtype}, only real weights are recorded; freeze it")
    if dtype is None:
        return torch.float64 if any(p.dtype == torch.float64 for p in named.values()) else torch.float32
    if dtype not in DTYPES:
        raise TypeError(f"dtype is {dtype}, expected one of {', '.join(map(str, DTYPES))}, or None")
    return dtype


class Trajectory:
    """The last `window` snapshots of a model's trainable weights, and forecasts from them.

    Make it once the model is where it is trained: it holds on to the parameters that are trainable then.

    Args:
        model: the module that is trained; frozen parameters are left out, tied ones recorded once.
        window: how many snapshots are kept.
        stride: optimizer steps from one snapshot to the next.
        average: record the mean of each block of `stride` steps instead of the weights at every `stride`-th step.
        dtype: of the snapshots; None: the parameters', at least float32. Means are summed in float32 at least.
        device: where they are kept; None: where the first parameter is.

    Attributes:
        window, stride, average: as given.
        steps: how often :meth:`record` was called.
        nbytes: the memory of the window, all of it taken at the start; a forecast takes a copy of a full window.

    Raises:
        TypeError: if `dtype` is not a real floating-point dtype, or a trainable parameter is complex.
        ValueError: if `window` or `stride` is below 1, the model has nothing to record, or the window needs more memory
            than is free.

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
        if not isinstance(average, bool):
            raise TypeError(f"average is {average!r}, expected True or False")
        model = bare(model)
        named = trainable(model)
        dtype = dtype_of_records(named, dtype)
        self._model, self._named = model, named
        self._parameters = list(named.values())
        self._together = len({parameter.device for parameter in self._parameters}) == 1
        self._whole = partition_of(named, model, "network")
        self._partitions: dict[tuple[str, int | None], Partition] = {("network", None): self._whole}
        self.window, self.stride, self.average = window, stride, average
        self.steps = 0

        size = self._whole.size
        device = torch.device(device) if device is not None else self._parameters[0].device
        sum_dtype = torch.promote_types(dtype, torch.float32)
        self.nbytes = size * (window * dtype.itemsize + average * sum_dtype.itemsize)
        free = free_memory(device)
        if free is not None and self.nbytes > free:
            raise ValueError(
                f"window: {window} snapshots of {size:,} weights in {dtype} need {_gib(self.nbytes)}, "
                f"{device} has {_gib(free)} free; take a smaller window, a smaller dtype or another device"
            )
        self._rows = torch.empty(window, size, dtype=dtype, device=device)
        self._sum = torch.zeros(size if average else 0, dtype=sum_dtype, device=device)
        self._sums = list(self._whole.unflatten(self._sum).values()) if average else []

    def __len__(self) -> int:
        """How many snapshots are held."""
        return min(self._taken(self.steps), self.window)

    @property
    def names(self) -> tuple[str, ...]:
        """The recorded parameters, in the order of the columns of :meth:`snapshots`.

        >>> koopt.Trajectory(nn.Linear(2, 1)).names
        ('weight', 'bias')
        """
        return self._whole.names

    @property
    def age(self) -> float:
        """Optimizer steps since the last snapshot; a block mean that has just closed is (stride - 1)/2 old.

        >>> traj = koopt.Trajectory(nn.Linear(2, 1), stride=10, average=True)
        >>> for _ in range(12):
        ...     traj.record()
        >>> traj.age
        6.5
        """
        if self.average:
            return self.steps % self.stride + (self.stride - 1) / 2
        return (self.steps - 1) % self.stride

    def record(self) -> None:
        """Record the weights; call it after each optimizer step.

        The first call takes the first snapshot, each `stride`-th call after it another; with ``average`` a snapshot is
        taken when a block of `stride` calls is complete.

        >>> traj = koopt.Trajectory(nn.Linear(2, 1), stride=10)
        >>> for _ in range(25):
        ...     traj.record()
        >>> len(traj), traj.age
        (3, 4)
        """
        in_block = self.steps % self.stride
        if self.average:
            self._record_mean(in_block)
        elif in_block == 0:
            with torch.no_grad():
                flat = [parameter.to(self._rows.device).reshape(-1) for parameter in self._parameters]
                torch.cat(flat, out=self._row(self._taken(self.steps)))
        self.steps += 1

    @torch.no_grad()
    def _record_mean(self, in_block: int) -> None:
        sources: list[Any] = self._parameters
        if not self._together or sources[0].device != self._sum.device:
            sources = [parameter.to(self._sum.device) for parameter in sources]
        if in_block == 0:
            torch._foreach_copy_(self._sums, sources)  # pyright: ignore[reportPrivateImportUsage], as torch.optim takes it
        else:
            torch._foreach_add_(self._sums, sources)  # pyright: ignore[reportPrivateImportUsage], as torch.optim takes it
        if in_block == self.stride - 1:
            torch.div(self._sum, self.stride, out=self._row(self._taken(self.steps)))

    def snapshots(self) -> Float[Tensor, "time weights"]:
        """The window in order of time, a copy `(time, weights)`; columns as ``Partition.flatten`` orders them.

        >>> traj = koopt.Trajectory(nn.Linear(2, 1))
        >>> traj.record()
        >>> traj.snapshots().shape
        torch.Size([1, 3])
        """
        ordered = self._ordered()
        return ordered.clone() if self._taken(self.steps) <= self.window else ordered

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
            method: "koopman", "last", "mean", "line", "regression", "ema", "dema", "anderson" or "ensemble".
            by, max_size: which weights share an operator, as in :func:`koopt.partition`.
            options: those of :func:`koopt.fit`, and `max_modulus`; for other methods those of the rule of that name.

        Returns:
            New weights by name, in the dtype and on the device of the parameters.

        Raises:
            TypeError: if the method has no option of that name, or `steps` is not a number.
            ValueError: if the method is unknown, an option is out of range, there are too few snapshots, a
                snapshot or the forecast is not finite, or a parameter of the model was replaced.

        Source: Dogra & Redman (2020), Algorithm 1.

        >>> model = nn.Linear(1, 1, bias=False)
        >>> traj = koopt.Trajectory(model)
        >>> for value in (1.0, 2.0, 3.0):  # stands for training steps
        ...     _ = nn.init.constant_(model.weight, value)
        ...     traj.record()
        >>> traj.forecast(10, method="line")
        {'weight': tensor([[13.]])}
        """
        require_options(method, options)
        if isinstance(steps, bool) or not isinstance(steps, Real):
            raise TypeError(f"steps is {type(steps).__name__}, expected a number of optimizer steps, or math.inf")
        if not steps >= 0:
            raise ValueError(f"steps is {steps}, expected optimizer steps >= 0 after the last recorded one")
        if len(self) == 0:
            raise ValueError("forecast: no snapshot has been taken yet; call record() after each optimizer step first")
        self._require_same_parameters()
        horizon = (float(steps) + self.age) / self.stride
        parts = self._partition(by, max_size)
        window = self._ordered()
        try:
            patches = [_continue(patch, horizon, method, options) for patch in parts.gather_flat(window)]
            return self._as_parameters(parts.scatter_flat(patches))
        except (ValueError, torch.linalg.LinAlgError):  # pyright: ignore[reportPrivateImportUsage], which torch documents
            self._require_finite_window(window)  # the likely cause, by name
            raise

    def plan(self, steps: float | None = None, tolerance: float = 0.1) -> Plan:
        """How far the window may be trusted, and by which forecaster.

        Args:
            steps: optimizer steps after the last recorded one that are wanted; None: as far as may be trusted.
            tolerance: largest expected ``|error| / |motion|``.

        Returns:
            A :class:`koopt.Plan`; its horizon is in snapshot steps after the last snapshot, 0 if it refuses.

        Raises:
            ValueError: as :func:`koopt.plan`.

        >>> model = nn.Linear(1, 1, bias=False)
        >>> traj = koopt.Trajectory(model)
        >>> for value in range(9):  # stands for training steps
        ...     _ = nn.init.constant_(model.weight, float(value))
        ...     traj.record()
        >>> plan = traj.plan(2)
        >>> plan.reason, traj.follow(plan)
        ('ok', {'weight': tensor([[10.]])})
        """
        return plan(self._ordered(), None if steps is None else (steps + self.age) / self.stride, tolerance)

    def follow(self, found: Plan) -> dict[str, Tensor]:
        """The weights where a plan of this window leads; those of the last snapshot if it refused.

        Args:
            found: as :meth:`plan` returned it; nothing may have been recorded since.

        Returns:
            New weights by name, in the dtype and on the device of the parameters.

        Raises:
            ValueError: if the window has another number of snapshots, a parameter was replaced, or the forecast is not
                finite.

        >>> model = nn.Linear(1, 1, bias=False)
        >>> traj = koopt.Trajectory(model)
        >>> for value in range(9):  # stands for training steps
        ...     _ = nn.init.constant_(model.weight, float(value))
        ...     traj.record()
        >>> plan = traj.plan(2)
        >>> if plan.horizon:  # else it is refused, and leads nowhere
        ...     koopt.load_into(model, traj.follow(plan))
        >>> model.weight.item()
        10.0
        """
        self._require_same_parameters()
        return self._as_parameters(found.forecast(self._ordered()))

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on recording after a restart: tensors and numbers, loadable with ``weights_only=True``.

        >>> traj = koopt.Trajectory(nn.Linear(2, 1), stride=10)
        >>> traj.record()
        >>> resumed = koopt.Trajectory(nn.Linear(2, 1), stride=10)
        >>> resumed.load_state_dict(traj.state_dict())
        >>> resumed.steps
        1
        """
        recorded = {"steps": self.steps, "snapshots": self.snapshots(), "sum": self._sum.clone()}
        return self._settings() | recorded

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`; refused, with nothing changed, if it belongs to another window or model.

        Args:
            state: as :meth:`state_dict` returned it; tensors may be on another device.

        Raises:
            ValueError: naming the setting that differs, or what is missing or malformed.

        >>> traj = koopt.Trajectory(nn.Linear(2, 1), window=3)
        >>> traj.load_state_dict(koopt.Trajectory(nn.Linear(2, 1), window=4).state_dict())
        Traceback (most recent call last):
        ValueError: state: recorded with window=4, this trajectory has window=3; make them the same
        """
        settings = self._settings()
        missing = {*settings, "steps", "snapshots", "sum"} - state.keys()
        if missing:
            raise ValueError(f"state: {', '.join(sorted(missing))} missing; pass what state_dict() returned")
        for name, value in settings.items():
            # dicts are equal in any order, but the columns of the snapshots are not
            if state[name] != value or (name == "shapes" and list(state[name]) != list(value)):
                raise ValueError(
                    f"state: recorded with {name}={state[name]!r}, this trajectory has {name}={value!r}; "
                    f"make them the same"
                )
        steps = state["steps"]
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(
                f"state: steps is {steps!r}, expected a whole number >= 0; pass what state_dict() returned"
            )
        held = min(self._taken(steps), self.window)
        for name, own in (("snapshots", self._rows[:held]), ("sum", self._sum)):
            given = state[name]
            found = (tuple(given.shape), given.dtype) if isinstance(given, torch.Tensor) else type(given).__name__
            if found != (tuple(own.shape), own.dtype):
                raise ValueError(
                    f"state: {name} is {found} after {steps} steps, expected {(tuple(own.shape), own.dtype)}; "
                    f"make dtype the same, and pass what state_dict() returned"
                )
        self.steps = steps
        first = self._taken(steps) - held
        for i, row in enumerate(state["snapshots"]):
            self._row(first + i).copy_(row)
        self._sum.copy_(state["sum"])

    def _settings(self) -> dict[str, Any]:
        shapes = {name: list(parameter.shape) for name, parameter in self._named.items()}
        return {"window": self.window, "stride": self.stride, "average": self.average, "shapes": shapes}

    def _taken(self, steps: int) -> int:
        """How many snapshots have been taken after so many steps, those since overwritten too."""
        return steps // self.stride if self.average else -(-steps // self.stride)

    def _row(self, taken: int) -> Tensor:
        return self._rows[taken % self.window]

    def _ordered(self) -> Tensor:
        """The window in order of time: a view until it has wrapped around, then a copy."""
        taken = self._taken(self.steps)
        return self._rows[:taken] if taken <= self.window else self._rows.roll(-taken % self.window, dims=0)

    def _partition(self, by: str | Labels, max_size: int | None) -> Partition:
        device = self._rows.device
        if not isinstance(by, str) or type(max_size) not in (int, type(None)):
            return partition_of(self._named, self._model, by, max_size).to(device)
        if (by, max_size) not in self._partitions:
            self._partitions[by, max_size] = partition_of(self._named, self._model, by, max_size).to(device)
        return self._partitions[by, max_size]

    def _as_parameters(self, flat: Tensor) -> dict[str, Tensor]:
        """Weights by name in the dtype and on the device of each parameter; refused if one is not finite there."""
        kinds = {(parameter.device, parameter.dtype) for parameter in self._parameters}
        alike = len(kinds) == 1
        if alike:
            flat = flat.to(*kinds.pop())
        weights = dict(zip(self._named, _unflatten_dense_tensors(flat, self._parameters), strict=True))
        if alike and linalg.all_finite(flat):
            return weights
        weights = {name: weights[name].to(p.device, p.dtype) for name, p in self._named.items()}
        bad = _first_not_finite(weights)
        if bad is not None:
            raise ValueError(
                f"forecast of {bad!r} is not finite in {weights[bad].dtype}; take a shorter horizon or a lower rank"
            )
        return weights

    def _require_same_parameters(self) -> None:
        """The model must still train what was recorded, or a forecast would bring back weights it has left behind."""
        now = dict(self._model.named_parameters())
        for name, parameter in self._named.items():
            if now.get(name) is not parameter:
                raise ValueError(
                    f"model: {name!r} was replaced after this trajectory was made, "
                    f"as load_state_dict(assign=True) does; make a new one after that"
                )

    def _require_finite_window(self, window: Tensor) -> None:
        bad = _first_not_finite(self._whole.unflatten(window))
        if bad is not None:
            raise ValueError(
                f"forecast: the recorded snapshots of {bad!r} hold NaN or Inf; restore it and record a new window"
            )


def _continue(patches: Tensor, horizon: float, method: str, options: Mapping[str, Any]) -> Tensor:
    """The forecast `(patches, state)` of patches `(time, patches, state)`, a slab of them at a time."""
    time, count, state = patches.shape
    # errors of an infinite horizon name patches, so there it is all at once
    together = count if math.isinf(horizon) else max(1, SLAB // (time * state))
    slabs = [_continue_slab(slab.transpose(0, 1), horizon, method, options) for slab in patches.split(together, dim=1)]
    return torch.cat(slabs) if len(slabs) > 1 else slabs[0]


def _continue_slab(window: Tensor, horizon: float, method: str, options: Mapping[str, Any]) -> Tensor:
    if method != "koopman":
        return linalg.combine(METHODS[method](window, horizon, **options), window)
    fit_options = {name: value for name, value in options.items() if name != "max_modulus"}
    return fit(window, **fit_options).forecast(horizon, options.get("max_modulus"))


def _first_not_finite(weights: Mapping[str, Tensor]) -> str | None:
    return next((name for name, values in weights.items() if not bool(values.isfinite().all())), None)


@torch.no_grad()
def load_into(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Write weights into a model's parameters in place: all of them, or none if one does not fit.

    Args:
        model: the module to change, which may be compiled or within DistributedDataParallel.
        weights: by the names of ``model.named_parameters()``, or of the module within, any subset; cast to each
            parameter's dtype and device.

    Raises:
        KeyError: if the model has no parameter of that name.
        TypeError: if a value is no tensor, or complex where the parameter is not.
        ValueError: if a shape differs, a value is NaN or Inf in the parameter's dtype, or tied names differ.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> koopt.load_into(model, {"weight": torch.tensor([[2.0]])})
    >>> model.weight.item()
    2.0
    """
    parameters = {name: p for one in (model, bare(model)) for name, p in one.named_parameters(remove_duplicate=False)}
    sources: dict[nn.Parameter, Tensor] = {}
    for name, values in weights.items():
        if name not in parameters:
            raise KeyError(
                f"weights: the model has no parameter {name!r}; its names are those of model.named_parameters()"
            )
        parameter = parameters[name]
        if not isinstance(values, torch.Tensor) or values.is_complex() != parameter.is_complex():
            given = values.dtype if isinstance(values, torch.Tensor) else type(values).__name__
            raise TypeError(f"weights[{name!r}] is {given}, expected a tensor that fits {parameter.dtype}; convert it")
        if values.shape != parameter.shape:
            raise ValueError(
                f"weights[{name!r}] has shape {tuple(values.shape)}, expected the parameter's {tuple(parameter.shape)}"
            )
        source = values.to(parameter.device, parameter.dtype)
        if not linalg.all_finite(source):
            raise ValueError(f"weights[{name!r}] holds NaN or Inf (in {parameter.dtype}); nothing was written")
        if parameter in sources and not torch.equal(sources[parameter], source):
            raise ValueError(f"weights[{name!r}] is tied to another name with other values; pass one of them")
        sources[parameter] = source
    held = {parameter.untyped_storage().data_ptr() for parameter in sources}
    for parameter, source in sources.items():
        if source.untyped_storage().data_ptr() in held:  # as when two parameters change places
            sources[parameter] = source.clone()
    if sources:
        torch._foreach_copy_(list(sources), list(sources.values()))  # pyright: ignore[reportPrivateImportUsage], as torch.optim takes it


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
