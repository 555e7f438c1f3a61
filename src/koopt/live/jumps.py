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


@dataclass(frozen=True)
class Jump:
    """One attempt to move the weights.

    Attributes:
        step: optimizer steps recorded until then.
        forecaster, rank, horizon: of the best candidate, its horizon in optimizer steps (infinite: the fixed point);
            None if none was evaluated. Of "secants" the rank is the number of pairs, and there is no horizon.
        before, after: the guard's loss at the weights as they were and at the best candidate; None if not evaluated.
        accepted: whether the weights were moved; if not, they are bitwise as they were.
        reason: "better", or why they were not moved.
        evaluations: how often the guard was called.
        seconds: measured, the only field that differs from run to run.

    >>> jump = Jump(100, "koopman", 4, 38.7, 0.5, 0.4, True, "better", 9, 0.01)
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
    best = Found("no candidate was better", before)
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


SHORT, TOLERANCE = 0.02, 0.1  # of a step; of its slope


def disagreement(
    step: Step, saved: Sequence[Tensor], evaluate: Callable[[Sequence[Tensor]], float], ranks: Ranks | None = None
) -> float:
    """How far the guard's slope along a step is from that of the gradients, relatively, by two evaluations.

    Where both are of the same loss it is about 0: then gradients are not noise. Under mini-batches it is of order 1.

    Args:
        step: from a recent point.
        saved: the weights as they are.
        evaluate: the loss at other weights.
        ranks: the processes that hold the other columns.
    """
    losses = []
    for length in (0.0, SHORT):
        weights = _along(step, length, saved, ranks)
        losses.append(math.nan if weights is None else evaluate(weights))
    expected = step.slope * SHORT
    return abs((losses[1] - losses[0]) / expected - 1) if expected else math.nan


def follow(
    step: Step,
    saved: Sequence[Tensor],
    before: float,
    count: int,
    evaluate: Callable[[Sequence[Tensor]], float],
    ranks: Ranks | None = None,
) -> Found:
    """Evaluate a step and lengths around it; take the best if it is strictly better than the weights as they are.

    The whole step first; if it is better, twice as far as long as that lowers the loss, else half of it, then a quarter
    of what was tried last, until one is better.

    Args:
        step: from a recent point.
        saved: the weights as they are.
        before: their loss, finite.
        count: how many evaluations may be made.
        evaluate: the loss at other weights.
        ranks: the processes that hold the other columns.
    """
    best = Found("no candidate was better", before)

    def lower(length: float) -> bool:
        nonlocal best
        weights = _along(step, length, saved, ranks)
        loss = math.inf if weights is None else finite(evaluate(weights))
        if not loss < (math.inf if best.after is None else best.after):
            return False
        best = Found(best.reason, before, loss, Candidate("secants", 1.0, {"rank": step.pairs}), None, weights)
        return True

    def better() -> bool:
        return best.after is not None and best.after < before

    length = 1.0
    lower(length)
    factor = 2.0 if better() else 0.5
    for _ in range(count - 1):
        length *= factor
        improved = lower(length)
        if better() and not (improved and factor > 1):
            break
        factor = 2.0 if better() else 0.25
    return best._replace(reason="better") if better() else best._replace(weights=None)


def _along(step: Step, length: float, saved: Sequence[Tensor], ranks: Ranks | None) -> list[Tensor] | None:
    """The weights so much of a step from its origin, in the shapes and dtypes of `saved`; None if one is not finite."""
    return cast(saved, torch.add(step.origin, step.direction, alpha=length), ranks, add=False)
