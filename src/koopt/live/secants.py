"""Steps from how gradients changed along the run: secant pairs, and the fixed point of the linear map they tell of."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from koopt import linalg, reductions
from koopt.live.skipping import frozen, groups_of
from koopt.live.window import cut, record
from koopt.sharding import local

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from jaxtyping import Float
    from torch import Tensor

    from koopt.exchange import Ranks

EVERY = 4  # optimizer steps between points; momentum makes closer ones nearly alike
MOST_PAIRS, MANY_BYTES, FEWEST_PAIRS, MOST_BYTES = 100, 2**24, 10, 2**26  # by default
RECENT = 10  # pairs that the first guess is made of
TEMPERED = 0.75  # its power; with 1 weights go far in directions in which the loss is flat
CURVED = 1e-10  # the least cosine between the two halves of a pair that says something of the curvature
FARTHEST = 0.3  # of the norm of all weights; a longer move may kill units that no gradient brings back


class Secants:
    """The last `length` pairs of how weights and gradients changed from one point of the run to the next.

    Across a jump a pair is as good as any other, so they outlast jumps. Where the gradient shrank along a step its
    change is kept with the sign turned: what is built on the pairs then leaves a saddle as fast as it nears a minimum.

    Args:
        tensors: the weights; their number and shapes do not change.
        length: how many pairs are kept.
        dtype, device: of the pairs; points are kept in float32 at least.

    Attributes:
        products: `(length, length)`, float64 on the CPU, of steps with changes as old or newer, once :meth:`measure`
            was called.
        told: `(length,)`, which pairs tell of curvature.
        expected: `(length,)`, products of step and change as they were expected to be; 0 where nothing was expected.
        largest: `()`, of the norms of the weights at the points that were measured.

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
        self.products = torch.zeros(length, length, dtype=torch.float64)
        self.expected = torch.zeros(length, dtype=torch.float64)
        self.told = torch.zeros(length, dtype=torch.bool)
        self.largest = torch.zeros((), dtype=torch.float64)
        self._new = torch.zeros(length, dtype=torch.bool)  # pairs that are not measured yet

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

    def end(self, gradients: Sequence[Tensor], expected: float = 0.0) -> None:
        """The gradient at the weights of :meth:`begin`, and what the product of step and change was expected to be."""
        record(self._pieces[1][1], gradients)
        if self.points:
            place = (self.points - 1) % len(self.steps)
            torch.sub(self._next[0], self._last[0], out=self.steps[place])
            torch.sub(self._next[1], self._last[1], out=self.changes[place])
            self.expected[place], self._new[place] = expected, True
        self._last, self._next = self._next, self._last
        self._pieces.reverse()
        self.points += 1

    def clear(self) -> None:
        """Begin anew."""
        self.points = 0
        for held in self.measured.values():
            held.zero_()

    def measure(self, ranks: Ranks | None) -> None:
        """Renew `products` and `told` for the pairs that were recorded since, and `largest` by the last point."""
        torch.fmax(self.largest, reductions.norms(self.weights[None], ranks)[0], out=self.largest)
        new = self._new.nonzero().squeeze(1).tolist()
        if not new:
            return
        count = self.pairs
        steps, changes = self.steps[:count], self.changes[:count]
        fresh, turned = (steps, changes) if len(new) == count else (steps[new], changes[new])
        self.products[:count, new] = reductions.products(steps, turned, ranks)
        least = CURVED * reductions.norms(fresh, ranks) * reductions.norms(turned, ranks)
        curved = self.products.diagonal()[new]
        for row in itertools.compress(new, (curved < -least).tolist()):
            for held in (self.changes[row], self.products[:, row]):
                held.neg_()
        self.told[new] = curved.isfinite() & (curved.abs() > least)
        for row in itertools.compress(new, (~curved.isfinite()).tolist()):  # else they spoil sums in which they are 0
            for held in (self.steps[row], self.changes[row], self.products[row], self.products[:, row]):
                held.zero_()
        self._new.zero_()

    def order(self) -> list[int]:
        """Rows of the pairs that tell of curvature, the oldest first."""
        newest, told, length = max(self.points - 1, 0), self.told.tolist(), len(self.steps)
        rows = (i % length for i in range(newest - min(newest, length), newest))
        return [row for row in rows if told[row]]

    @property
    def nbytes(self) -> int:
        small = sum(held.nbytes for held in self.measured.values())
        return self.steps.nbytes + self.changes.nbytes + 4 * self.weights.nbytes + small

    def state_dict(self) -> dict[str, Any]:
        """What has a column for each weight, and how many points there were."""
        held = {"steps": self.steps, "changes": self.changes, "weights": self.weights, "gradient": self.gradient}
        return {**held, "points": self.points}

    def load_state_dict(self, state: Any) -> None:
        for name in ("steps", "changes", "weights", "gradient"):
            getattr(self, name).copy_(state[name])
        self.points = int(state["points"])

    @property
    def measured(self) -> dict[str, Tensor]:
        """The rest of the state, whose size does not depend on the weights; to be written to as well."""
        held = {"products": self.products, "expected": self.expected, "largest": self.largest}
        return held | {"told": self.told, "new": self._new}


def nbytes_of(tensors: Sequence[Tensor], length: int, dtype: torch.dtype) -> int:
    """What so many pairs take, before any of it is taken."""
    finer = torch.promote_types(dtype, torch.float32).itemsize
    return sum(tensor.numel() for tensor in tensors) * (2 * length * dtype.itemsize + 4 * finer) if length else 0


def default_length(tensors: Sequence[Tensor], dtype: torch.dtype) -> int:
    """100 pairs, or as many as 16 MiB hold, but 10 at least; none where 64 MiB do not hold these.

    >>> [default_length([torch.zeros(size, device="meta")], torch.float32) for size in (10**3, 10**5, 10**6)]
    [100, 20, 0]
    """
    each = 2 * dtype.itemsize * sum(tensor.numel() for tensor in tensors)
    length = min(MOST_PAIRS, max(FEWEST_PAIRS, MANY_BYTES // max(1, each)))
    return length if length * each <= MOST_BYTES else 0


def gradients(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Any], factor: float = 1.0, decayed: bool = True
) -> list[Tensor]:
    """What the optimizer descends along, as far as this process holds it: dense, zeros where there is no gradient.

    Times the factor by which they had been clipped, with weight decay that is a part of the loss unless not `decayed`,
    and with the sign turned where the optimizer maximizes.

    >>> parameter = nn.Parameter(torch.ones(2))
    >>> gradients(torch.optim.SGD([parameter], lr=0.1, weight_decay=0.5), [parameter])
    [tensor([0.5000, 0.5000])]
    """
    groups, found = groups_of(optimizer), []
    for parameter in parameters:
        given, held, group = parameter.grad, local(parameter).detach(), groups.get(parameter, {})
        own = torch.zeros_like(held) if given is None else local(given)
        own = own.to_dense() if own.layout is not torch.strided else own
        own = -own if group.get("maximize") else own
        own = own if factor == 1 else own * factor
        decay = 0.0 if not decayed or decoupled(optimizer, group) else float(group.get("weight_decay", 0.0))
        found.append(own.add(held, alpha=decay) if decay else own)
    return found


def all_finite(parameters: Iterable[Any]) -> bool:
    """Whether all gradients are, as far as this process holds them; those that there are not yet do not count.

    >>> parameter = nn.Parameter(torch.ones(2))
    >>> parameter.grad = torch.tensor([1.0, float("nan")])
    >>> all_finite([nn.Parameter(torch.ones(1))]), all_finite([parameter])
    (True, False)
    """
    return sound(values(parameter) for parameter in parameters if parameter.grad is not None)


def sound(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers are finite; of no tensors they are.

    >>> sound([torch.ones(2), torch.tensor(float("inf"))])
    False
    """
    flags = [one.isfinite().all() for one in tensors]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())  # waits for a device once


def values(parameter: Any) -> Tensor:
    """The numbers of its gradient, as far as this process holds it; in float32 at least.

    >>> parameter = nn.Parameter(torch.ones(2))
    >>> parameter.grad = torch.tensor([0.0, 3.0]).to_sparse()
    >>> values(parameter)
    tensor([3.])
    """
    gradient = local(parameter.grad.detach())
    own = gradient if gradient.layout is torch.strided else gradient.coalesce().values()
    return own.to(torch.promote_types(own.dtype, torch.float32))


def decoupled(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether weight decay is beside the loss and not a part of it.

    >>> parameter = nn.Parameter(torch.ones(2))
    >>> [decoupled(made([parameter]), {}) for made in (torch.optim.Adam, torch.optim.AdamW)]
    [False, True]
    """
    return bool(group.get("decoupled_weight_decay")) or "AdamW" in type(optimizer).__name__


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
        direction: `(state,)`, to where the gradient would vanish if it were linear, as far from a saddle.
        pairs: how many it rests on.
        slope: of the loss along `direction`, by the gradient at `origin`.
        longest: how much of it a move may be.
    """

    origin: Tensor
    direction: Tensor
    pairs: int
    slope: float
    longest: float = 1.0


@torch.no_grad()
def as_trained(
    step: Step,
    optimizer: torch.optim.Optimizer,
    gradient: Tensor,
    parameters: Sequence[Tensor],
    weights: Sequence[Tensor],
    ranks: Ranks | None = None,
) -> Step:
    """The step with parameters left where they are that are not trained now, and with decay that is beside the loss.

    Args:
        step: for all of them.
        optimizer: that trains them.
        gradient: `(state,)`, at its origin.
        parameters: the trained ones, in the order of the columns.
        weights: what this process holds of them, as they are now.
        ranks: the processes that hold the other columns.

    >>> step = Step(torch.zeros(2), torch.ones(2), 1, -3.0)
    >>> one, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1), requires_grad=False)
    >>> optimizer = torch.optim.SGD([one, other], lr=0.1)
    >>> as_trained(step, optimizer, torch.tensor([-1.0, -2.0]), [one, other], [torch.ones(1), torch.ones(1)])
    Step(origin=tensor([0., 1.]), direction=tensor([1., 0.]), pairs=1, slope=-1.0, longest=1.0)
    """
    still, groups = frozen(optimizer, parameters), groups_of(optimizer)
    decays = [
        float(group["lr"]) * float(group["weight_decay"])
        if (group := groups.get(parameter, {})) and decoupled(optimizer, group)
        else 0.0
        for parameter in parameters
    ]
    if not any(still) and not any(decays):
        return step
    origin, direction = step.origin.clone(), step.direction.clone()
    sizes = [one.numel() for one in weights]
    places = zip(weights, origin.split(sizes), direction.split(sizes), still, decays, strict=True)
    for now, there, along, stays, decay in places:
        if stays:
            there.copy_(now.reshape(-1))
            along.zero_()
        elif decay:
            along.sub_(there, alpha=decay)
    return step._replace(origin=origin, direction=direction, slope=reductions.dot(gradient, direction, ranks))


@torch.no_grad()
def newton(secants: Secants, scaling: Tensor | None = None, ranks: Ranks | None = None) -> Step | None:
    """The step to the fixed point of gradient flow, as far as the pairs tell of it: self-scaled L-BFGS, no evaluation.

    Args:
        secants: with the last point recorded.
        scaling: `(state,)`, what the optimizer scales gradients by, up to a factor; None: nothing.
        ranks: the processes that hold the other columns.

    Returns:
        None where no pair tells of curvature, it is not finite, or it does not lead downhill.

    Source: Nocedal (1980), the two-loop recursion, whose loops are substitutions with the products of steps and changes
    (Byrd, Nocedal & Schnabel, 1994), so that the pairs are gone through all at once. Where a pair has less curvature
    than was expected, all curvature from before it is shrunk as much (Al-Baali, 1998). For a quadratic loss the
    generator of the flow's Koopman operator on the weights is minus the Hessian, whose action on the recorded span the
    pairs are. Negative curvature counts as positive (Dauphin et al., 2014, saddle-free Newton).

    >>> secants = Secants([torch.zeros(1)], 2, torch.float64, torch.device("cpu"))
    >>> for weight in (4.0, 3.0):
    ...     secants.begin([torch.tensor([weight])])
    ...     secants.end([2 * torch.tensor([weight])])
    >>> newton(secants).direction, newton(secants).longest
    (tensor([-3.], dtype=torch.float64), 0.3)
    """
    finer, gradient = secants.weights.dtype, secants.gradient
    secants.measure(ranks)
    kept = secants.order()
    if not kept:
        return None
    order = torch.tensor(kept)
    steps, changes = (rows[: secants.pairs] for rows in (secants.steps, secants.changes))
    recent = kept[-RECENT:]
    diagonal = first_guess([steps[row] for row in recent], [changes[row] for row in recent], scaling, finer)
    bends = secants.products[order[:, None], order].triu()  # with the changes that came later
    curved = bends.diagonal()
    # how much the inverse had to grow until each pair, from the oldest one on
    growth = (secants.expected[order] / curved).clamp_min(1.0)
    growth[0] = 1.0
    growth = growth.cumprod(dim=0)
    shares = _solved(bends, -reductions.products(steps, gradient[None], ranks).squeeze(1)[order])
    found = -gradient - _summed(shares, changes, order)
    oldest = changes[kept[0]].to(finer)
    found.mul_(diagonal).mul_((curved[0] / reductions.dot(oldest, diagonal * oldest, ranks)).item())
    turned = reductions.products(changes, found[None], ranks).squeeze(1)[order]
    found += _summed(_solved(bends.T, curved * shares / growth - turned, upper=False), steps, order)
    found.mul_(growth[-1].item())
    slope = reductions.dot(gradient, found, ranks)
    if not slope < 0:
        return None
    reach, far = FARTHEST * secants.largest.item(), reductions.norms(found[None], ranks).item()
    return Step(secants.weights, found, len(kept), slope, min(1.0, reach / far) if reach else 1.0)


def first_guess(
    steps: Sequence[Float[Tensor, " state"]],
    changes: Sequence[Float[Tensor, " state"]],
    scaling: Float[Tensor, " state"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, " state"]:
    """The inverse curvature that the pairs are to correct, weight by weight and up to a factor.

    The root mean square of the steps over that of the changes; with the optimizer's own scaling the geometric mean of
    both, as that is of all of the run so far, and this of the last steps only. Of that a power below 1, so that weights
    that the loss hardly depends on stay nearer to where they were. 0 where the gradient did not change.

    >>> steps = [torch.tensor([16.0, 1.0])]
    >>> changes = [torch.tensor([1.0, 0.0])]
    >>> first_guess(steps, changes, None, torch.float32)
    tensor([8., 0.])
    >>> first_guess(steps, changes, torch.tensor([16.0**3, 1.0]), torch.float32)
    tensor([64.,  0.])
    """
    moved, turned = (_squares(rows, dtype).sqrt_() for rows in (steps, changes))
    found = torch.where(turned > 0, moved.div_(turned.clamp_min(torch.finfo(dtype).tiny)), 0.0)
    found = found if scaling is None else found.sqrt_().mul_(scaling.to(dtype).sqrt())
    return found.pow_(TEMPERED)


def _squares(rows: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of squares down each column, row by row: norms along the first dimension take ten times as long."""
    total = torch.zeros_like(rows[0], dtype=dtype)
    for row in rows:
        own = row.to(dtype)
        total.addcmul_(own, own)
    return total


def _solved(triangle: Tensor, right: Tensor, upper: bool = True) -> Tensor:
    """One of the two loops, as a substitution."""
    return torch.linalg.solve_triangular(triangle, right[:, None], upper=upper).squeeze(1)


def _summed(shares: Tensor, rows: Tensor, order: Tensor) -> Tensor:
    """Rows times shares that are in the order of time, as far as there are any."""
    placed = shares.new_zeros(len(rows))
    placed[order] = shares
    if rows.dtype.itemsize < torch.float32.itemsize:
        return linalg.combine(placed.to(rows.device), rows, torch.float32)
    return placed.to(rows) @ rows  # without float64 copies of the pairs
