"""The handle on a live run: records after each optimizer step, jumps where it pays, forecasts for evaluation."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from koopt.live import evaluating, resuming
from koopt.live import momentum as moments
from koopt.live.candidates import FEWEST, NOISE, Choice, Proposer, roughness
from koopt.live.guard import buffers_kept, measure
from koopt.live.jumps import MOST, Found, Jump, Schedule, search
from koopt.live.window import BlockMeans, Snapshots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from os import PathLike

    from torch import Tensor, nn

KEY = "koopt"  # in the optimizer's own state dict, where asked for
SCHEDULED = ("due", "wait", "evaluations")
log = logging.getLogger("koopt")
_attached: WeakSet[torch.optim.Optimizer] = WeakSet()


def is_attached(optimizer: torch.optim.Optimizer) -> bool:
    return optimizer in _attached


@dataclass(frozen=True)
class Settings:
    """What :func:`koopt.attach` was asked for, checked there."""

    mode: str
    window: int
    cycle: int
    tail: int
    momentum: str
    max_overhead: float
    dtype: torch.dtype
    device: torch.device

    @property
    def snapshots(self) -> int:
        """How many snapshots of single steps are held, those of momentum too."""
        return 0 if self.mode == "forecast" else self.tail * (2 if self.momentum == "combine" else 1)

    @property
    def means(self) -> int:
        return 0 if self.mode == "jump" else self.window


class Live:
    """What :func:`koopt.attach` returns; all of koopt's state is in it, and none in the optimizer.

    Attributes:
        steps: optimizer steps recorded.
        jumps: a :class:`koopt.Jump` for each attempt, the oldest first.

    >>> model = nn.Linear(1, 1)
    >>> koop = koopt.attach(torch.optim.SGD(model.parameters(), lr=0.1), model)
    >>> koop.steps, koop.jumps
    (0, [])
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        named: dict[str, nn.Parameter],
        guard: Callable[[], object] | None,
        settings: Settings,
        with_optimizer: bool,
    ) -> None:
        self._optimizer, self._model, self._guard, self._settings = optimizer, model, guard, settings
        self._named, self._parameters = named, list[Any](named.values())
        place = settings.dtype, settings.device
        self._tail = Snapshots(self._parameters, settings.tail, *place) if settings.snapshots else None
        combine = settings.snapshots > settings.tail
        self._momenta = Snapshots(self._parameters, settings.tail, *place) if combine else None
        self._means = BlockMeans(self._parameters, settings.window, *place) if settings.means else None
        self._schedule = Schedule(settings.cycle, settings.max_overhead)
        self._choice = Choice()
        self._callbacks: list[Callable[[Jump], object]] = []
        self._sound = False  # whether the guard has ever been finite
        self._held: str | None = None  # who holds the weights, while they are not the trained ones
        self.steps = 0
        self.jumps: list[Jump] = []
        self._hooks = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]
        if with_optimizer:
            self._hooks.append(optimizer.register_state_dict_post_hook(self._into))
            self._hooks.append(optimizer.register_load_state_dict_pre_hook(self._out_of))
        _attached.add(optimizer)

    @property
    def nbytes(self) -> int:
        """The memory held between steps, all of it taken at the start; an attempt takes about three copies more.

        >>> model = nn.Linear(1, 1)
        >>> koopt.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, window=10).nbytes  # and an open block
        88
        """
        return sum(part.nbytes for part in self._parts().values())

    def forecast(self, steps: float | None = None) -> dict[str, Tensor]:
        """Better weights than the last ones, for evaluation; training is not touched.

        With a guard the best of all candidates by the guard, outside the budget. Without one a fixed rule: the average
        of the last quarter of the run until there are 28 block means, then a Koopman operator of rank 2 on the last
        three quarters of them, a third of these ahead.

        Args:
            steps: optimizer steps ahead, by the operator; None: as far as is best.

        Returns:
            New weights by name, in the dtype and on the device of the parameters: before there are enough data the best
            average so far, and where nothing finite is found the weights as they are.

        Raises:
            TypeError: if `steps` is not a number.
            ValueError: if `steps` is negative or infinite, or a parameter of the model was replaced.
            RuntimeError: within :meth:`forecast_weights`.

        >>> model = nn.Linear(1, 1)
        >>> koop = koopt.attach(torch.optim.SGD(model.parameters(), lr=0.1), model)
        >>> torch.equal(koop.forecast()["weight"], model.weight)
        True
        """
        return dict(zip(self._named, self._forecast(steps), strict=True))

    @contextlib.contextmanager
    def forecast_weights(self, steps: float | None = None) -> Iterator[None]:
        """The forecast in the model, for validation or export; afterwards weights and buffers are bitwise as before.

        BatchNorm statistics are kept as they are; ``torch.optim.swa_utils.update_bn(loader, model)`` within renews them
        for the forecast.

        Args:
            steps: as in :meth:`forecast`.

        Raises:
            RuntimeError: within another one; and ``optimizer.step()`` raises it within.

        >>> model = nn.Linear(1, 1)
        >>> koop = koopt.attach(torch.optim.SGD(model.parameters(), lr=0.1), model)
        >>> with koop.forecast_weights():
        ...     validated = model(torch.ones(1, 1))
        """
        weights = self._forecast(steps)
        with self._holding("forecast_weights()"), buffers_kept(self._model):
            self._write(weights)
            yield

    def jump(self) -> Jump:
        """Try to jump now, from the recent steps that are recorded; counted in the budget, but not bound by it.

        Returns:
            What came of it, which is also the last of `jumps`.

        Raises:
            ValueError: in mode "forecast", or if the first loss of the guard is not finite.
            TypeError: if the guard does not return a loss.

        >>> model = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> koopt.attach(optimizer, model, guard=lambda: model.weight.square().sum(), mode="jump").jump().reason
        'too few snapshots: 0 recent steps are recorded, 6 are needed'
        """
        return self._jump(MOST)

    def on_jump(self, callback: Callable[[Jump], object]) -> None:
        """Call `callback` with the :class:`koopt.Jump` after each attempt, refused ones too: see its `accepted`.

        >>> model = nn.Linear(1, 1)
        >>> koop = koopt.attach(torch.optim.SGD(model.parameters(), lr=0.1), model)
        >>> koop.on_jump(print)
        """
        if not callable(callback):
            raise TypeError(f"callback is {type(callback).__name__}, expected a function of one Jump")
        self._callbacks.append(callback)

    def report(self, path: str | PathLike[str] | None = None) -> Any:
        """A figure of the guard's loss and the jumps.

        Args:
            path: where to write it as PNG; None: nowhere.

        Returns:
            The matplotlib figure.
        """
        from koopt import plot

        return plot.report_of_jumps(self.jumps, path)

    def detach(self) -> None:
        """Take the hooks off the optimizer; the weights stay as they are. Again is no error.

        >>> model = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> koopt.attach(optimizer, model).detach()
        >>> again = koopt.attach(optimizer, model)
        """
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            _attached.discard(self._optimizer)
        self._hooks = []

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit for bit: tensors, numbers and text, loadable with ``weights_only``.

        >>> model = nn.Linear(1, 1)
        >>> koop = koopt.attach(torch.optim.SGD(model.parameters(), lr=0.1), model)
        >>> koop.load_state_dict(koop.state_dict())
        """
        state: dict[str, Any] = {"settings": self._compared(), "steps": self.steps, "sound": self._sound}
        state |= {name: getattr(self._schedule, name) for name in SCHEDULED}
        state |= {name: part.state_dict() for name, part in self._parts().items()}
        return state | {"choice": self._choice.state_dict(), "jumps": resuming.as_text(self.jumps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`; refused, with nothing changed, if it belongs to another setting or model.

        Args:
            state: as :meth:`state_dict` returned it; tensors may be on another device.

        Raises:
            ValueError: naming the setting that differs, or what is missing or malformed.
        """
        resuming.require_fits(state, self.state_dict())
        jumps = resuming.from_text(state["jumps"])
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self._choice.load_state_dict(state["choice"])
        for name in SCHEDULED:
            setattr(self._schedule, name, state[name])
        self.steps, self._sound, self.jumps = state["steps"], state["sound"], jumps

    def _compared(self) -> dict[str, Any]:
        """What has to be the same in a resumed run."""
        settings = self._settings
        own = {"mode": settings.mode, "window": settings.window, "tail": settings.tail, "dtype": str(settings.dtype)}
        shapes = {name: list(parameter.shape) for name, parameter in self._named.items()}
        return own | {"combine": settings.momentum == "combine", "shapes": shapes}

    def _parts(self) -> dict[str, Snapshots | BlockMeans]:
        parts = {"snapshots": self._tail, "momenta": self._momenta, "means": self._means}
        return {name: part for name, part in parts.items() if part is not None}

    def _into(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return state | {KEY: self.state_dict()}

    def _out_of(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        if KEY in state:
            self.load_state_dict(state[KEY])
        return {name: value for name, value in state.items() if name != KEY}

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._held is not None:
            raise RuntimeError(
                f"optimizer.step() within {self._held}: the weights are not the trained ones there; step outside of it"
            )

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if _skipped(optimizer):
            return
        self.steps += 1
        if self._means is not None:
            self._means.add(self._parameters)
        if self._tail is None:
            return
        if self._schedule.due - self.steps < self._settings.tail:
            self._tail.add(self._parameters)
            if self._momenta is not None:
                self._momenta.add(moments.recorded(optimizer, self._parameters))
        if self.steps >= self._schedule.due:
            self._jump(self._schedule.allowed(self.steps))

    def _jump(self, allowed: int) -> Jump:
        self._require_free()
        if self._tail is None:
            raise ValueError('jump: mode is "forecast"; attach with a guard and mode "auto" or "jump"')
        started, used = time.perf_counter(), self._schedule.evaluations
        self._schedule.start(self.steps)
        snapshots = self._tail.ordered()
        try:
            found = self._attempt(snapshots, allowed)
            if found.weights is not None:
                self._move(found)
                self._schedule.succeed(self.steps)
                if self._means is not None:
                    self._means.clear()  # an average across a jump is of no use
        finally:
            for part in (self._tail, self._momenta):
                if part is not None:
                    part.clear()
        candidate = found.candidate
        jump = Jump(
            step=self.steps,
            forecaster=None if candidate is None else candidate.method,
            rank=None if candidate is None else candidate.rank,
            horizon=None if candidate is None else candidate.horizon * (len(snapshots) - 1),
            before=found.before,
            after=found.after,
            accepted=found.weights is not None,
            reason=found.reason,
            evaluations=self._schedule.evaluations - used,
            seconds=time.perf_counter() - started,
        )
        self.jumps.append(jump)
        log.log(logging.INFO if jump.accepted else logging.DEBUG, "%s", jump)
        for callback in self._callbacks:
            callback(jump)
        return jump

    def _attempt(self, snapshots: Tensor, allowed: int) -> Found:
        if len(snapshots) < FEWEST:
            return Found(f"too few snapshots: {len(snapshots)} recent steps are recorded, {FEWEST} are needed")
        if allowed < 2:
            return Found(f"budget: max_overhead={self._settings.max_overhead:g} allows no candidate yet")
        if self._settings.mode == "auto":
            rough = roughness(snapshots)
            if rough > NOISE:
                return Found(f"noise: one step ahead a forecast misses {rough:.2g} of an increment")
        proposer = Proposer(snapshots)
        if not bool(proposer.path.isfinite().all()):
            return Found("the recorded weights hold NaN or Inf")
        with self._holding("a jump's guard") as saved:
            before = self._measure(saved)
            if not math.isfinite(before):
                if not self._sound:
                    raise ValueError(f"guard returned {before} at the weights as they are, expected a finite loss")
                return Found(f"the guard is {before} at the weights as they are")
            self._sound = True
            return search(proposer, self._choice, saved, before, allowed - 1, self._measure)

    def _move(self, found: Found) -> None:
        assert found.weights is not None
        assert found.before is not None
        assert found.after is not None
        assert found.coefficients is not None
        self._write(found.weights)
        policy, optimizer, parameters = self._settings.momentum, self._optimizer, self._parameters
        if policy == "reset":
            moments.scale(optimizer, parameters, 0.0)
        elif policy == "scale":  # as gradients shrink near a minimum, where the loss is their square
            ratio = found.after / found.before if found.before > 0 else 0.0
            moments.scale(optimizer, parameters, math.sqrt(max(ratio, 0.0)))
        elif self._momenta is not None:
            moments.combine(optimizer, parameters, self._momenta.ordered(), found.coefficients)
        moments.restart_curvature(optimizer)

    def _forecast(self, steps: float | None) -> list[Tensor]:
        self._require_free()
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, Real)):
            raise TypeError(f"steps is {steps!r}, expected a number of optimizer steps, or None")
        if steps is not None and not 0 <= steps < math.inf:
            raise ValueError(f"steps is {steps}, expected optimizer steps >= 0, finite")
        now = dict(self._model.named_parameters())
        for name, parameter in self._named.items():
            if now.get(name) is not parameter:
                raise ValueError(f"model: {name!r} was replaced after attach(); detach(), and attach again")
        window = self._tail if self._means is None else self._means
        assert window is not None
        with self._holding("a forecast's guard") as saved:
            if steps is None and self._guard is not None:
                return evaluating.by_guard(window, saved, self._loss_at)
            return evaluating.by_rule(window, steps, saved)

    def _measure(self, weights: Sequence[Tensor]) -> float:
        """The guard's loss at weights, counted."""
        self._schedule.evaluations += 1
        return self._loss_at(weights)

    def _loss_at(self, weights: Sequence[Tensor]) -> float:
        assert self._guard is not None
        self._write(weights)
        return measure(self._guard, self._model)

    @contextlib.contextmanager
    def _holding(self, who: str) -> Iterator[list[Tensor]]:
        """The weights may be changed within; whatever happens, they are put back."""
        saved = [parameter.detach().clone() for parameter in self._parameters]
        self._held = who
        try:
            yield saved
        finally:
            self._write(saved)
            self._held = None

    @torch.no_grad()
    def _write(self, weights: Sequence[Tensor]) -> None:
        # one call, which Ctrl-C cannot cut in two
        torch._foreach_copy_(self._parameters, list(weights))  # pyright: ignore[reportPrivateImportUsage]

    def _require_free(self) -> None:
        if self._held is not None:
            raise RuntimeError(f"the weights are held by {self._held}, and not the trained ones there; leave it first")


def _skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step that was just called moved nothing by design."""
    found = getattr(optimizer, "found_inf", None)  # a fused optimizer skips inside, under GradScaler
    if found is not None and bool(found):
        return True
    # torch.distributed.checkpoint takes one such step to create the optimizer's state
    rates = [group.get("lr") for group in optimizer.param_groups]
    return all(not (isinstance(lr, torch.Tensor) and lr.device.type != "cpu") and lr == 0 for lr in rates)
