"""The handle on a live run: its hooks, its forecasts, its state."""

from __future__ import annotations

import contextlib
import logging
import math
from numbers import Real
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakSet

import torch

from koopt import distributed, sharding
from koopt.live import evaluating, records, resuming
from koopt.live.attempts import Attempts
from koopt.live.budget import MEAN
from koopt.live.eigenbases import EVERY, Eigenbases
from koopt.live.examples import STEP, Examples
from koopt.live.judging import Judge
from koopt.live.skipping import skipped
from koopt.live.weights import Weights
from koopt.live.window import BlockMeans, Snapshots
from koopt.memory import free_memory
from koopt.partitions import bare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from os import PathLike

    from torch import Tensor, nn

    from koopt.exchange import Ranks
    from koopt.live.jumps import Jump
    from koopt.live.secants import Secants
    from koopt.live.settings import Settings

KEY = "koopt"  # in the optimizer's own state dict, where asked for
log = logging.getLogger("koopt")
_attached: WeakSet[torch.optim.Optimizer] = WeakSet()


def is_attached(optimizer: torch.optim.Optimizer) -> bool:
    return optimizer in _attached


class Live:
    """What :func:`koopt.attach` returns; all of koopt's state is in it, and none in the optimizer.

    Attributes:
        steps: optimizer steps recorded.

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
        self._means = BlockMeans(recorded, settings.window, *place) if settings.means else None
        jumping = (optimizer, model, self._weights, self._judge, self._means, settings, ranks)
        self._attempts = Attempts(*jumping) if settings.snapshots else None
        self._bases = Eigenbases(optimizer, named, settings.precondition) if settings.precondition else None
        self._examples: Examples | None = None
        if self._bases is not None and not settings.at_once:
            self._examples = Examples(model, {name: named[name] for name in self._bases.examples})
        self._taste = evaluating.Taste()
        self._loading: tuple[Mapping[str, Any], list[Jump]] | None = None  # what waits for the optimizer's own part
        self.steps = 0
        untraced: Any = torch.compiler.disable  # in a compiled step they would be traced anew as their counters change
        self._hooks = [stepping.register_step_post_hook(untraced(self._after))]
        if settings.history or settings.looks:
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
    def jumps(self) -> list[Jump]:
        """A :class:`koopt.Jump` for each attempt, the oldest first.

        >>> model = nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> koop = koopt.attach(optimizer, model, guard=lambda: 1.0, cycle=10, max_overhead=1.0)
        >>> for _ in range(10):
        ...     model.weight.grad = torch.ones(1, 1)
        ...     optimizer.step()
        >>> koop.jumps[0].step, koop.jumps[0].accepted
        (10, False)
        """
        return [] if self._attempts is None else self._attempts.jumps

    @property
    def preconditioned(self) -> int:
        """How many steps so far were made in the eigenbases of gradients; see `precondition` of :func:`koopt.attach`.

        >>> model = nn.Linear(2, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> koop = koopt.attach(optimizer, model, precondition=256)
        >>> for _ in range(20):
        ...     model(torch.ones(8, 2)).square().sum().backward()
        ...     optimizer.step()
        >>> koop.preconditioned
        11
        """
        return 0 if self._bases is None else self._bases.steps

    @property
    def nbytes(self) -> int:
        """The memory held between steps, taken at the start; an attempt takes about three copies more.

        Where many examples go through a weight, its bases may take more from the second step on.

        >>> model = nn.Linear(1, 1)
        >>> koopt.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, window=10).nbytes  # and an open block
        88
        """
        bases = 0 if self._bases is None else self._bases.nbytes
        return bases + sum(part.nbytes for part in self._parts().values())

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
        if self._attempts is None:
            raise ValueError('jump: mode is "forecast"; attach with a guard and mode "auto" or "jump"')
        return self._attempts.now(self.steps)

    def on_jump(self, callback: Callable[[Jump], object]) -> None:
        """Call `callback` with the :class:`koopt.Jump` after each attempt, refused ones too: see its `accepted`.

        >>> model = nn.Linear(1, 1)
        >>> koop = koopt.attach(torch.optim.SGD(model.parameters(), lr=0.1), model)
        >>> koop.on_jump(print)
        """
        if not callable(callback):
            raise TypeError(f"callback is {type(callback).__name__}, expected a function of one Jump")
        if self._attempts is not None:
            self._attempts.callbacks.append(callback)

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
        """Take the hooks off the optimizer and the parameters; the weights stay as they are. Again is no error.

        >>> model = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> koopt.attach(optimizer, model).detach()
        >>> again = koopt.attach(optimizer, model)
        """
        for hook in self._hooks:
            hook.remove()
        if self._attempts is not None:
            self._attempts.detach()
        if self._examples is not None:
            self._examples.end()
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
        self._taste.load_state_dict(state["taste"])
        if self._attempts is not None:
            self._attempts.load_state_dict(state["attempts"], jumps, state["steps"])
        if self._bases is not None:
            given = self._bases_of(state)
            self._bases.clear() if given is None else self._bases.load_state_dict(given)
            if self._examples is not None and any(self._bases.examples.values()):
                self._examples.end()
                self._examples = None
        self.steps, self._judge.sound = state["steps"], state["sound"]

    def _require_fits(self, state: Mapping[str, Any]) -> list[Jump]:
        """Refuse a state that is not of such a run; returns its jumps."""
        recorded = {name: resuming.without_values(part.state_dict()) for name, part in self._parts().items()}
        own = self._with_recorded(recorded) | {"jumps": ""}
        given = self._bases_of(state)
        if given is not None and self._bases is not None:
            own["bases"] = self._bases.like(given)
        elif not self._settings.at_once:  # as of weights that are sharded
            state, own = ({name: one for name, one in each.items() if name != "bases"} for each in (state, own))
        resuming.require_fits(state, own)
        return records.from_text(state["jumps"])

    def _bases_of(self, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Those of a state, unless they are of other weights: sharded ones have none."""
        given = state.get("bases")
        examples = given.get("examples") if isinstance(given, dict) else None
        others = self._bases is None or (isinstance(examples, dict) and examples.keys() != self._bases.examples.keys())
        return None if others else given

    def _with_recorded(self, recorded: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The state but for the jumps, with this for what is recorded."""
        settings = resuming.compared(self._settings, self._weights.named)
        state: dict[str, Any] = {"settings": settings, "steps": self.steps, "sound": self._judge.sound}
        state["taste"] = self._taste.state_dict()
        if self._attempts is not None:
            state["attempts"] = self._attempts.state_dict()
        if self._bases is not None:
            whole = self._settings.at_once or self._bases.seen
            if whole or any(self._bases.examples.values()):  # else a distributed checkpoint would have to have them
                state["bases"] = self._bases.state_dict(whole)
        return state | {name: self._weights.named_state(part) for name, part in recorded.items()}

    def _parts(self) -> dict[str, Snapshots | BlockMeans | Secants]:
        averages = {} if self._means is None else {"means": self._means}
        return averages | ({} if self._attempts is None else self._attempts.parts)

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
        if self._attempts is not None:
            self._attempts.before(self.steps + 1)

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if skipped(optimizer):
            if self._examples is not None:
                self._examples.restart()
            return
        self.steps += 1
        if self._examples is not None:
            self._count(self._examples)
        attempts, means = self._attempts, self._means
        if self._bases is not None:
            self._precondition(self._bases)
        # while jumps are accepted an average would be cleared by the next one
        paused = attempts is not None and attempts.jumps and attempts.jumps[-1].accepted
        if means is not None and not paused and means.is_due():
            means.take(self._weights.values)
            if attempts is not None:
                attempts.schedule.spent += MEAN
        if attempts is not None:
            attempts.after(self.steps)

    def _count(self, examples: Examples) -> None:
        """A step was taken, and says how many examples there are in one, unless others may have gone before."""
        assert self._bases is not None
        if self.steps < STEP:
            examples.restart()
            return
        examples.end()
        self._examples = None
        counts = dict(zip(examples.counts, distributed.least(list(examples.counts.values()), self._ranks), strict=True))
        free = free_memory(self._weights.parameters[0].device)
        more = self._bases.needed(counts) - self._bases.nbytes
        if distributed.everywhere(free is None or more <= free, self._ranks):
            self._bases.pass_through(counts)
        else:
            log.warning("bases of longer sides need %.3g GiB more, which are not free: there are none", more / 2**30)

    def _precondition(self, bases: Eigenbases) -> None:
        """The move that was just made, where it is to be made in the eigenbases of gradients."""
        attempts = self._attempts
        along = attempts is not None and attempts.along_secants  # which gives it up anyway
        if not along and (self._settings.at_once or (attempts is not None and attempts.noisy)):
            bases.replace(jumped=attempts is not None and bool(attempts.jumps) and attempts.jumps[-1].accepted)
            if self.steps % EVERY == 0:
                distributed.settle(self._weights.named.values(), self._ranks)
        else:
            bases.clear()

    def _forecast(self, steps: float | None) -> list[Tensor]:
        self._weights.require_free()
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, Real)):
            raise TypeError(f"steps is {steps!r}, expected a number of optimizer steps, or None")
        if steps is not None and not 0 <= steps < math.inf:
            raise ValueError(f"steps is {steps}, expected optimizer steps >= 0, finite")
        self._weights.require_in(bare(self._model))
        window = self._means
        if window is None:
            assert self._attempts is not None
            window = self._attempts.tail
        with self._judge.sitting("a forecast's guard") as saved:
            if steps is None and self._judge.guard is not None:
                return evaluating.by_guard(window, saved, self._judge.loss, self._taste, self.steps, self._ranks)
            return evaluating.by_rule(window, steps, saved, self._ranks)
