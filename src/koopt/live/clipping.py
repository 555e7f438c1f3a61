"""How gradients were before a loop clipped them."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from koopt.sharding import local

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

ALIKE = 1e-4  # lengths that differ by no more are the same
CONSTANT = 0.1  # what changes by no more than this share of what another changes is taken to stay


class Clipping:
    """By how much all gradients were shortened between backward and the optimizer's step.

    `clip_grad_norm_` multiplies them all by one number, so that multiplied back they are those of the loss again. A
    loop that divides them by the same number each time, as a GradScaler or an accumulation does, is not one that clips:
    there they are taken as they are. So are those that backward did not make, or that were changed in another way.

    Args:
        parameters: that may have gradients.

    Attributes:
        restores: whether gradients of the loop are multiplied back; None as long as it is not known.

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
        self._lengths: dict[int, Tensor] = {}  # as the last backward left them, by place
        self._hooks: list[RemovableHandle] = []
        self._last: tuple[float, float] | None = None
        self.restores: bool | None = None

    def watch(self, on: bool) -> None:
        """Look at what backward leaves from now on, or no longer."""
        if on == bool(self._hooks):
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._lengths.clear()
        if not on:
            return
        for place, parameter in enumerate(self._parameters):
            if parameter.requires_grad and parameter.is_leaf:
                told = partial(_note, self._lengths, place)  # and not this, which holds the parameters
                self._hooks.append(parameter.register_post_accumulate_grad_hook(told))

    def factor(self) -> float | None:
        """What gradients are to be multiplied by to be the loss's; None where that cannot be told yet."""
        with_gradient = [place for place, parameter in enumerate(self._parameters) if parameter.grad is not None]
        seen = bool(with_gradient) and sorted(self._lengths) == with_gradient
        if not seen:
            self._lengths.clear()
            return 1.0
        lengths = [self._lengths[place] for place in with_gradient]
        lengths += [_length(self._parameters[place]) for place in with_gradient]
        self._lengths.clear()
        finest = max((length.dtype for length in lengths), key=lambda dtype: dtype.itemsize)
        told = torch.stack([length.to(lengths[0].device, finest) for length in lengths]).tolist()  # waits once
        before, after = told[: len(with_gradient)], told[len(with_gradient) :]
        left, given = math.hypot(*before), math.hypot(*after)
        if not 0 < min(left, given) <= max(left, given) < math.inf:
            return 1.0
        factor = left / given
        same = all(
            math.isclose(a, factor * b, rel_tol=ALIKE, abs_tol=ALIKE * left) for a, b in zip(before, after, strict=True)
        )
        if not same:
            return 1.0
        if math.isclose(factor, 1.0, rel_tol=ALIKE):
            self.restores = self.restores is not False
            return 1.0
        if self.restores is None:
            self._decide(left, given)
        return None if self.restores is None else factor if self.restores else 1.0

    def _decide(self, left: float, given: float) -> None:
        """Clipped gradients stay as long as they were, scaled ones the same share of what they were."""
        if self._last is not None:
            change, length, share = (
                abs(math.log(now / before))
                for now, before in zip(
                    (left, given, left / given), (*self._last, self._last[0] / self._last[1]), strict=True
                )
            )
            if change > ALIKE and min(length, share) < CONSTANT * change:
                self.restores = length < share
        self._last = left, given

    def state_dict(self) -> dict[str, Any]:
        last = self._last or (math.nan, math.nan)
        known = math.nan if self.restores is None else float(self.restores)
        return {"clipping": torch.tensor([known, *last], dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        known, left, given = state["clipping"].tolist()
        self.restores = None if math.isnan(known) else bool(known)
        self._last = None if math.isnan(left) else (left, given)


def _note(lengths: dict[int, Tensor], place: int, parameter: Tensor) -> None:
    lengths[place] = _length(parameter)


def _length(parameter: Any) -> Tensor:
    """Of its gradient, as far as this process holds it."""
    gradient = local(parameter.grad.detach())
    gradient = gradient if gradient.layout is torch.strided else gradient.coalesce().values()
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
