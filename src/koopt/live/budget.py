"""When a jump is tried, and what koopt costs beside a run: counted in optimizer steps, never measured in seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

# of an optimizer step, as benchmarks/live_recording.py finds them for networks of 100 to a million weights
GUARD = 1 / 3  # a forward pass, where a step is a forward and a backward one
SNAPSHOT, MEAN = 1 / 32, 1 / 64  # to record one, or to add the weights to a mean
# bytes that a step on a batch of 64 counts as: its calls, and how often it goes through the parameters
CALLS, PASSES = 2**22, 4
FIT = 6  # how often a fit goes through the recorded window; a candidate does once
MOST, ENOUGH = 16, 6  # evaluations in one attempt; with fewer it is not worth its fit
FACTOR, PATIENCE = 3, 32  # how waits grow between attempts that fail, and the longest of them, in cycles,
SELDOM = 0.2  # or until they take this share of the budget
LOOKS = 4  # the longest wait between looks at noise, in cycles
# steps along secants: optimizer steps between them, evaluations, how often one goes through all pairs, what its small
# algebra costs beside, and what all that may cost beside the steps between
INTERVAL, TRIES, LOOPS, ALGEBRA, SIDE = 20, 5, 0.5, 2, 0.2
LONGEST = 16  # the longest wait between those of no use, in cycles
CHANCES, ADVANCE = 2, 200  # tries before one is better; steps whose budget they may spend beforehand


def at_doubling(time: int) -> bool:
    """Whether what is done rarer and rarer is due.

    >>> [time for time in range(20) if at_doubling(time)]
    [1, 2, 4, 8, 16]
    """
    return time.bit_count() == 1


@dataclass(frozen=True)
class Costs:
    """What an attempt costs, in optimizer steps.

    Attributes:
        fit: once.
        candidate: each one, its evaluation with it.
        secants: once a step along them, before its evaluations, each of which is a forward pass.

    >>> costs = Costs.of(parameters=0, window=0)
    >>> costs.fit, round(costs.candidate, 3)
    (0.0, 0.333)
    """

    fit: float = 0.0
    candidate: float = GUARD
    secants: float = 0.0

    @classmethod
    def of(cls, parameters: int, window: int, pairs: int = 0) -> Costs:
        """For so many bytes of parameters, of recorded snapshots and of secant pairs."""
        step = CALLS + PASSES * parameters
        along = ALGEBRA + LOOPS * pairs / step if pairs else 0.0
        return cls(FIT * window / step, GUARD + window / step, along)


@dataclass
class Schedule:
    """When the next attempt is due, and how many evaluations it may make.

    Args:
        cycle: optimizer steps between attempts; after one that failed three times as many as before it, up to 32
            cycles, or until attempts take a fifth of the budget; after looks at noise 1, 2, then 4 cycles.
        max_overhead: what recording, fits and evaluations may cost, as a share of the steps.
        costs: of an attempt.
        tail: the most steps before an attempt that are recorded for it, in which no step along secants is taken.
        following: when a step along secants is due; 0: none is.

    >>> schedule = Schedule(cycle=100, max_overhead=0.03)
    >>> schedule.allowed(100)
    9
    >>> schedule.start(100)
    >>> schedule.due
    400
    """

    cycle: int
    max_overhead: float
    costs: Costs = Costs()
    tail: int = 0
    due: int = 0
    wait: int = 0
    began: int = 0
    noisy: int = 0  # looks that found noise since a jump was accepted
    spent: float = 0.0
    following: int = 0
    vain: int = 0  # steps along secants that were of no use, one after the other
    proven: bool = False  # whether any was of use
    tries: int = 0  # steps along secants in all

    def __post_init__(self) -> None:
        self.due = self.due or self.cycle
        self.wait = self.wait or self.cycle

    def allowed(self, steps: int, ahead: float = 0.0) -> int:
        """How many evaluations an attempt may make at a step, if `ahead` is spent until then."""
        left = self.max_overhead * steps - self.spent - ahead - self.costs.fit
        # the small amount is for products such as 0.29 * 100, which fall short of a whole number
        return min(math.floor(left / self.costs.candidate + 1e-9), MOST)

    def allows_secants(self, steps: int, evaluations: int) -> bool:
        """Whether a step along secants may make so many evaluations, on the budget of some steps to come."""
        return self.max_overhead * (steps + ADVANCE) - self.spent >= self.costs.secants + GUARD * evaluations

    def afford(self, ahead: float) -> bool:
        """Whether the budget allows the attempt that is due, `ahead` spent until then; if not, it waits a cycle."""
        affordable = self.allowed(self.due, ahead) >= ENOUGH
        if not affordable:
            self.due += self.cycle
            self._keep_apart(self.due - self.cycle)
        return affordable

    def start(self, steps: int) -> None:
        """An attempt begins, which counts as failed until it has succeeded."""
        whole = self.costs.fit + MOST * self.costs.candidate
        seldom = whole / (SELDOM * self.max_overhead) if self.max_overhead else 0.0
        self.wait = min(FACTOR * max(self.wait, steps - self.began), max(PATIENCE * self.cycle, math.ceil(seldom)))
        self.began, self.due = steps, steps + self.wait
        self._keep_apart(steps)

    def look_again(self, steps: int) -> None:
        """The attempt that began was but a look at noise, which is cheap: waits begin anew, and only double."""
        self.wait = self.cycle * min(2**self.noisy, LOOKS)
        self.noisy, self.due = self.noisy + 1, steps + self.wait
        self._keep_apart(steps)

    def succeed(self, steps: int, secants: bool = False) -> None:
        """A jump was accepted; where there are secants, a step along them follows."""
        self.wait, self.noisy = self.cycle, 0
        self.due = steps + self.cycle
        if secants:
            self.follow(steps)

    @property
    def interval(self) -> int:
        """Optimizer steps between steps along secants, as long as these are of use."""
        return max(INTERVAL, math.ceil(self.costs.secants / SIDE))

    def follow(self, steps: int) -> None:
        """A step along secants follows, after an accepted one too; the other jumps keep their own time."""
        soon = steps + self.interval
        self.following, self.vain = self.following if steps < self.following < soon else soon, 0
        self._keep_apart(steps)

    def postpone(self, steps: int) -> None:
        """The budget does not allow the step along secants that is due."""
        self.following += max(self.interval, self.cycle)
        self._keep_apart(steps)

    def in_vain(self, steps: int) -> None:
        """A step along secants was of no use: the next waits three times as long, or for a jump if none ever was."""
        self.vain += 1
        wait = min(3**self.vain * self.interval, LONGEST * max(self.cycle, self.interval))
        self.following = steps + wait if self.proven or self.vain < CHANCES else 0
        self._keep_apart(steps)

    def _keep_apart(self, steps: int) -> None:
        """A step along secants within the tail would leave nothing to jump from: it comes before, or after the jump."""
        begins = self.due - self.tail
        if begins < self.following <= self.due:
            early = 2 * (begins - steps) >= self.interval
            self.following = begins if early else self.due + self.interval
