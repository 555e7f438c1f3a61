"""Steps from how gradients changed along the run: secant pairs, and the fixed point of the linear map they tell of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from koopt import linalg, reductions
from koopt.live.window import cut, record
from koopt.sharding import local

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from koopt.exchange import Ranks

EVERY = 4  # optimizer steps between points; momentum makes closer ones nearly alike
MOST_PAIRS = 50
MEMORY, FEWEST_PAIRS = 2**28, 8  # bytes that pairs take by default; fewer are not worth it
RECENT = 10  # pairs that the diagonal is made of
CONVEX = 1e-10  # the least cosine between the two halves of a pair that says something of a minimum


class Secants:
    """The last `length` pairs of how weights and gradients changed from one point of the run to the next.

    Across a jump a pair is as good as any other, so they outlast jumps.

    Args:
        tensors: the weights; their number and shapes do not change.
        length: how many pairs are kept.
        dtype, device: of the pairs; points are kept in float32 at least.

    >>> secants = Secants([torch.zeros(1)], 2, torch.float32, torch.device("cpu"))
    >>> for weight, gradient in ((4.0, 8.0), (3.0, 6.0)):
    ...     secants.begin([torch.tensor([weight])])
    ...     secants.end([torch.tensor([gradient])])
    >>> secants.pairs, secants.steps[0], secants.changes[0]
    (1, tensor([-1.]), tensor([-2.]))
    """

    def __init__(self, tensors: Sequence[Tensor], length: int, dtype: torch.dtype, device: torch.device) -> None:
        size, finer = sum(tensor.numel() for tensor in tensors), torch.promote_types(dtype, torch.float32)
        self.steps = torch.zeros(length, size, dtype=dtype, device=device)
        self.changes = torch.zeros_like(self.steps)
        points = [torch.zeros(2, size, dtype=finer, device=device) for _ in range(2)]  # weights and gradient
        (self._last, self._next), self._pieces = points, [[cut(row, tensors) for row in point] for point in points]
        self.points = 0

    @property
    def weights(self) -> Tensor:
        """`(state,)`, of the last point."""
        return self._last[0]

    @property
    def gradient(self) -> Tensor:
        return self._last[1]

    @property
    def pairs(self) -> int:
        return min(max(self.points - 1, 0), len(self.steps))

    def begin(self, weights: Sequence[Tensor]) -> None:
        """The weights that a step begins with."""
        record(self._pieces[1][0], weights)

    def end(self, gradients: Sequence[Tensor]) -> None:
        """The gradient at the weights of :meth:`begin`."""
        record(self._pieces[1][1], gradients)
        if self.points:
            place = (self.points - 1) % len(self.steps)
            torch.sub(self._next[0], self._last[0], out=self.steps[place])
            torch.sub(self._next[1], self._last[1], out=self.changes[place])
        self._last, self._next = self._next, self._last
        self._pieces.reverse()
        self.points += 1

    def order(self) -> list[int]:
        """Rows of the pairs, the oldest first."""
        newest = max(self.points - 1, 0)
        return [i % len(self.steps) for i in range(newest - self.pairs, newest)]

    @property
    def nbytes(self) -> int:
        return self.steps.nbytes + self.changes.nbytes + 4 * self.weights.nbytes

    def state_dict(self) -> dict[str, Any]:
        held = {"steps": self.steps, "changes": self.changes, "weights": self.weights, "gradient": self.gradient}
        return {**held, "points": self.points}

    def load_state_dict(self, state: Any) -> None:
        for name in ("steps", "changes", "weights", "gradient"):
            getattr(self, name).copy_(state[name])
        self.points = int(state["points"])


def nbytes_of(tensors: Sequence[Tensor], length: int, dtype: torch.dtype) -> int:
    """What so many pairs take, before any of it is taken."""
    finer = torch.promote_types(dtype, torch.float32).itemsize
    return sum(tensor.numel() for tensor in tensors) * (2 * length * dtype.itemsize + 4 * finer) if length else 0


def default_length(tensors: Sequence[Tensor], dtype: torch.dtype) -> int:
    """50 pairs, or as many as 256 MiB hold; none where these are fewer than 8.

    >>> default_length([torch.zeros(1000)], torch.float32)
    50
    >>> default_length([torch.zeros(10**8, device="meta")], torch.float32)
    0
    """
    length = min(MOST_PAIRS, MEMORY // max(1, 2 * dtype.itemsize * sum(tensor.numel() for tensor in tensors)))
    return length if length >= FEWEST_PAIRS else 0


def gradients(parameters: Sequence[Any]) -> list[Tensor]:
    """What this process holds of each gradient, dense; zeros where there is none.

    >>> gradients([nn.Parameter(torch.ones(2))])
    [tensor([0., 0.])]
    """
    found = []
    for parameter in parameters:
        given = parameter.grad
        if given is None:
            found.append(torch.zeros_like(local(parameter)))
        else:
            held = local(given)
            found.append(held.to_dense() if held.layout is not torch.strided else held)
    return found


def adaptive(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Tensor | None:
    """What Adam scales gradients by, `(state,)`; None for other optimizers, or where there is none yet.

    >>> model = nn.Linear(1, 1)
    >>> adaptive(torch.optim.Adam(model.parameters()), list(model.parameters())) is None
    True
    """
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam)):
        return None
    held = [optimizer.state.get(parameter, {}).get("exp_avg_sq") for parameter in parameters]
    squares = [local(square).reshape(-1) for square in held if isinstance(square, torch.Tensor)]
    return 1 / (torch.cat(squares).sqrt() + 1e-8) if len(squares) == len(parameters) else None


class Step(NamedTuple):
    """A quasi-Newton step from the last recorded point.

    Attributes:
        origin: `(state,)`, that point.
        direction: `(state,)`, to where the gradient would vanish if it were linear.
        pairs: how many it rests on.
        slope: of the loss along `direction`, by the gradient at `origin`.
    """

    origin: Tensor
    direction: Tensor
    pairs: int
    slope: float


@torch.no_grad()
def held_back(
    step: Step, gradient: Tensor, weights: Sequence[Tensor], still: Sequence[bool], ranks: Ranks | None = None
) -> Step:
    """The step with some parameters left where they are now.

    Args:
        step: for all of them.
        gradient: `(state,)`, at its origin.
        weights: of each parameter, as they are now.
        still: which of them are left.
        ranks: the processes that hold the other columns.

    >>> step = Step(torch.zeros(2), torch.ones(2), 1, -3.0)
    >>> held_back(step, torch.tensor([-1.0, -2.0]), [torch.ones(1), torch.ones(1)], [False, True])
    Step(origin=tensor([0., 1.]), direction=tensor([1., 0.]), pairs=1, slope=-1.0)
    """
    origin, direction = step.origin.clone(), step.direction.clone()
    sizes = [one.numel() for one in weights]
    for now, there, along, stays in zip(weights, origin.split(sizes), direction.split(sizes), still, strict=True):
        if stays:
            there.copy_(now.reshape(-1))
            along.zero_()
    return Step(origin, direction, step.pairs, reductions.dot(gradient, direction, ranks))


@torch.no_grad()
def newton(secants: Secants, diagonal: Tensor | None = None, ranks: Ranks | None = None) -> Step | None:
    """The step to the fixed point of gradient flow, as far as the pairs tell of it: L-BFGS without an evaluation.

    Args:
        secants: with the last point recorded.
        diagonal: `(state,)`, the inverse curvature to start from, up to a factor; None: the root mean squares of the
            steps over those of the changes, weight by weight, in the last ten pairs.
        ranks: the processes that hold the other columns.

    Returns:
        None where no pair tells of a minimum, or it is not finite.

    Source: Nocedal (1980), the two-loop recursion, whose loops are substitutions with the products of steps and changes
    (Byrd, Nocedal & Schnabel, 1994), so that the pairs are gone through all at once; for a quadratic loss the generator
    of the flow's Koopman operator on the weights is minus the Hessian, whose action on the recorded span the pairs are.

    >>> secants = Secants([torch.zeros(1)], 2, torch.float64, torch.device("cpu"))
    >>> for weight in (4.0, 3.0):
    ...     secants.begin([torch.tensor([weight])])
    ...     secants.end([2 * torch.tensor([weight])])
    >>> newton(secants).direction
    tensor([-3.], dtype=torch.float64)
    """
    finer, gradient = secants.weights.dtype, secants.gradient
    steps, changes = (rows[: secants.pairs] for rows in (secants.steps, secants.changes))
    if not secants.pairs:
        return None
    bends = reductions.products(steps, changes, ranks)
    curved, least = bends.diagonal(), CONVEX * reductions.norms(steps, ranks) * reductions.norms(changes, ranks)
    convex = (curved.isfinite() & (curved > least)).tolist()
    kept = [i for i in secants.order() if convex[i]]
    if not kept:
        return None
    newest = changes[kept[-1]].to(finer)
    if diagonal is None:
        recent = kept[-RECENT:]
        moved, turned = (torch.linalg.vector_norm(rows[recent], dim=0, dtype=finer) for rows in (steps, changes))
        diagonal = torch.where(turned > 0, moved / turned.clamp_min(torch.finfo(finer).tiny), 0.0)
    diagonal = diagonal.to(gradient.device, finer)
    order: Sequence[int] = kept  # of the rows in time
    if len(kept) < secants.pairs:
        steps, changes, order = steps[kept], changes[kept], range(len(kept))
    curved, bends = curved[kept], bends[kept][:, kept].triu()  # with the changes that came later
    shares = _solved(bends, -reductions.products(steps, gradient[None], ranks).squeeze(1)[order])
    found = -gradient - _summed(shares, changes, order)
    found.mul_(diagonal).mul_((curved[-1] / reductions.dot(newest, diagonal * newest, ranks)).item())
    turned = reductions.products(changes, found[None], ranks).squeeze(1)[order]
    found += _summed(_solved(bends.T, curved * shares - turned, upper=False), steps, order)
    return Step(secants.weights, found, len(kept), reductions.dot(gradient, found, ranks))


def _solved(triangle: Tensor, right: Tensor, upper: bool = True) -> Tensor:
    """One of the two loops, as a substitution."""
    return torch.linalg.solve_triangular(triangle, right[:, None], upper=upper).squeeze(1)


def _summed(shares: Tensor, rows: Tensor, order: Sequence[int]) -> Tensor:
    """Rows times shares that are in the order of time."""
    placed = torch.empty_like(shares)
    placed[order] = shares
    if rows.dtype.itemsize < torch.float32.itemsize:
        return linalg.combine(placed.to(rows.device), rows, torch.float32)
    return placed.to(rows) @ rows  # without float64 copies of the pairs
