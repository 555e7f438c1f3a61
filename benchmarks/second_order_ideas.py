"""Second-order ways to train, for `second_order.py`: each is a function of a run and goes on until that stops it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lbfgs import _strong_wolfe

import koopt
from koopt.bench.scaled_lbfgs import ScaledLBFGS
from koopt.live import moments

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from koopt.bench.task import Task

TAIL, CYCLE = 30, 100  # koopt's own
DAMPING = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)  # shares of the largest curvature


class Spent(Exception):
    """The target is reached, or the budget is used up."""


class Run:
    """One problem whose evaluations are counted; `trace` has (cost, lowest loss so far)."""

    def __init__(self, task: Task, rate: float, seed: int, budget: float, target: float) -> None:
        self.problem, self.rate, self.steps = task.problem(seed, False), rate, task.steps
        self.parameters = list(self.problem.model.parameters())
        self.budget, self.target = budget, target
        self.cost, self.best, self.trace, self.note = 0.0, math.inf, list[Any](), ""

    def _spend(self, cost: float) -> None:
        if self.cost >= self.budget or self.best <= self.target:
            raise Spent
        self.cost += cost

    def closure(self) -> Tensor:
        self._spend(1.0)
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.problem.loss(self.problem.batch())
        loss.backward()
        if loss.item() < self.best:
            self.best = loss.item()
            self.trace.append((self.cost, self.best))
        return loss

    def guard(self) -> Tensor:
        self._spend(1 / 3)
        return self.problem.guard()

    def weights(self) -> Tensor:
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters])

    def gradient(self) -> Tensor:
        return torch.cat([parameter.grad.reshape(-1) for parameter in self.parameters if parameter.grad is not None])

    @torch.no_grad()
    def write(self, weights: Tensor) -> None:
        pieces = weights.split([parameter.numel() for parameter in self.parameters])
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            parameter.copy_(piece.view_as(parameter))

    def loss_and_gradient(self, weights: Tensor) -> tuple[float, Tensor]:
        self.write(weights)
        return self.closure().item(), self.gradient()


class Adam:
    """Adam with a cosine schedule, with koopt if asked for; keeps weights and gradients of the last steps."""

    def __init__(self, run: Run, with_koopt: bool) -> None:
        self.run, self.path, self.gradients = run, list[Any](), list[Any]()
        self.optimizer = torch.optim.Adam(run.parameters, lr=run.rate)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, run.steps)
        if with_koopt:
            koopt.attach(self.optimizer, run.problem.model, guard=run.guard)

    def step(self, record: bool = False) -> float:
        before = self.run.weights() if record else None
        loss: Any = self.optimizer.step(self.run.closure)
        if record:
            self.path, self.gradients = [*self.path, before][-TAIL:], [*self.gradients, self.run.gradient()][-TAIL:]
        self.schedule.step()
        return loss.item()

    def diagonal(self) -> Tensor:
        """What Adam scales gradients by."""
        squares = [self.optimizer.state[parameter]["exp_avg_sq"].reshape(-1) for parameter in self.run.parameters]
        return 1 / (torch.cat(squares).sqrt() + 1e-8)

    def span(self, rank: int) -> tuple[Tensor, Tensor]:
        """Leading directions of the recorded increments, and the Hessian times them: both without an evaluation."""
        increments, changes = torch.stack(self.path).diff(dim=0).T, torch.stack(self.gradients).diff(dim=0).T
        left, values, right = torch.linalg.svd(increments, full_matrices=False)
        rank = min(rank, int((values > 1e-6 * values[0]).sum()))
        return left[:, :rank], changes @ right[:rank].T / values[:rank]


class QuasiNewton:
    """L-BFGS whose memory can be filled from outside.

    With a diagonal first guess if one is given; `scaled`: each update shrinks what the one before had too large.
    """

    def __init__(self, run: Run, history: int, diagonal: Tensor | None = None, scaled: bool = False) -> None:
        self.run, self.history, self.pairs, self.diagonal = run, history, list[Any](), diagonal
        self.scaled = scaled

    def add(self, step: Tensor, change: Tensor, predicted: float = 0.0) -> None:
        """A pair; `predicted` is the step's curvature as it was thought to be."""
        if (curvature := step.dot(change)) > 1e-12 * step.norm() * change.norm():
            scale = max(1.0, predicted / float(curvature)) if self.scaled and self.pairs else 1.0
            self.pairs = [*self.pairs, (step, change, scale)][-self.history :]

    def direction(self, gradient: Tensor) -> Tensor:
        found, shares = -gradient, list[Any]()
        for step, change, _ in reversed(self.pairs):
            shares.append(step.dot(found) / step.dot(change))
            found = found - shares[-1] * change
        if self.diagonal is not None:
            found = self.diagonal * found
        if self.pairs:
            step, change, _ = self.pairs[0 if self.scaled else -1]
            found = found * (step.dot(change) / change.dot(change if self.diagonal is None else self.diagonal * change))
        for (step, change, scale), share in zip(self.pairs, reversed(shares), strict=True):
            found = found * scale
            found = found + (share - change.dot(found) / step.dot(change)) * step
        return found

    def descend(self, until: float = math.inf) -> tuple[float, float]:
        """From the weights as they are until so much is spent or nothing is gained; the loss before and after."""
        now = self.run.weights()
        loss, gradient = self.run.loss_and_gradient(now)
        before = loss
        while self.run.cost < until:
            along = self.direction(gradient)
            slope = gradient.dot(along)
            if not slope < 0:
                self.pairs, along, slope = [], -gradient, -gradient.dot(gradient)
            first = 1.0 if self.pairs else min(1.0, 1 / float(gradient.abs().sum()))

            def at(origin: Tensor, length: float, along: Tensor) -> tuple[float, Tensor]:
                return self.run.loss_and_gradient(origin + length * along)

            new, slopes, length, _ = _strong_wolfe(at, now, first, along, loss, gradient, slope, tolerance_change=0.0)
            if not new < loss:
                if not self.pairs:
                    break
                self.pairs = []
                continue
            self.add(length * along, slopes - gradient, -(length**2) * float(slope))
            now, loss, gradient = now + length * along, float(new), slopes
        self.run.write(now)
        return before, loss


def adam(run: Run, with_koopt: int = 0) -> None:
    """The baseline."""
    method = Adam(run, bool(with_koopt))
    while True:
        method.step()


def lbfgs(run: Run, history: int = 100, iterations: int = 10**6) -> None:
    """torch's, strong Wolfe; one step of very many iterations repeats no evaluation."""
    optimizer = _lbfgs(run, history, iterations)
    while True:
        best = run.best
        optimizer.step(run.closure)
        if not run.best < best:  # stuck or not finite
            return


def scaled(run: Run, history: int = 400, with_koopt: int = 0) -> None:
    """koopt's self-scaled L-BFGS."""
    optimizer = ScaledLBFGS(run.parameters, history)
    koop = koopt.attach(optimizer, run.problem.model, guard=run.guard) if with_koopt else None
    try:
        while True:
            cost = run.cost
            optimizer.step(run.closure)
            if run.cost > cost + 50:  # two line searches in vain
                return
    finally:
        if koop is not None:
            run.note += f"{sum(jump.accepted for jump in koop.jumps)}/{len(koop.jumps)} jumps"


def lbfgs_koopt(run: Run, history: int = 100, iterations: int = 10, keep: int = 0) -> None:
    """koopt attached to L-BFGS, a jump tried every 10 steps of so many iterations;
    `keep` its curvature across jumps."""
    optimizer, restart, moved = _lbfgs(run, history, iterations), moments.restart_curvature, list[bool]()
    if keep:
        moments.restart_curvature = lambda optimizer: moved.append(True)
    koop = koopt.attach(optimizer, run.problem.model, guard=run.guard, mode="jump", cycle=10, tail=10)
    try:
        while True:
            if moved:  # no pair across the jump: with the gradient as it is now the change is zero, and is not taken
                moved.clear()
                run.problem.model.zero_grad()
                run.problem.loss(run.problem.batch()).backward()  # not counted: the step's first evaluation is the same
                optimizer.state[run.parameters[0]]["prev_flat_grad"] = run.gradient()
            optimizer.step(run.closure)
    finally:
        run.note = f"{sum(jump.accepted for jump in koop.jumps)}/{len(koop.jumps)} jumps"
        moments.restart_curvature = restart


def span(run: Run, rank: int = 12, cycle: int = CYCLE, exact: int = 0, beyond: int = 0, with_koopt: int = 0) -> None:
    """A damped Newton step in the span of the last increments after each cycle of Adam, in the place of koopt's jump.

    The curvature is that of recorded gradients, or `exact`, by a difference of gradients in each direction. `beyond`
    the span a step of Adam's own scaling is added, which a block BFGS update makes consistent.
    """
    method, taken, tried = Adam(run, bool(with_koopt)), 0, 0
    try:
        while True:
            for _ in range(cycle if tried or not with_koopt else cycle // 2):  # between koopt's own jumps
                method.step(record=True)
            directions, images = method.span(rank)
            now = run.weights()
            loss, gradient = run.loss_and_gradient(now)
            if exact:
                small = 1e-5
                shifted = [(run.loss_and_gradient(now + small * q)[1] - gradient) / small for q in directions.T]
                images = torch.stack(shifted, dim=1)
            curvature = directions.T @ images
            values, vectors = torch.linalg.eigh((curvature + curvature.T) / 2)
            best, target = loss, now
            for damping in DAMPING:
                inverse = (vectors / (values.abs() + max(damping, 1e-12) * values.abs().max())) @ vectors.T
                rest = gradient - images @ (inverse @ (directions.T @ gradient))
                step = directions @ (inverse @ (directions.T @ gradient))
                if beyond:
                    wide = run.rate * method.diagonal() * rest
                    step = step + wide - directions @ (inverse @ (images.T @ wide))
                run.write(now - step)
                after = float(run.guard())
                if after < best:
                    best, target = after, now - step
            run.write(target)
            method.path, method.gradients = [], []
            taken, tried = taken + (best < loss), tried + 1
    finally:
        run.note = f"{taken}/{tried} steps"


def handover(
    run: Run, at: int = 300, history: int = 100, plain: int = 0, seeded: int = 0, diagonal: int = 0, scaled: int = 0
) -> None:
    """Adam with koopt (or `plain`) until `at`, then L-BFGS, which may begin with Adam's curvature and scaling."""
    method = Adam(run, not plain)
    while run.cost < at:
        method.step(record=bool(seeded))
    after = QuasiNewton(run, history, method.diagonal() if diagonal else None, bool(scaled))
    if seeded:
        directions, images = method.span(12)
        curvature = directions.T @ images
        values, vectors = torch.linalg.eigh((curvature + curvature.T) / 2)
        for index in values.argsort():
            if values[index] > 1e-3 * values[-1]:
                after.add(directions @ vectors[:, index], images @ vectors[:, index])
    after.descend()


def alternate(run: Run, history: int = 100, chunk: int = 100) -> None:
    """Adam with koopt and L-BFGS in turn: the one whose last chunk lowered log loss more for its cost goes on."""
    method, other = Adam(run, True), QuasiNewton(run, history)
    rates, spent = [math.inf, math.inf], [0.0, 0.0]
    try:
        while True:
            which, started = int(rates[1] > rates[0]), run.cost
            if which:
                before, after = other.descend(started + chunk)
            else:
                losses = [method.step()]
                while run.cost < started + chunk:
                    losses.append(method.step())
                before, after = losses[0], losses[-1]
            spent[which] += run.cost - started
            rates[which] = math.log(before / after) / (run.cost - started)
    finally:
        run.note = f"{spent[1]:.0f} calls in L-BFGS chunks"


def soap(run: Run, rate: float = 0.01, with_koopt: int = 0) -> None:
    """SOAP of the package pytorch-optimizer, with a cosine schedule."""
    from pytorch_optimizer import SOAP

    optimizer = SOAP(run.parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    if with_koopt:
        koopt.attach(optimizer, run.problem.model, guard=run.guard)
    while True:
        optimizer.step(run.closure)  # pyright: ignore[reportArgumentType], torch asks for a float
        schedule.step()


METHODS: dict[str, Callable[..., None]] = {
    method.__name__: method for method in (adam, lbfgs, scaled, lbfgs_koopt, span, handover, alternate, soap)
}


def _lbfgs(run: Run, history: int, iterations: int) -> torch.optim.LBFGS:
    options: dict[str, Any] = {"tolerance_grad": 0, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    return torch.optim.LBFGS(
        run.parameters, max_iter=iterations, max_eval=10 * iterations, history_size=history, **options
    )
