"""Jumps in a live run: when one is tried, which candidate is kept, and the record of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from koopt.live.candidates import FAMILIES, LONGEST, SHORTEST, Candidate, Choice, Proposer, gain, moved

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

GUARD_COST = 1 / 3  # of an optimizer step: a forward pass, where a step is a forward and a backward one
MOST = 16  # evaluations in one attempt
PATIENCE = 16  # the longest wait between attempts, in cycles


@dataclass(frozen=True)
class Jump:
    """One attempt to move the weights.

    Attributes:
        step: optimizer steps recorded until then.
        forecaster, rank, horizon: of the best candidate, its horizon in optimizer steps (infinite: the fixed point);
            None if none was evaluated.
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


@dataclass
class Schedule:
    """When the next attempt is due, and how many evaluations it may cost: counted, never measured in seconds.

    Args:
        cycle: optimizer steps between attempts; after each one that failed twice as many, up to 16 cycles.
        max_overhead: evaluations allowed, as a share of the steps' cost.

    >>> schedule = Schedule(cycle=100, max_overhead=0.03)
    >>> schedule.allowed(100)
    9
    >>> schedule.start(100)
    >>> schedule.due
    300
    """

    cycle: int
    max_overhead: float
    due: int = 0
    wait: int = 0
    evaluations: int = 0

    def __post_init__(self) -> None:
        self.due = self.due or self.cycle
        self.wait = self.wait or self.cycle

    def allowed(self, steps: int) -> int:
        """How many evaluations an attempt may make now."""
        # the small amount is for products such as 0.29 * 100, which fall short of a whole number
        return min(math.floor(self.max_overhead * steps / GUARD_COST + 1e-9) - self.evaluations, MOST)

    def start(self, steps: int) -> None:
        """An attempt begins, which counts as failed until it has succeeded."""
        self.wait = min(2 * self.wait, PATIENCE * self.cycle)
        self.due = steps + self.wait

    def succeed(self, steps: int) -> None:
        self.wait = self.cycle
        self.due = steps + self.cycle


class Found(NamedTuple):
    """The best candidate of an attempt; no weights where it is not to be taken."""

    reason: str
    before: float | None = None
    after: float | None = None
    candidate: Candidate | None = None
    coefficients: Tensor | None = None
    weights: list[Tensor] | None = None


def search(
    proposer: Proposer,
    choice: Choice,
    saved: Sequence[Tensor],
    before: float,
    count: int,
    evaluate: Callable[[Sequence[Tensor]], float],
) -> Found:
    """Evaluate a few candidates and take the best if it is strictly better than the weights as they are.

    Half of the evaluations go to families at the horizons that were best for them; the others double or halve the
    horizon of the best ones as long as that lowers the loss.

    Args:
        proposer: over the recorded steps, the last of which is now.
        choice: says which families to try, and learns from it.
        saved: the weights as they are.
        before: their loss, finite.
        count: how many evaluations may be made.
        evaluate: the loss at other weights.
    """
    best = Found("no candidate was better", before)
    reached: dict[int, tuple[float, float]] = {}  # family: its lowest loss, and at which horizon
    left = count

    def lower(index: int, horizon: float) -> bool:
        """Whether a family does better at this horizon than it did so far."""
        nonlocal best, left
        if math.isfinite(horizon):
            horizon = round(horizon * (proposer.time - 1)) / (proposer.time - 1)  # whole steps
        candidate = FAMILIES[index]._replace(horizon=horizon)
        coefficients = proposer.coefficients(candidate)
        weights = None if coefficients is None else moved(saved, proposer.snapshots, coefficients)
        loss = math.inf
        if weights is not None:
            left -= 1
            loss = evaluate(weights)
        if index in reached and not loss < reached[index][0]:
            return False
        reached[index] = (loss if loss < math.inf else math.inf, horizon)  # NaN is as bad as Inf
        if loss < (math.inf if best.after is None else best.after):
            best = Found(best.reason, before, loss, candidate, coefficients, weights)
        return True

    for index in choice.pick(math.ceil(count / 2)):
        lower(index, choice.horizons[index])
    for index in sorted(reached, key=lambda i: reached[i][0]):
        for factor in (2.0, 0.5):
            start = reached[index][1]
            while left and SHORTEST <= reached[index][1] * factor <= LONGEST:
                if not lower(index, reached[index][1] * factor):
                    break
            if reached[index][1] != start:
                break
    for index, (loss, horizon) in reached.items():
        choice.learn(index, gain(before, loss), horizon)
    if best.after is not None and best.after < before:
        return best._replace(reason="better")
    return best._replace(weights=None)
