"""The handle on a live run: records after each optimizer step, jumps where it pays, forecasts for evaluation."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from itertools import compress
from numbers import Real
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakSet

import torch

from koopt import distributed, sharding
from koopt.live import evaluating, records, resuming, secants
from koopt.live.budget import ADVANCE, ENOUGH, MEAN, MOST, SNAPSHOT, TRIES, Costs, Schedule
from koopt.live.candidates import FEWEST, NOISE, Choice, Proposer, block_after, displaced, paired, smooth, unpaired
from koopt.live.judging import Judge
from koopt.live.jumps import TOLERANCE, Found, disagreement, follow, search
from koopt.live.moments import Moments
from koopt.live.preconditioning import by_matrices
from koopt.live.refreshing import write_buffers
from koopt.live.skipping import frozen, moving, skipped
from koopt.live.weights import Weights
from koopt.live.window import BlockMeans, Snapshots, cut, flattened, nbytes_of
from koopt.partitions import bare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from os import PathLike

    from torch import Tensor, nn

    from koopt.exchange import Ranks
    from koopt.live.jumps import Jump
    from koopt.live.settings import Settings

KEY = "koopt"  # in the optimizer's own state dict, where asked for
ALWAYS = 4  # steps along secants before each of which it is asked whether gradients are noise
PRECONDITIONED = 'preconditioner: the optimizer holds matrices, and jumps do it harm; mode="jump" jumps all the same'
RECORDED = 8  # points before a step along secants, where they are not tried again and again
SCHEDULED = ("due", "wait", "began", "noisy", "spent", "following", "vain", "proven", "tries")
log = logging.getLogger("koopt")
_attached: WeakSet[torch.optim.Optimizer] = WeakSet()


def is_attached(optimizer: torch.optim.Optimizer) -> bool:
    return optimizer in _attached


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
        stepping: torch.optim.Optimizer,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        named: Mapping[str, nn.Parameter],
        guard: Callable[[], object] | None,
        refresh: Callable[[], object] | None,
        settings: Settings,
        with_optimizer: bool,
        ranks: Ranks | None,
    ) -> None:
        self._optimizer, self._model, self._settings = optimizer, model, settings
        self._ranks = ranks
        self._weights = Weights(named, sharding.sharding_modules(model))
        self._judge = Judge(stepping, model, self._weights, guard, refresh, ranks)
        recorded, place = self._weights.parameters, (settings.dtype, settings.device)
        self._tail = Snapshots(recorded, settings.rows, *place) if settings.snapshots else None
        self._moments = Moments(optimizer, list(named.values()), settings, ranks)
        self._means = BlockMeans(recorded, settings.window, *place) if settings.means else None
        self._secants = secants.Secants(recorded, settings.history, *place) if settings.history else None
        whole = list(named.values())  # so that all processes have the same schedule, however many they are
        window = nbytes_of(whole, 0 if self._tail is None else settings.rows, 0, settings.dtype)
        pairs = secants.nbytes_of(whole, settings.history, settings.dtype)
        costs = Costs.of(sum(parameter.nbytes for parameter in whole), window, pairs)
        self._schedule = Schedule(settings.cycle, settings.max_overhead, costs, settings.tail)
        if self._secants is not None:
            self._schedule.follow(0)
        self._block = 1  # steps whose mean is a snapshot, in the next window
        self._choice = Choice()
        self._taste = evaluating.Taste()
        self._callbacks: list[Callable[[Jump], object]] = []
        self._loading: tuple[Mapping[str, Any], list[Jump]] | None = None  # what waits for the optimizer's own part
        self.steps = 0
        self.jumps: list[Jump] = []
        untraced: Any = torch.compiler.disable  # in a compiled step they would be traced anew as their counters change
        self._hooks = [stepping.register_step_post_hook(untraced(self._after))]
        if self._secants is not None:
            self._hooks.append(stepping.register_step_pre_hook(untraced(self._before)))
        if with_optimizer:
            self._hooks.append(optimizer.register_state_dict_post_hook(self._into))
            self._hooks.append(optimizer.register_load_state_dict_pre_hook(self._out_of))
            self._hooks.append(optimizer.register_load_state_dict_post_hook(self._loaded))
        _attached.add(optimizer)

    def __copy__(self) -> NoReturn:
        raise TypeError("a handle cannot be copied: it belongs to one optimizer; attach() to the copy of that instead")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__copy__()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a handle cannot be pickled: it belongs to one optimizer; save its state_dict() instead")

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

        Without a guard a fixed rule: half an average, half a double average. With one, five blends of averages,
        operators and lines are evaluated at each call, and the one that did best so far is taken: six evaluations,
        outside the budget (in mode "jump", which holds no averages, 15 candidates of the last steps). It is never worse
        by the guard than the weights as they are.

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
        found = zip(self._weights.named.items(), self._forecast(steps), strict=True)
        return {name: sharding.as_whole(weights, parameter) for (name, parameter), weights in found}

    @contextlib.contextmanager
    def forecast_weights(self, steps: float | None = None) -> Iterator[None]:
        """The forecast in the model, for validation or export; afterwards weights and buffers are bitwise as before.

        BatchNorm statistics are those of the trained weights, or what the `refresh` of :func:`koopt.attach` makes.

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
        with self._judge.shown(weights, "forecast_weights()"):
            yield

    def jump(self) -> Jump:
        """Try to jump now, from the recent steps that are recorded, or else along the secants.

        It is counted in the budget, but not bound by it.

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
        self._weights.require_free()
        if self._secants is not None and self._secants.pairs and self._tail is not None and not self._tail.taken:
            return self._follow(self._secants)
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

        Raises:
            ImportError: without the extra `experiments`.

        >>> model = nn.Linear(1, 1)
        >>> koop = koopt.attach(torch.optim.SGD(model.parameters(), lr=0.1), model)
        >>> koop.report().axes[0].get_xlabel()
        'optimizer step'
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
        recorded = {name: part.state_dict() for name, part in self._parts().items()}
        return self._with_recorded(recorded) | {"jumps": records.as_text(self.jumps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`; refused, with nothing changed, if it belongs to another setting or model.

        Args:
            state: as :meth:`state_dict` returned it; tensors may be on another device.

        Raises:
            ValueError: naming the setting that differs, or what is missing or malformed.

        >>> model = nn.Linear(1, 1)
        >>> koop = koopt.attach(torch.optim.SGD(model.parameters(), lr=0.1), model)
        >>> other = koopt.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, window=10)
        >>> koop.load_state_dict(other.state_dict())
        Traceback (most recent call last):
        ValueError: state: recorded with window=10, this run has window=56; make them the same
        """
        self._take_over(state, self._require_fits(state))

    def _take_over(self, state: Mapping[str, Any], jumps: list[Jump]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(self._weights.flat_state(state[name]))
        for name, part in self._learners().items():
            part.load_state_dict(state[name])
        for name in SCHEDULED:
            setattr(self._schedule, name, state[name])
        if self._tail is not None:
            self._block = self._tail.block
        self.steps, self._judge.sound, self.jumps = state["steps"], state["sound"], jumps

    def _require_fits(self, state: Mapping[str, Any]) -> list[Jump]:
        """Refuse a state that is not of such a run; returns its jumps."""
        recorded = {name: resuming.without_values(part.state_dict()) for name, part in self._parts().items()}
        resuming.require_fits(state, self._with_recorded(recorded) | {"jumps": ""})
        return records.from_text(state["jumps"])

    def _with_recorded(self, recorded: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The state but for the jumps, with this for what is recorded."""
        settings = resuming.compared(self._settings, self._weights.named)
        state: dict[str, Any] = {"settings": settings, "steps": self.steps, "sound": self._judge.sound}
        state |= {name: getattr(self._schedule, name) for name in SCHEDULED}
        state |= {name: self._weights.named_state(part) for name, part in recorded.items()}
        return state | {name: part.state_dict() for name, part in self._learners().items()}

    def _learners(self) -> dict[str, Any]:
        return {"choice": self._choice, "taste": self._taste}

    def _parts(self) -> dict[str, Snapshots | BlockMeans | secants.Secants]:
        parts = {"snapshots": self._tail, "means": self._means, "secants": self._secants}
        return {name: part for name, part in parts.items() if part is not None} | self._moments.parts

    def _into(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return state | {KEY: self.state_dict()}

    def _out_of(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        self._loading = None
        if KEY in state:
            self._loading = state[KEY], self._require_fits(state[KEY])
        return {name: value for name, value in state.items() if name != KEY}

    def _loaded(self, optimizer: torch.optim.Optimizer) -> None:
        if self._loading is not None:  # not before the optimizer has taken its own
            self._take_over(*self._loading)
            self._loading = None

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._secants is not None and self._at_point(self.steps + 1):
            self._secants.begin(self._weights.values)

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if skipped(optimizer):
            return
        self.steps += 1
        # while jumps are accepted an average would be cleared by the next one
        means = None if self.jumps and self.jumps[-1].accepted else self._means
        if means is not None and means.is_due():
            means.take(self._weights.values)
            self._schedule.spent += MEAN
        if self._secants is not None and self._toward_step(self._secants):
            return
        left = self._schedule.due - self.steps
        if self._tail is not None and left < self._tail.steps:
            self._toward_jump(self._tail, left)

    def _at_point(self, step: int) -> bool:
        """Whether a step is one whose gradient is recorded for the step along secants that is due."""
        left = self._schedule.following - step
        return 0 <= left < RECORDED * secants.EVERY and left % secants.EVERY == 0

    def _toward_step(self, held: secants.Secants) -> bool:
        """Record gradients before the step along secants that is due, and take it; whether the weights were moved."""
        schedule = self._schedule
        if not self._at_point(self.steps):
            return False
        held.end(secants.gradients(list(self._weights.named.values())))
        schedule.spent += 2 * SNAPSHOT
        if self.steps < schedule.following:
            return False
        most = TRIES + 2 * self._doubtful() + (self._judge.refresh is not None)  # evaluations
        if schedule.allowed(self.steps + ADVANCE, schedule.costs.secants) < most:
            schedule.postpone(self.steps)
            return False
        return self._follow(held).accepted

    def _doubtful(self) -> bool:
        """Whether it is asked if gradients are noise: rarer and rarer, as what is smooth seldom turns noisy."""
        tries = self._schedule.tries + 1
        return self._settings.mode == "auto" and (tries <= ALWAYS or tries & (tries - 1) == 0)

    def _toward_jump(self, tail: Snapshots, left: int) -> None:
        """Record the last steps before the attempt that is due in `left`, and make it, as far as the budget allows."""
        schedule, each = self._schedule, SNAPSHOT * self._settings.snapshots / self._settings.rows
        if left == tail.steps - 1 and not schedule.afford(tail.steps * each):
            if not self.jumps or not self.jumps[-1].reason.startswith("budget"):
                why = f"budget: max_overhead={schedule.max_overhead:g} does not allow {ENOUGH} evaluations yet"
                self._tell(records.record(Found(why), self.steps, evaluations=0, seconds=0.0))
            return
        tail.add(self._weights.values)
        self._moments.record()
        schedule.spent += each
        if left <= 0:
            self._jump(schedule.allowed(self.steps))

    def _jump(self, allowed: int) -> Jump:
        """Try the families of candidates on the recorded steps."""
        self._weights.require_free()
        if self._tail is None:
            raise ValueError('jump: mode is "forecast"; attach with a guard and mode "auto" or "jump"')
        self._schedule.start(self.steps)
        snapshots = self._tail.ordered()
        moved = distributed.union(moving(self._optimizer, snapshots), len(snapshots), self._ranks)
        window = snapshots[moved] if len(moved) < len(snapshots) else snapshots
        try:
            jump = self._try(lambda: self._attempt(window, allowed), moved)
        finally:
            self._forget()
        if jump.accepted:
            self._schedule.succeed(self.steps, self._secants is not None)
        return self._tell(jump)

    def _follow(self, held: secants.Secants) -> Jump:
        """Try a step along the secants; what one costs that is better is not counted against the budget."""
        self._weights.require_free()
        schedule, spent = self._schedule, self._schedule.spent
        schedule.in_vain(self.steps)  # until it has proved not to be
        jump = self._try(lambda: self._attempt_along(held))
        if jump.accepted:
            self._forget()
            schedule.spent, schedule.proven = spent, True
            schedule.follow(self.steps)
        return self._tell(jump)

    def _forget(self) -> None:
        """The recorded steps are used, or lie before a jump."""
        if self._tail is not None:
            self._tail.clear(self._block)
        self._moments.clear(self._block)

    def _try(
        self, attempt: Callable[[], tuple[Found, Mapping[str, Tensor]]], moved: Sequence[int] | None = None
    ) -> Jump:
        """Make an attempt, and move the weights if it is to be; the record of it."""
        started, judge, schedule = time.perf_counter(), self._judge, self._schedule
        judge.evaluations = 0
        against = distributed.unlike(self.steps, self._weights.named.values(), self._ranks)
        if not against and self._settings.mode == "auto" and by_matrices(self._optimizer, self._ranks):
            against = PRECONDITIONED
        try:
            found, buffers = (Found(against), {}) if against else attempt()
        finally:
            schedule.spent += judge.evaluations * schedule.costs.candidate
        if found.weights is not None:
            self._move(found, buffers, moved)
            if self._means is not None:
                self._means.clear()  # an average across a jump is of no use
        return records.record(found, self.steps, judge.evaluations, time.perf_counter() - started)

    def _tell(self, jump: Jump) -> Jump:
        """Keep the record of an attempt, and pass it on."""
        self.jumps.append(jump)
        log.log(logging.INFO if jump.accepted else logging.DEBUG, "%s", jump)
        for callback in self._callbacks:
            callback(jump)
        return jump

    def _attempt(self, snapshots: Tensor, allowed: int) -> tuple[Found, Mapping[str, Tensor]]:
        """What is best, and with which buffers, where they were renewed; the weights are as before."""
        if len(snapshots) < FEWEST:
            there, needed = (self._block * rows for rows in (len(snapshots), FEWEST))
            return Found(f"too few snapshots: {there} recent steps are recorded, {needed} are needed"), {}
        own, now = self._weights.parameters, flattened(self._weights.values, snapshots)
        still = frozen(self._optimizer, self._weights.named.values())
        for piece, value in compress(zip(cut(snapshots, own), cut(now, own), strict=True), still):
            piece.copy_(value)
        extra = 1 if self._judge.refresh is None else 2  # evaluations that try no candidate
        if allowed <= extra:
            return Found(f"budget: max_overhead={self._settings.max_overhead:g} allows no candidate yet"), {}
        halvings, rough = smooth(snapshots, self._ranks)
        block, self._block = self._block, min(block_after(self._block, halvings, rough), self._settings.block)
        if rough > NOISE and self._settings.mode == "auto":
            self._schedule.look_again(self.steps)
            return Found(f"noise: one snapshot ahead a forecast misses {rough:.2g} of an increment"), {}
        self._schedule.spent += self._schedule.costs.fit
        recorded, size = len(snapshots), 2**halvings
        for _ in range(halvings):
            snapshots = paired(snapshots)
        proposer = Proposer(snapshots, self._ranks, block * size)
        if not bool(proposer.path.isfinite().all()):
            return Found("the recorded weights hold NaN or Inf"), {}
        displacements, choice, count = displaced(snapshots, now), self._choice, allowed - extra
        del now  # a whole copy of the weights

        def searching(saved: Sequence[Tensor], before: float) -> Found:
            found = search(proposer, displacements, choice, saved, before, count, self._judge.loss)
            if found.coefficients is None:
                return found
            return found._replace(coefficients=unpaired(found.coefficients, size, recorded))

        return self._judge.best(searching)

    def _attempt_along(self, held: secants.Secants) -> tuple[Found, Mapping[str, Tensor]]:
        self._schedule.spent += self._schedule.costs.secants
        step = secants.newton(held, secants.adaptive(self._optimizer, list(self._weights.named.values())), self._ranks)
        if step is None:
            return Found(f"secants: none of {held.pairs} tells of a minimum"), {}
        still = frozen(self._optimizer, self._weights.named.values())
        if any(still):
            step = secants.held_back(step, held.gradient, self._weights.values, still, self._ranks)
        asked = self._doubtful()
        self._schedule.tries += 1

        def searching(saved: Sequence[Tensor], before: float) -> Found:
            if asked:
                off = disagreement(step, saved, self._judge.loss, self._ranks)
                if not off <= TOLERANCE:
                    return Found(f"noise: the guard's slope is off that of the gradients by {off:.2g} of it", before)
            return follow(step, saved, before, TRIES - 1, self._judge.loss, self._ranks)

        return self._judge.best(searching)

    def _move(self, found: Found, buffers: Mapping[str, Tensor], moved: Sequence[int] | None) -> None:
        assert found.weights is not None
        self._weights.write(found.weights)
        write_buffers(self._model, buffers)
        distributed.settle(self._weights.named.values(), self._ranks)
        self._moments.follow(found, moved)

    def _forecast(self, steps: float | None) -> list[Tensor]:
        self._weights.require_free()
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, Real)):
            raise TypeError(f"steps is {steps!r}, expected a number of optimizer steps, or None")
        if steps is not None and not 0 <= steps < math.inf:
            raise ValueError(f"steps is {steps}, expected optimizer steps >= 0, finite")
        self._weights.require_in(bare(self._model))
        window = self._tail if self._means is None else self._means
        assert window is not None
        with self._judge.sitting("a forecast's guard") as saved:
            if steps is None and self._judge.guard is not None:
                return evaluating.by_guard(window, saved, self._judge.loss, self._taste, self.steps, self._ranks)
            return evaluating.by_rule(window, steps, saved, self._ranks)
