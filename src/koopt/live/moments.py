"""What becomes of an optimizer's moments, averages of gradients and of their squares, when the weights are moved."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from koopt.live.candidates import displaced, moved
from koopt.live.skipping import frozen, groups_of
from koopt.live.window import Snapshots, flattened
from koopt.sharding import local

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor

    from koopt.exchange import Ranks
    from koopt.live.jumps import Found
    from koopt.live.settings import Settings

POLICIES = ("keep", "reset", "scale", "combine")
SECOND_POLICIES = ("age", "keep")
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")  # as torch.optim names them
LARGEST = 1e4  # factor on second moments: what was forgotten for longer is beyond recall


class Second(NamedTuple):
    """An average of squared gradients, its decay a step, and of how many steps its bias is corrected."""

    value: Tensor
    decay: float
    taken: float


class Moments:
    """An optimizer's moments over the recorded steps, which follow the weights when these are moved.

    Args:
        optimizer: whose moments they are.
        parameters: that are recorded, in the order of the columns.
        settings: what is to become of them.
        ranks: the processes that hold the other columns.

    >>> from koopt.live.settings import Settings
    >>> place = torch.float32, torch.device("cpu")
    >>> settings = Settings("jump", 56, 100, 60, "combine", "keep", 0.06, *place, 0, 0, False)
    >>> parameter = nn.Parameter(torch.ones(2))
    >>> Moments(torch.optim.SGD([parameter], lr=0.1), [parameter], settings, None).parts.keys()
    dict_keys(['momenta'])
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[Tensor],
        settings: Settings,
        ranks: Ranks | None,
    ) -> None:
        self._optimizer, self._parameters, self._ranks = optimizer, list(parameters), ranks
        self._policy, self._most = settings.momentum, settings.cycle
        self._ages = settings.second_moments == "age"
        held = [local(parameter) for parameter in parameters]
        combine = settings.momentum == "combine"
        place = (settings.dtype, settings.device)
        self._first = Snapshots(held, settings.rows, *place) if combine else None

    @property
    def parts(self) -> dict[str, Snapshots]:
        return {} if self._first is None else {"momenta": self._first}

    def record(self) -> None:
        """One more of the steps that a jump is made from."""
        if self._first is not None:
            self._first.add(_or_zeros(first_moments(self._optimizer, self._parameters), self._parameters))

    def clear(self, block: int) -> None:
        """Begin anew, with means of so many steps."""
        if self._first is not None:
            self._first.clear(block)

    def follow(self, found: Found, steps: Sequence[int] | None) -> None:
        """The weights were moved.

        Args:
            found: where to.
            steps: those of the recorded ones that it was made from; None: a step along secants.
        """
        assert found.before is not None
        assert found.after is not None
        if self._policy == "reset":
            scale(self._optimizer, self._parameters, 0.0)
        elif self._policy == "scale":  # as gradients shrink near a minimum, where the loss is their square
            ratio = found.after / found.before if found.before > 0 else 0.0
            scale(self._optimizer, self._parameters, math.sqrt(max(ratio, 0.0)))
        elif self._first is not None and found.coefficients is not None and steps is not None:
            recorded = self._first.ordered()[list(steps)]
            combine(self._optimizer, self._parameters, recorded, found.coefficients, self._ranks)
        if self._ages and found.ahead:
            still = frozen(self._optimizer, self._parameters)  # else it would be done again and again, and never undone
            trained = [parameter for parameter, stays in zip(self._parameters, still, strict=True) if not stays]
            age(self._optimizer, trained, min(found.ahead, self._most))
        restart_curvature(self._optimizer)

    def recall(self, steps: int) -> None:
        """So many optimizer steps were given up: no momentum is left, and none of the caution of before is lost."""
        scale(self._optimizer, self._parameters, 0.0)
        recall(self._optimizer, self._parameters, steps)


def first_moments(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The momentum of each parameter; None where there is none.

    >>> model = nn.Linear(1, 1)
    >>> first_moments(torch.optim.SGD(model.parameters(), lr=0.1), list(model.parameters()))
    [None, None]
    """
    found: list[Tensor | None] = []
    for parameter in parameters:
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        moments = (state.get(name) for name in FIRST_MOMENTS)
        found.append(next((local(moment) for moment in moments if isinstance(moment, torch.Tensor)), None))
    return found


def second_moments(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> list[Second]:
    """The averages of squared gradients that Adam and its kin hold.

    Not the largest of those averages (AMSGrad), none that is quantized, and none whose bias is not corrected.

    >>> parameter = nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.Adam([parameter])
    >>> parameter.sum().backward(), optimizer.step()
    (None, None)
    >>> second_moments(optimizer, [parameter])
    [Second(value=tensor([0.0010]), decay=0.999, taken=1.0)]
    """
    groups = groups_of(optimizer)
    found: list[Second] = []
    for parameter in parameters:
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        group: dict[str, Any] = groups.get(parameter, {})
        held, taken, betas = state.get("exp_avg_sq"), state.get("step", group.get("step")), group.get("betas", ())
        if not isinstance(held, torch.Tensor) or taken is None or len(betas) != 2:
            continue
        value, corrects = local(held), group.get("bias_correction", True) and not group.get("amsgrad")
        if corrects and type(value) is torch.Tensor and value.shape == local(parameter).shape:
            found.append(Second(value, float(betas[1]), float(taken)))
    return found


def corrected(decay: float, taken: float, ahead: float) -> float:
    """What an average of squared gradients is multiplied by to be corrected for more steps than were taken.

    Adam divides it by ``1 - decay**taken``, since it began at zero. So the first gradients, often the largest, weigh as
    much as any until some ``1 / (1 - decay)`` steps are taken.

    Args:
        decay: of the average, between 0 and 1.
        taken: steps since it was zero, >= 1.
        ahead: how many steps more, >= 0.

    >>> corrected(0.5, taken=1, ahead=1)
    0.6666666666666666
    """
    return (1 - decay**taken) / (1 - decay ** (taken + ahead))


@torch.no_grad()
def age(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], ahead: float) -> None:
    """Correct second moments for so many more steps; else weights moved ahead go on at the step length of before."""
    for value, decay, taken in second_moments(optimizer, parameters):
        if 0 < decay < 1 <= taken:
            value.mul_(corrected(decay, taken, ahead))


@torch.no_grad()
def recall(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], steps: int) -> None:
    """Let second moments weigh what was seen so many steps ago as they did then, and what was seen since beside it.

    Along steps of another kind gradients shrink fast. An optimizer that has forgotten those of before takes steps that
    the curvature does not bear.

    >>> parameter = nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.Adam([parameter])
    >>> for gradient in (1.0, 0.0, 0.0):
    ...     parameter.grad = torch.tensor([gradient])
    ...     optimizer.step()
    >>> recall(optimizer, [parameter], steps=2)
    >>> corrected = optimizer.state[parameter]["exp_avg_sq"] / (1 - 0.999**3)
    >>> bool(torch.isclose(corrected, torch.ones(1)))
    True
    """
    for value, decay, taken in second_moments(optimizer, parameters):
        before = taken - steps
        if 0 < decay < 1 and before >= 1:
            value.mul_(_undone(decay, steps) / corrected(decay, before, steps))
    groups = groups_of(optimizer)
    for parameter in parameters:  # RMSprop corrects no bias
        held, decay = optimizer.state.get(parameter, {}).get("square_avg"), groups.get(parameter, {}).get("alpha", 0.0)
        if isinstance(held, torch.Tensor) and 0 < decay < 1:
            local(held).mul_(_undone(decay, steps))


def _undone(decay: float, steps: int) -> float:
    """What undoes so many steps of decay, as far as that can be."""
    return math.exp(min(-steps * math.log(decay), math.log(LARGEST)))


@torch.no_grad()
def scale(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], factor: float) -> None:
    """Multiply all momentum by a factor, 0 to start anew."""
    for moment in first_moments(optimizer, parameters):
        if moment is not None:
            moment.zero_() if factor == 0 else moment.mul_(factor)


def restart_curvature(optimizer: torch.optim.Optimizer) -> None:
    """L-BFGS compares gradients of successive points, and across a jump that means nothing: it starts anew."""
    for state in optimizer.state.values():
        if isinstance(state, dict) and "prev_flat_grad" in state:
            state["n_iter"] = 0


@torch.no_grad()
def combine(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    snapshots: Float[Tensor, "time state"],
    coefficients: Float[Tensor, " time"],
    ranks: Ranks | None = None,
) -> None:
    """Give momentum the coefficients of the weights.

    Args:
        optimizer: whose momentum is changed.
        parameters: in the order of the columns.
        snapshots: `(time, state)`, the recorded momentum, zero where none is; overwritten.
        coefficients: `(time,)`, those of the jump.
        ranks: the processes that hold the other columns.
    """
    held = first_moments(optimizer, parameters)
    now = _or_zeros(held, parameters)
    values = moved(now, displaced(snapshots, flattened(now, snapshots)), coefficients, ranks)
    if values is None:
        return
    for moment, value in zip(held, values, strict=True):
        if moment is not None:
            moment.copy_(value)


def _or_zeros(moments: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor]:
    pairs = zip(moments, parameters, strict=True)
    return [torch.zeros_like(local(parameter)) if moment is None else moment for moment, parameter in pairs]
