"""When a live run tries to move its weights ahead, from which recorded steps, and what it learns from each attempt."""

from __future__ import annotations

import logging
import math
import time
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch

from koopt import distributed
from koopt.live import looking, records, secants
from koopt.live.budget import ENOUGH, GUARD, MOST, SNAPSHOT, TRIES, Costs, Schedule
from koopt.live.candidates import FEWEST, NOISE, Choice, Proposer, block_after, displaced, paired, smooth, unpaired
from koopt.live.clipping import Clipping
from koopt.live.jumps import TOLERANCE, WORSE, Found, agreement, follow, loss_along, search
from koopt.live.moments import Moments
from koopt.live.preconditioning import by_matrices
from koopt.live.refreshing import write_buffers
from koopt.live.skipping import frozen, moving
from koopt.live.streak import Streak
from koopt.live.window import BlockMeans, Snapshots, cut, flattened, nbytes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from koopt.exchange import Ranks
    from koopt.live.judging import Judge
    from koopt.live.jumps import Jump
    from koopt.live.settings import Settings
    from koopt.live.weights import Weights

NOISE_FOUND = "noise:"
NOISY = f"{NOISE_FOUND} the guard's slope is off that of the gradients"
ASKED = 4  # evaluations at most, to ask whether gradients are noise along the optimizer's own move
PRECONDITIONED = 'preconditioner: the optimizer holds matrices, and jumps do it harm; mode="jump" jumps all the same'
AGAIN, SAME = 10, 1e-3  # steps along secants that follow one another before the guard is asked anew; how alike it is
LONG = 10  # steps along secants in a row whose end is not counted against the budget
RECORDED = 8  # points before a step along secants, where they are not tried again and again
SCHEDULED = ("due", "wait", "began", "noisy", "spent", "following", "vain", "proven", "tries")
log = logging.getLogger("koopt")


class Attempts:
    """Moves the weights of a live run ahead, from the steps that it records, where and when it pays.

    Args:
        optimizer: that trains the weights.
        model: in which they are.
        weights: the trained ones.
        judge: their guard.
        means: averages of the weights, of no use across a jump; None where there are none.
        settings: what was asked for.
        ranks: the processes that hold other parts of the weights.

    Attributes:
        tail: the steps recorded for the next attempt.
        schedule: when that is due.
        secants: of weights and gradients; None where none are asked for.
        jumps: the records of attempts, the oldest first.
        callbacks: each is given every record.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        weights: Weights,
        judge: Judge,
        means: BlockMeans | None,
        settings: Settings,
        ranks: Ranks | None,
    ) -> None:
        self._optimizer, self._model, self._weights, self._judge = optimizer, model, weights, judge
        self._means, self._settings, self._ranks = means, settings, ranks
        whole = list(weights.named.values())
        recorded, place = weights.parameters, (settings.dtype, settings.device)
        self.tail = Snapshots(recorded, settings.rows, *place)
        self._moments = Moments(optimizer, whole, settings, ranks)
        self.secants = secants.Secants(recorded, settings.history, *place) if settings.history else None
        # with several processes backward leaves what is not yet summed over them
        self._clipping = Clipping(whole if ranks is None else [])
        # of whole weights, so that all processes have the same schedule, however many they are
        window = nbytes_of(whole, settings.rows, 0, settings.dtype)
        pairs = secants.nbytes_of(whole, settings.history, settings.dtype)
        costs = Costs.of(sum(parameter.nbytes for parameter in whole), window, pairs)
        self.schedule = Schedule(settings.cycle, settings.max_overhead, costs, settings.tail)
        if self.secants is not None:
            self.schedule.follow(0)
        self._snapshot = SNAPSHOT * settings.snapshots / settings.rows  # what a step costs to record
        self._block = 1  # steps whose mean is a snapshot, in the next window
        self._choice = Choice()
        self._streak = Streak()
        self.jumps: list[Jump] = []
        self.callbacks: list[Callable[[Jump], object]] = []
        self._agreed = self._misled = 0  # looks at which the guard's slope was that of the gradients, or was off
        self._found = False  # noise, at any look
        self._began: list[Tensor] = []  # the weights before a step that is looked at
        self._watch(0)

    @property
    def parts(self) -> dict[str, Snapshots | secants.Secants]:
        """What is recorded, by name."""
        beside = {} if self.secants is None else {"secants": self.secants}
        return {"snapshots": self.tail} | beside | self._moments.parts

    @property
    def noisy(self) -> bool:
        """Whether noise was found, and nothing since says otherwise."""
        return self._found and not self._smooth

    @property
    def _smooth(self) -> bool:
        """Whether looks found that it is none often enough, beside those that found the guard's slope off."""
        return self._agreed > looking.TRUST * self._misled

    @property
    def along_secants(self) -> bool:
        """Whether steps along secants follow one another now."""
        return self._streak.moves > 0

    def state_dict(self) -> dict[str, Any]:
        """All but what is recorded."""
        state = {name: getattr(self.schedule, name) for name in SCHEDULED} | {"choice": self._choice.state_dict()}
        if self.secants is not None:
            measured = {name: held.clone() for name, held in self.secants.measured.items()}
            state |= self._streak.state_dict() | {"measured": measured}
        return state | self._clipping.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], jumps: list[Jump], steps: int) -> None:
        """Take over a :meth:`state_dict` and the records at a step, once what is recorded has been taken over."""
        for name in SCHEDULED:
            setattr(self.schedule, name, state[name])
        self._choice.load_state_dict(state["choice"])
        if self.secants is not None:
            self._streak.load_state_dict(state)
            for name, held in self.secants.measured.items():
                held.copy_(state["measured"][name])
        self._clipping.load_state_dict(state)
        self._block, self.jumps = self.tail.block, jumps
        self._agreed = sum(map(looking.agreed, jumps))
        self._misled = sum(jump.reason.startswith(NOISY) for jump in jumps)
        self._found = any(jump.reason.startswith(NOISE_FOUND) for jump in jumps)
        self._watch(steps)

    def before(self, step: int) -> None:
        """The optimizer is about to take a step."""
        self._began = [value.clone() for value in self._weights.values] if self._looks_at(step) else []
        if self.secants is None:
            return
        streak = self._streak
        if streak.moves:
            if not distributed.everywhere(streak.left_at(self._weights.values), self._ranks):
                self._end(step - 1)
            elif not distributed.everywhere(secants.all_finite(self._weights.named.values()), self._ranks):
                self._take_back(self.secants, step - 1)
        if streak.moves or self._at_point(step):
            self.secants.begin(self._weights.values)

    def after(self, steps: int) -> None:
        """The optimizer has taken a step: record it, and make the attempt that is due."""
        if self._began:
            self._look(self._began, steps)
            self._began = []
        if self.secants is None or not self._toward_step(self.secants, steps):
            left = self.schedule.due - steps
            if left < self.tail.steps:
                self._toward_jump(steps, left)
        self._watch(steps)

    def now(self, steps: int) -> Jump:
        """Make an attempt from the recent steps that are recorded, or else along the secants."""
        self._weights.require_free()
        if self._streak.moves:
            self._end(steps)
        if self.secants is not None and self.secants.pairs and not self.tail.taken:
            jump = self._follow(self.secants, steps, doubtful=False)
        else:
            jump = self._jump(steps, MOST)
        self._watch(steps)
        return jump

    def detach(self) -> None:
        """Leave the parameters as they were found."""
        self._clipping.end()

    def _watch(self, steps: int) -> None:
        """Look at the next gradients as backward leaves them, where they are to be recorded."""
        step = steps + 1
        self._clipping.watch(bool(self._streak.moves) or self._at_point(step) or self._looks_at(step))

    def _looks_at(self, step: int) -> bool:
        """Whether the optimizer's own move is to tell if gradients are noise."""
        return self._settings.looks and not self._found and looking.is_due(step)

    def _look(self, before: Sequence[Tensor], steps: int) -> None:
        """Ask whether gradients are noise along the move just made; only noise is put on record."""
        factor = self._clipping.factor()
        if factor is None or not self.schedule.allows_secants(steps, ASKED):
            return
        self._weights.require_free()
        jump = self._try(lambda: self._attempt_look(before, factor), steps, GUARD)
        if jump.reason.startswith(NOISY):
            self._tell(jump)

    def _at_point(self, step: int) -> bool:
        """Whether a step is one whose gradient is recorded for the step along secants that is due."""
        left = self.schedule.following - step
        return 0 <= left < RECORDED * secants.EVERY and left % secants.EVERY == 0

    def _toward_step(self, held: secants.Secants, steps: int) -> bool:
        """Record gradients before the step along secants that is due, and take it; whether the weights were moved."""
        schedule, streak = self.schedule, self._streak
        if not streak.moves and not self._at_point(steps):
            return False
        factor = self._clipping.factor()
        if factor is None:
            held.clear()
            if streak.moves:
                self._end(steps)
            elif steps >= schedule.following:
                schedule.postpone(steps)
            return False
        given = secants.gradients(self._optimizer, list(self._weights.named.values()), factor)
        held.end(given, streak.expected)
        streak.expected = 0.0
        doubtful = looking.is_doubtful(schedule.tries + 1)
        if not streak.moves:
            schedule.spent += 2 * SNAPSHOT
            if steps < schedule.following:
                return False
            most = TRIES + 3 * doubtful + (self._judge.refresh is not None)  # evaluations
            if not schedule.allows_secants(steps, most):
                schedule.postpone(steps)
                return False
        return self._follow(held, steps, doubtful).accepted

    def _toward_jump(self, steps: int, left: int) -> None:
        """Record the last steps before the attempt that is due in `left`, and make it, as far as the budget allows."""
        schedule, tail = self.schedule, self.tail
        if left == tail.steps - 1 and not schedule.afford(tail.steps * self._snapshot):
            if not self.jumps or not self.jumps[-1].reason.startswith("budget"):
                why = f"budget: max_overhead={schedule.max_overhead:g} does not allow {ENOUGH} evaluations yet"
                self._tell(records.record(Found(why), steps, evaluations=0, seconds=0.0))
            return
        tail.add(self._weights.values)
        self._moments.record()
        schedule.spent += self._snapshot
        if left <= 0:
            self._jump(steps, schedule.allowed(steps))

    def _jump(self, steps: int, allowed: int) -> Jump:
        """Try the families of candidates on the recorded steps."""
        self._weights.require_free()
        self.schedule.start(steps)
        snapshots = self.tail.ordered()
        moved = distributed.union(moving(self._optimizer, snapshots), len(snapshots), self._ranks)
        window = snapshots[moved] if len(moved) < len(snapshots) else snapshots
        try:
            jump = self._try(lambda: self._attempt(window, steps, allowed), steps, self.schedule.costs.candidate, moved)
        finally:
            self._forget()
        if jump.accepted:
            self.schedule.succeed(steps, self.secants is not None)
        return self._tell(jump)

    def _follow(self, held: secants.Secants, steps: int, doubtful: bool) -> Jump:
        """Try a step along the secants; what one costs that is better is not counted against the budget.

        Nor is the end of a long streak.
        As long as they are better each optimizer step is followed by another one, from where that began: its own move
        is given up, and only its gradient is of use.
        """
        self._weights.require_free()
        schedule, streak, spent = self.schedule, self._streak, self.schedule.spent
        if not streak.moves:
            schedule.in_vain(steps)  # until it has proved not to be
        jump = self._try(lambda: self._attempt_along(held, doubtful), steps, GUARD)
        if jump.accepted:
            self._forget()
            schedule.spent, schedule.proven = spent, True
            if streak.moves:
                last = self.jumps.pop()
                self._agreed -= looking.agreed(last)
                jump = records.joined(last, jump)
            if self._judge.refresh is None:  # which may go through all data
                assert jump.after is not None
                streak.go_on(jump.after, self._weights.values)
            else:
                streak.expected = 0.0
                schedule.follow(steps)
        elif streak.moves:
            if streak.moves >= LONG:
                schedule.spent = spent
            self._end(steps, useless=jump.reason.startswith(NOISY))
        if jump.reason == WORSE:
            held.clear()  # what was recorded misleads
        return self._tell(jump)

    def _take_back(self, held: secants.Secants, steps: int) -> None:
        """The guard was finite where the last step along secants led, but the gradient is not: back to before it."""
        self._weights.require_free()
        self._weights.write(cut(held.weights, self._weights.parameters))
        for parameter in self._weights.named.values():
            parameter.grad = None  # the optimizer leaves alone what has none
        self._end(steps, useless=True)
        held.clear()
        found = Found("the gradient is not finite where the last move led: it was taken back")
        self._tell(records.record(found, steps, evaluations=0, seconds=0.0))

    def _end(self, steps: int, useless: bool = False) -> None:
        """No step along secants follows at once; all is as after a jump, but where they are of no use for now."""
        log.info("%s", self.jumps[-1])
        self._moments.recall(self._streak.moves)
        self._streak.end()
        self.schedule.tries = 0
        self.schedule.following = 0  # what was due before there were points to step from
        self.schedule.succeed(steps, secants=not useless)
        if useless:
            self.schedule.in_vain(steps)

    def _tell(self, jump: Jump) -> Jump:
        """Keep the record of an attempt, and pass it on."""
        self.jumps.append(jump)
        self._agreed += looking.agreed(jump)
        self._misled += jump.reason.startswith(NOISY)
        self._found |= jump.reason.startswith(NOISE_FOUND)
        log.log(logging.INFO if jump.moves == 1 else logging.DEBUG, "%s", jump)
        for callback in self.callbacks:
            callback(jump)
        return jump

    def _forget(self) -> None:
        """The recorded steps are used, or lie before a jump."""
        self.tail.clear(self._block)
        self._moments.clear(self._block)

    def _try(
        self,
        attempt: Callable[[], tuple[Found, Mapping[str, Tensor]]],
        steps: int,
        each: float,
        moved: Sequence[int] | None = None,
    ) -> Jump:
        """Make an attempt, each evaluation at that cost, and move the weights if it is to be; the record of it."""
        started, judge, schedule = time.perf_counter(), self._judge, self.schedule
        judge.evaluations = 0
        against = distributed.unlike(steps, self._weights.named.values(), self._ranks)
        if not against and self._settings.mode == "auto" and by_matrices(self._optimizer, self._ranks):
            against = PRECONDITIONED
        try:
            found, buffers = (Found(against), {}) if against else attempt()
        finally:
            schedule.spent += judge.evaluations * each
        if found.weights is not None:
            self._weights.write(found.weights)
            self._streak.expected = found.expected
            write_buffers(self._model, buffers)
            distributed.settle(self._weights.named.values(), self._ranks)
            self._moments.follow(found, moved)
            if self._means is not None:
                self._means.clear()
        return records.record(found, steps, judge.evaluations, time.perf_counter() - started)

    def _attempt(self, snapshots: Tensor, steps: int, allowed: int) -> tuple[Found, Mapping[str, Tensor]]:
        """What is best, and with which buffers, where they were renewed; the weights are as before."""
        if len(snapshots) < FEWEST:
            there, needed = (self._block * rows for rows in (len(snapshots), FEWEST))
            return Found(f"too few snapshots: {there} recent steps are recorded, {needed} are needed"), {}
        extra = 1 if self._judge.refresh is None else 2  # evaluations that try no candidate
        if allowed <= extra:
            return Found(f"budget: max_overhead={self._settings.max_overhead:g} allows no candidate yet"), {}
        still = frozen(self._optimizer, self._weights.named.values())
        places = zip(cut(snapshots, self._weights.parameters), self._weights.values, strict=True)
        for place, value in compress(places, still):
            place.copy_(value)
        halvings, rough = smooth(snapshots, self._ranks)
        block, self._block = self._block, min(block_after(self._block, halvings, rough), self._settings.block)
        if rough > NOISE and self._settings.mode == "auto":
            self.schedule.look_again(steps)
            return Found(f"{NOISE_FOUND} one snapshot ahead a forecast misses {rough:.2g} of an increment"), {}
        self.schedule.spent += self.schedule.costs.fit
        recorded, size = len(snapshots), 2**halvings
        for _ in range(halvings):
            snapshots = paired(snapshots)
        proposer = Proposer(snapshots, self._ranks, block * size)
        if not bool(proposer.path.isfinite().all()):
            return Found("the recorded weights hold NaN or Inf"), {}
        displacements = displaced(snapshots, flattened(self._weights.values, snapshots))
        choice, count = self._choice, allowed - extra

        def searching(saved: Sequence[Tensor], before: float) -> Found:
            found = search(proposer, displacements, choice, saved, before, count, self._judge.loss)
            if found.coefficients is None:
                return found
            return found._replace(coefficients=unpaired(found.coefficients, size, recorded))

        return self._judge.best(searching)

    def _attempt_look(self, before: Sequence[Tensor], factor: float) -> tuple[Found, Mapping[str, Tensor]]:
        parameters, place = list(self._weights.named.values()), self._settings.device
        like = torch.empty(0, dtype=torch.promote_types(self._settings.dtype, torch.float32), device=place)
        now = self._weights.values
        step = looking.own_move(self._optimizer, parameters, before, now, factor, like, self._ranks)

        def searching(saved: Sequence[Tensor], loss: float) -> Found:
            asked = Found(WORSE, loss, along=step, length=step.longest)
            off = abs(agreement(asked, None, saved, self._judge.loss, self._ranks) - 1)
            return asked if off <= TOLERANCE else Found(f"{NOISY} by {off:.2g} of it", loss)

        return self._judge.best(searching)

    def _attempt_along(self, held: secants.Secants, doubtful: bool) -> tuple[Found, Mapping[str, Tensor]]:
        self.schedule.spent += self.schedule.costs.secants
        parameters = list(self._weights.named.values())
        step = secants.newton(held, secants.adaptive(self._optimizer, parameters), self._ranks)
        if step is None:
            return Found(f"secants: none of {held.pairs} tells of curvature"), {}
        step = secants.as_trained(step, self._optimizer, held.gradient, parameters, self._weights.values, self._ranks)
        self.schedule.tries += 1
        moves = self._streak.moves
        start = self._streak.loss if moves else None

        def searching(saved: Sequence[Tensor], before: float) -> Found:
            if moves % AGAIN == AGAIN - 1:
                now = loss_along(step, 0.0, saved, self._judge.loss, self._ranks)[0]
                if not math.isclose(now, before, rel_tol=SAME):
                    return Found(f"the guard is {now:.6g} at weights where it was {before:.6g}", before)
            scale = self._streak.scale
            found = follow(step, saved, before, TRIES - 1, self._judge.loss, self._ranks, scale)
            if doubtful and (found.weights is not None or not self._smooth):  # noise seldom leads to a lower loss
                ratio = agreement(found, start, saved, self._judge.loss, self._ranks, scale)
                off = abs(ratio - 1)
                if not off <= TOLERANCE and not self._streak.rescaled(scale * ratio):
                    return Found(f"{NOISY} by {off:.2g} of it", before)
            return found

        return self._judge.best(searching, start)
