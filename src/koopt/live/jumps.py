"""Jumps in a live run: which candidate is kept, and the record of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from koopt.live.candidates import FAMILIES, LONGEST, SHORTEST, Candidate, Choice, Proposer, cast, finite, gain, moved

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Float
    from torch import Tensor

    from koopt.exchange import Ranks
    from koopt.live.secants import Step


WORSE = "no candidate was better"


@dataclass(frozen=True)
class Jump:
    """One attempt to move the weights.

    Attributes:
        step: optimizer steps recorded until then, or until the first of several moves.
        forecaster, rank, horizon: of the best candidate, its horizon in optimizer steps (infinite: the fixed point);
            None if none was evaluated. Of "secants" the rank is the number of pairs, and there is no horizon.
        before, after: the guard's loss at the weights as they were and at the best candidate; None if not evaluated.
        accepted: whether the weights were moved; if not, they are bitwise as they were.
        reason: "better", or why they were not moved.
        evaluations: how often the guard was called.
        seconds: measured, the only field that differs from run to run.
        moves: after how many optimizer steps in a row the weights were moved: 0 where they were not, 1 by a jump, more
            by steps along secants that followed one another; `before` is then of the first and `after` of the last.

    >>> jump = Jump(100, "koopman", 4, 38.7, 0.5, 0.4, True, "better", 9, 0.01, 1)
    >>> jump.after < jump.before
    True
    """

    step: int
    forecaster: str | None
    rank: int | None
    horizon: float | None
    before: float | None
    after: float | None
    accepted: bool
    reason: str
    evaluations: int
    seconds: float
    moves: int


class Found(NamedTuple):
    """The best candidate of an attempt; no weights where it is not to be taken."""

    reason: str
    before: float | None = None
    after: float | None = None
    candidate: Candidate | None = None
    coefficients: Tensor | None = None
    weights: list[Tensor] | None = None
    horizon: float | None = None  # in optimizer steps
    ahead: float = 0.0  # optimizer steps that the move stands for
    along: Step | None = None  # the step along secants that it is,
    length: float = 0.0  # or so much of it

    @property
    def expected(self) -> float:
        """The product of the move and of how the gradient is to change by it, as the secants have it."""
        return 0.0 if self.along is None else -(self.length**2) * self.along.slope


def search(
    proposer: Proposer,
    displacements: Float[Tensor, "time state"],
    choice: Choice,
    saved: Sequence[Tensor],
    before: float,
    count: int,
    evaluate: Callable[[Sequence[Tensor]], float],
) -> Found:
    """Evaluate a few candidates and take the best if it is strictly better than the weights as they are.

    Half of the evaluations go to families at the horizons that were best for them; others double or halve the horizon
    of the best ones as long as that lowers the loss.

    Args:
        proposer: over the recorded steps.
        displacements: `(time, state)`, of these steps from the weights as they are.
        choice: says which families to try, and learns from it.
        saved: the weights as they are.
        before: their loss, finite.
        count: how many evaluations may be made.
        evaluate: the loss at other weights.
    """
    best = Found(WORSE, before)
    reached: dict[int, tuple[float, float]] = {}  # family: its lowest loss, and where
    left = count

    def lower(index: int, horizon: float) -> bool:
        """Whether a family does better at this horizon than it did so far; without weights, or at NaN, it does not."""
        nonlocal best, left
        if 0 < horizon < math.inf:
            horizon = max(1, round(horizon * (proposer.time - 1))) / (proposer.time - 1)  # whole steps
        candidate, loss = FAMILIES[index]._replace(horizon=horizon), math.inf
        coefficients = proposer.coefficients(candidate)
        weights = None if coefficients is None else moved(saved, displacements, coefficients, proposer.ranks)
        if weights is not None:
            left -= 1
            loss = finite(evaluate(weights))
            if loss < (math.inf if best.after is None else best.after):
                steps = horizon * (proposer.time - 1) * proposer.every
                best = Found(best.reason, before, loss, candidate, coefficients, weights, steps)
        if index in reached and not loss < reached[index][0]:
            return False
        reached[index] = loss, horizon
        return True

    for index in choice.pick(math.ceil(count / 2)):
        lower(index, choice.horizons[index])
    for index in sorted(reached, key=lambda i: reached[i][0]):
        for factor in (2.0, 0.5):
            start = reached[index][1]
            while left > 0 and SHORTEST <= reached[index][1] * factor <= LONGEST:
                if not lower(index, reached[index][1] * factor):
                    break
            if reached[index][1] != start:
                break
    for index, (loss, horizon) in reached.items():
        choice.learn(index, gain(before, loss), horizon)
    if best.after is None or best.candidate is None or best.coefficients is None or not best.after < before:
        return best._replace(weights=None)
    return best._replace(reason="better", ahead=proposer.ahead(best.candidate, best.coefficients))


SHORT, TOLERANCE = 0.05, 0.15  # so much of a move; by how much of its slope the guard's may be off there
NEAR, STRICTER = 0.005, 0.05  # the same where it is off; noise is as large there, and by chance within 0.15
RESOLVED = 1e-5  # of the loss
SUFFICIENT, SHORTEN = 1e-4, (0.05, 0.5)  # of the slope; of a length, to the next one


def agreement(
    found: Found,
    start: float | None,
    saved: Sequence[Tensor],
    evaluate: Callable[[Sequence[Tensor]], float],
    ranks: Ranks | None = None,
    scale: float = 1.0,
) -> float:
    """The guard's slope along a move, over what gradients say that it is, by three evaluations at most.

    Where both are of the same loss it is about 1: then gradients are not noise. Under mini-batches it is off by as
    much. Where the slope is too small to be told from rounding it is 1 as well. A bend of the loss, as of ReLU, looks
    like noise from afar but not from nearby, so a slope that is off is looked at once more, along a tenth of the way;
    where it is off there too, the farther one from 1 counts.

    Args:
        found: a move along secants, or what would be tried next.
        start: the loss where it starts; None: it is evaluated.
        saved: the weights as they are.
        evaluate: the loss at other weights.
        ranks: the processes that hold the other columns.
        scale: how many times the guard's slope is expected to be that of the gradients.
    """
    step = found.along
    assert step is not None
    if start is None:
        start = loss_along(step, 0.0, saved, evaluate, ranks)[0]
    if not math.isfinite(start):
        return math.inf
    ratios = [1.0]
    for share, tolerance in ((SHORT, TOLERANCE), (NEAR, STRICTER)):
        expected = scale * step.slope * share * found.length
        if -expected <= RESOLVED * abs(start):
            break
        ratios.append((loss_along(step, share * found.length, saved, evaluate, ranks)[0] - start) / expected)
        if abs(ratios[-1] - 1) <= tolerance:
            return ratios[-1]
    return max(ratios, key=lambda ratio: abs(ratio - 1))


def follow(
    step: Step,
    saved: Sequence[Tensor],
    before: float,
    count: int,
    evaluate: Callable[[Sequence[Tensor]], float],
    ranks: Ranks | None = None,
    scale: float = 1.0,
) -> Found:
    """Evaluate a step, as much of it as it may be, then less until the loss falls as it should; the lowest is taken.

    Each next length is where the parabola through the losses has its minimum, between a twentieth and half of the last.

    Args:
        step: from a recent point.
        saved: the weights as they are.
        before: the loss to be lowered, finite.
        count: how many evaluations may be made.
        evaluate: the loss at other weights.
        ranks: the processes that hold the other columns.
        scale: how many times the guard's slope is that of the gradients.

    Source: Nocedal & Wright (2006), algorithm 3.1 and section 3.5.
    """
    best, length, slope = Found(WORSE, before), step.longest, scale * step.slope
    for _ in range(count):
        loss, weights = loss_along(step, length, saved, evaluate, ranks)
        if loss < (before if best.after is None else best.after):
            candidate = Candidate("secants", 1.0, {"rank": step.pairs})
            best = Found("better", before, loss, candidate, None, weights, along=step, length=length)
        if loss <= before + SUFFICIENT * length * slope and best.weights is not None:
            break
        bend = loss - before - slope * length
        lowest = -slope * length**2 / (2 * bend) if 0 < bend < math.inf else 0.0
        length = min(max(lowest, SHORTEN[0] * length), SHORTEN[1] * length)
    return best if best.weights is not None else best._replace(along=step, length=length)


def loss_along(
    step: Step,
    length: float,
    saved: Sequence[Tensor],
    evaluate: Callable[[Sequence[Tensor]], float],
    ranks: Ranks | None,
) -> tuple[float, list[Tensor] | None]:
    """The loss and the weights so much of a step from its origin, shaped as `saved`; infinite where they are not."""
    weights = cast(saved, torch.add(step.origin, step.direction, alpha=length), ranks, add=False)
    return (math.inf, None) if weights is None else (finite(evaluate(weights)), weights)
