"""How gradients were before a loop clipped them."""

from __future__ import annotations

import math
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from koopt.live.secants import values

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

ALIKE = 1e-4  # gradients that differ by no more are the same; or by their rounding
CONSTANT = 0.1  # what changes by no more than this share of what another changes is taken to stay


class Clipping:
    """By how much all gradients were shortened between backward and the optimizer's step.

    `clip_grad_norm_` multiplies them all by one number, so that multiplied back they are those of the loss again. What
    a loop divides all of them by at each step, as after an accumulation or by a GradScaler, is no clipping, and is left
    as it is. So are gradients that backward did not make, or that were changed in another way.

    Args:
        parameters: that may have gradients.

    Attributes:
        divisor: what the loop divides all gradients by, beside clipping; NaN as long as it is not known.

    >>> parameter = nn.Parameter(torch.ones(1))
    >>> clipping = Clipping([parameter])
    >>> clipping.watch(True)
    >>> for factor in (3.0, 30.0):
    ...     parameter.grad = None
    ...     (factor * parameter).sum().backward()
    ...     _ = nn.utils.clip_grad_norm_([parameter], 1.0)
    ...     print(clipping.factor())
    None
    30.0...
    """

    def __init__(self, parameters: Sequence[Any]) -> None:
        self._parameters = list(parameters)
        self._left: dict[int, Tensor] = {}  # gradients as the last backward left them, by place
        self._hooks: list[RemovableHandle] = []
        self._last = (math.nan, math.nan)  # of all gradients: as backward left them, and what they were divided by
        self.divisor = math.nan
        weakref.finalize(self, _remove, self._hooks).atexit = False

    def watch(self, on: bool) -> None:
        """Look at what backward leaves from now on, or no longer."""
        if on == bool(self._hooks):
            return
        _remove(self._hooks)
        self._left.clear()
        for place, parameter in enumerate(self._parameters if on else []):
            if parameter.requires_grad and parameter.is_leaf:
                told = partial(_note, self._left, place)  # and not this, which holds the parameters
                self._hooks.append(parameter.register_post_accumulate_grad_hook(told))

    def end(self) -> None:
        """Never look again."""
        self.watch(False)
        self._parameters = []

    def factor(self) -> float | None:
        """What gradients are to be multiplied by to be as without clipping; None where that cannot be told yet.

        None also where those of before are found to have been multiplied by too much.
        """
        left, given = dict(self._left), [i for i, one in enumerate(self._parameters) if one.grad is not None]
        self._left.clear()
        if not left or not left.keys() <= set(given):
            return 1.0
        after = [values(self._parameters[i]) for i in given]
        before = [left[i] if i in left else torch.zeros_like(own) for i, own in zip(given, after, strict=True)]
        found, wanted = (torch.cat([own.flatten().to(after[0].device) for own in all_of]) for all_of in (after, before))
        now, then = torch.stack([torch.linalg.vector_norm(one) for one in (found, wanted)]).tolist()  # waits once
        if not 0 < min(now, then) <= max(now, then) < math.inf:
            return 1.0
        tolerance = max(ALIKE, *(torch.finfo(self._parameters[i].grad.dtype).eps for i in given))
        alike, factor = partial(math.isclose, rel_tol=tolerance), then / now
        if alike(factor, 1.0):
            return self._clipped(then, 1.0, alike)
        if not torch.linalg.vector_norm(found * factor - wanted).item() <= tolerance * then:
            return 1.0
        return self._clipped(then, factor, alike)

    def _clipped(self, left: float, factor: float, alike: Callable[[float, float], bool]) -> float | None:
        """How much of the factor is clipping: clipped gradients stay as long as they were, divided ones the share."""
        last, share = self._last
        moved = not math.isnan(last) and not alike(left, last)
        if moved or math.isnan(last) or not math.isnan(self.divisor):
            self._last = left, factor
        if not math.isnan(self.divisor):
            if moved and alike(factor, share) and not alike(factor, self.divisor):
                self.divisor = factor
                return None
            return 1.0 if alike(factor, self.divisor) else factor / self.divisor
        if factor == 1.0:
            self.divisor = 1.0
        elif moved:
            changes = [abs(math.log(ratio)) for ratio in (left / last, factor / share, left / last * share / factor)]
            if min(changes[1:]) < CONSTANT * changes[0]:
                self.divisor = factor if changes[1] < changes[2] else 1.0
        return None if math.isnan(self.divisor) else factor / self.divisor

    def state_dict(self) -> dict[str, Any]:
        return {"clipping": torch.tensor([self.divisor, *self._last], dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.divisor, left, share = state["clipping"].tolist()
        self._last = left, share


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()


def _note(left: dict[int, Tensor], place: int, parameter: Tensor) -> None:
    left.pop(place, None)
    if parameter.grad is not None:  # another hook may have used it up
        left[place] = values(parameter).clone()
