"""Which weights are better: the guard's loss at some in place of the trained ones, which are put back afterwards."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from typing import TYPE_CHECKING, Any

import torch

from koopt import distributed
from koopt.live.candidates import finite
from koopt.live.guard import Surroundings, buffers_kept, measure, undisturbed
from koopt.live.jumps import Found
from koopt.live.refreshing import refreshed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from koopt.exchange import Ranks
    from koopt.live.weights import Weights

UNDEFINED = (  # as where a covariance is not positive definite
    ArithmeticError,
    ValueError,
    torch.linalg.LinAlgError,  # pyright: ignore[reportPrivateImportUsage], as it is documented
)
log = logging.getLogger("koopt")


class Judge:
    """The guard of a live run, called under the same surroundings throughout an attempt, with one answer for all ranks.

    Attributes:
        guard: the user's loss; None where there is none.
        refresh: renews buffers at the weights in the model; None where there is none.
        sound: whether the guard has ever been finite.
        evaluations: how often it was called since this was last set to 0.

    Args:
        optimizer: refuses to step while other weights are in the model.
        model: in which they are.
        weights: the trained ones.
        ranks: the processes that hold other parts of them.

    >>> model = nn.Linear(1, 1)
    >>> from koopt.live.weights import Weights
    >>> weights, optimizer = Weights(dict(model.named_parameters())), torch.optim.SGD(model.parameters(), lr=0.1)
    >>> judge = Judge(optimizer, model, weights, lambda: model.weight.square().sum(), None, None)
    >>> with judge.sitting("an example"):
    ...     judge.loss([torch.full((1, 1), 3.0), torch.zeros(1)])
    9.0
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        weights: Weights,
        guard: Callable[[], object] | None,
        refresh: Callable[[], object] | None,
        ranks: Ranks | None,
    ) -> None:
        self.guard, self.refresh = guard, refresh
        self.sound, self.evaluations = False, 0
        self._optimizer, self._model, self._weights, self._ranks = optimizer, model, weights, ranks
        self._surroundings: Surroundings | None = None

    @contextlib.contextmanager
    def holding(self, who: str) -> Iterator[list[Tensor]]:
        """Other weights may be in the model within, and the optimizer refuses to step; yields the trained ones."""
        # only here, since each hook costs something at each step
        refusing = self._optimizer.register_step_pre_hook(self._refuse)
        try:
            with self._weights.holding(who) as saved:
                yield saved
        finally:
            refusing.remove()

    @contextlib.contextmanager
    def sitting(self, who: str) -> Iterator[list[Tensor]]:
        """The same, and the guard has the same surroundings at each call within, which are looked at once."""
        with self.holding(who) as saved:
            self._surroundings = Surroundings.of(self._model)
            try:
                yield saved
            finally:
                self._surroundings = None

    def loss(self, weights: Sequence[Tensor]) -> float:
        """The guard's loss at weights, left in the model; infinite where it is not defined, once it was finite."""
        self.evaluations += 1
        self._weights.write(weights)
        loss = distributed.mean_of(self._measured, self._ranks, "guard")
        self.sound = self.sound or math.isfinite(loss)
        return loss

    def _measured(self) -> float:
        assert self.guard is not None
        try:
            return measure(self.guard, self._model, self._surroundings)
        except UNDEFINED as error:
            if not self.sound:
                raise
            log.info("the guard is not defined at a candidate: %s: %.200s", type(error).__name__, error)
            return math.inf

    def best(
        self, searching: Callable[[Sequence[Tensor], float], Found], before: float | None = None
    ) -> tuple[Found, Mapping[str, Tensor]]:
        """What a search finds and is still better with its buffers renewed, and these; the weights are as before.

        Args:
            searching: given the weights as they are and the loss to be lowered.
            before: that loss; None: the guard's at the weights as they are.

        Raises:
            ValueError: if the first loss of all is not finite.
        """
        with self.sitting("a jump's guard") as saved:
            before = self.loss(saved) if before is None else before
            if not math.isfinite(before):
                if not self.sound:
                    raise ValueError(f"guard returned {before} at the weights as they are, expected a finite loss")
                return Found(f"the guard is {before} at the weights as they are"), {}
            found = searching(saved, before)
            if found.weights is None or self.refresh is None:
                return found, {}
            self._weights.write(found.weights)
            with buffers_kept(self._model):
                renew = functools.partial(refreshed, self.refresh, self._model)
                buffers = distributed.together(renew, self._ranks, "refresh")
                after = self.loss(found.weights)
        found = found._replace(after=after)
        if finite(after) < before:
            return found, buffers
        return found._replace(weights=None, reason="with its buffers refreshed the best candidate was not better"), {}

    @contextlib.contextmanager
    def shown(self, weights: Sequence[Tensor], who: str) -> Iterator[None]:
        """Weights are in the model within, with the buffers that `refresh` makes; afterwards all is as it was."""
        with self.holding(who), buffers_kept(self._model):
            self._weights.write(weights)
            if self.refresh is not None:
                with undisturbed(self._model):
                    distributed.together(self.refresh, self._ranks, "refresh")
            yield

    def _refuse(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        raise RuntimeError(
            f"optimizer.step() within {self._weights.holder}: the weights are not the trained ones there; "
            "step outside of it"
        )
