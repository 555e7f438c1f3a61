"""What a live run proposes: forecasters over a window, the coefficients of each, and which are worth trying."""

from __future__ import annotations

import math
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from koopt import distributed, exchange, linalg, reductions
from koopt.forecasters import METHODS
from koopt.operator import fit_in_form, leading

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor

    from koopt.exchange import Ranks

START = 4 / 3  # the first horizon of a jump, in lengths of the tail
LONGEST, SHORTEST = 200.0, 0.1
RANKS = (4, 3, 1, 8)
NOISE = 0.3  # increments that are forecast with a larger relative error are called noise
LEAST_SINGULAR = 1e-6  # share of the largest; from a Gram matrix those below have lost all but 4 digits
SAMPLE = 4096  # weights that tell noise from motion
FEWEST = 6  # snapshots for a jump


class Candidate(NamedTuple):
    """A forecaster; its horizon in lengths of the window it sees, the last `share` of what is held."""

    method: str
    horizon: float
    options: dict[str, Any]
    share: float = 1.0

    @property
    def rank(self) -> int | None:
        return self.options.get("rank")


FAMILIES = (
    Candidate("koopman", START, {"rank": RANKS[0], "difference": True}),
    Candidate("line", START, {"span": 10}),
    *(Candidate("anderson", math.inf, {"regularization": share}) for share in (1e-6, 1e-3, 1e-10)),
    *(Candidate("koopman", START, {"rank": rank, "difference": True}) for rank in RANKS[1:]),
    Candidate("regression", START, {}),
    Candidate("koopman", math.inf, {"rank": RANKS[0], "difference": True}),
    Candidate("dema", START, {}),
    Candidate("mean", 0.0, {}),
)


class Proposer:
    """Coefficients of candidates over one window, each operator fitted once.

    Args:
        snapshots: `(time, state)`, finite, at least two.
        ranks: the processes that hold the other columns.
        every: optimizer steps from one snapshot to the next.

    >>> Proposer(torch.arange(8.0)[:, None]).coefficients(Candidate("line", 1.0, {"span": 7})).tolist()
    [-1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0]
    """

    def __init__(self, snapshots: Float[Tensor, "time state"], ranks: Ranks | None = None, every: int = 1) -> None:
        self.time, self.every = len(snapshots), every
        self.snapshots, self.ranks = snapshots, ranks
        self.path = _path(snapshots, ranks)
        last = reductions.norm(snapshots[-1], ranks)
        self._rounding = torch.finfo(snapshots.dtype).eps * last
        self._operators: dict[tuple[Any, ...], Any] = {}

    def coefficients(self, candidate: Candidate) -> Float[Tensor, " time"] | None:
        """One number a snapshot; None where the rule has no answer, as an operator that grows has no fixed point."""
        return distributed.agreed(self._found(candidate), self.time, self.ranks)

    def ahead(self, candidate: Candidate, coefficients: Float[Tensor, " time"]) -> float:
        """How many optimizer steps a move stands for: its horizon, but no more than its length has mean increments.

        >>> proposer, line = Proposer(torch.arange(8.0)[:, None]), Candidate("line", 1.0, {"span": 7})
        >>> round(proposer.ahead(line, proposer.coefficients(line)), 3)
        7.0
        """
        usual = float(self.path.diff(dim=0).norm(dim=-1).mean())
        length = float((coefficients.to(self.path) @ self.path).norm())
        steps = self.every * min(length / usual if usual else 0.0, candidate.horizon * (self.time - 1))
        return float(exchange.first(torch.tensor(steps, dtype=torch.float64, device="cpu"), self.ranks))

    def _found(self, candidate: Candidate) -> Tensor | None:
        tail = max(2, round(candidate.share * self.time))
        horizon = candidate.horizon * (tail - 1)
        if math.isfinite(horizon) and abs(horizon - round(horizon)) < 1e-9 * horizon:
            horizon = round(horizon)  # whole steps go by powers
        try:
            if candidate.method == "koopman":
                found = self._koopman(candidate.options, tail, horizon)
            else:
                options = dict(candidate.options)
                if "span" in options:
                    options["span"] = min(options["span"], tail - 1)
                found = METHODS[candidate.method](self.path[-tail:], horizon, **options)
        except (ValueError, torch.linalg.LinAlgError):  # pyright: ignore[reportPrivateImportUsage], which torch documents
            return None
        if not bool(found.isfinite().all()):
            return None
        return torch.nn.functional.pad(found, (self.time - tail, 0))

    def _koopman(self, options: dict[str, Any], tail: int, horizon: float) -> Tensor:
        given = dict(options)
        rank, max_modulus = given.pop("rank"), given.pop("max_modulus", None)
        key = (tail, *given.items())
        if key not in self._operators:
            # increments do not see the reference, but states do: they need the weights themselves
            differences = given.get("difference", False)
            rows = (
                self.path[-tail:] if differences else reductions.triangular_factor(self.snapshots[-tail:], self.ranks)
            )
            moved = rows.diff(dim=0).norm().item()
            size = moved if differences else rows.norm().item()
            least = LEAST_SINGULAR if differences else linalg.EPS
            rtol = linalg.share_of_rounding(self._rounding, tail, size, least)
            self._operators[key] = fit_in_form(rows, snapshot_form=True, rank=max(RANKS), rtol=rtol, **given)
        return leading(self._operators[key], rank).coefficients(horizon, max_modulus)


def _path(snapshots: Tensor, ranks: Ranks | None) -> Tensor:
    """The snapshots relative to the last one, in an orthonormal basis, by the Gram matrix of their increments.

    Near-straight motion is small beside the weights, but not in increments, whose Gram matrix is several times cheaper
    than an orthogonal factor and good enough for the few directions that a jump uses.
    """
    squared = reductions.gram(snapshots, ranks, lambda rows: rows.diff(dim=-2))
    if not bool(squared.isfinite().all()):
        return torch.full_like(squared, math.nan)
    path = torch.nn.functional.pad(linalg.factor_of_gram(squared).cumsum(dim=0), (0, 0, 1, 0))
    return path - path[-1]


def smooth(snapshots: Float[Tensor, "time state"], ranks: Ranks | None = None) -> tuple[int, float]:
    """How often snapshots have to be paired until they move smoothly, and how rough they are then.

    At high rates training oscillates across the valley that it descends, on full batches too; in means of a few
    snapshots that cancels, which noise does not, once the means are longer than momentum lasts.

    Args:
        snapshots: `(time, state)`; of many weights some 4,096, evenly spaced, are looked at.
        ranks: the processes that hold the other columns.

    Returns:
        Where none are smooth that are enough for a jump, 0 and the roughness of the snapshots themselves.

    >>> times = torch.arange(30.0)[:, None]
    >>> halvings, rough = smooth(times + 0.4 * torch.sin(7 * times**2))
    >>> halvings, rough < 0.3
    (1, True)
    """
    rows, halvings = reductions.sample(snapshots, SAMPLE, ranks).clone(), 0
    first = rough = roughness(rows)
    while rough > NOISE and len(rows) >= 2 * FEWEST:
        rows, halvings = paired(rows), halvings + 1
        rough = roughness(rows)
    return (0, first) if rough > NOISE else (halvings, rough)


def block_after(block: int, halvings: int, rough: float) -> int:
    """Whether the next snapshots are single steps or means of two, after those had to be paired so often.

    Single steps are half the work and show the fastest motion; means of two reach twice as far back, and are smoother.
    Where one is rough, the other is tried.

    >>> block_after(1, 0, 0.0), block_after(1, 1, 0.0), block_after(1, 0, 0.9), block_after(2, 0, 0.9)
    (1, 2, 2, 1)
    """
    if rough > NOISE:
        return 2 if block == 1 else 1
    return 2 if halvings else block


def paired(snapshots: Float[Tensor, "time state"]) -> Float[Tensor, "half state"]:
    """Means of two successive snapshots, in the place of the first of them; of an odd number the oldest is left out.

    >>> paired(torch.arange(5.0)[:, None]).flatten()
    tensor([1.5000, 3.5000])
    """
    half = len(snapshots) // 2
    given = snapshots[len(snapshots) % 2 :]
    for i in range(half):
        torch.add(given[2 * i], given[2 * i + 1], out=given[i]).div_(2)
    return given[:half]


def unpaired(coefficients: Float[Tensor, " time"], size: int, time: int) -> Float[Tensor, " all"]:
    """The coefficients of the snapshots whose means have these.

    >>> unpaired(torch.tensor([-1.0, 2.0]), size=2, time=5)
    tensor([ 0.0000, -0.5000, -0.5000,  1.0000,  1.0000])
    """
    each = (coefficients / size).repeat_interleave(size)
    return torch.nn.functional.pad(each, (time - len(each), 0))


def roughness(snapshots: Float[Tensor, "time state"]) -> float:
    """How badly the newer increments are forecast, one step ahead, from the older half: about 0 if smooth, 1 if noise.

    The better of a linear map of rank 4 and of no change at all, root mean square error over root mean square size.
    Momentum makes noise look like drift over a few steps; what is new in each increment it does not hide.

    Args:
        snapshots: `(time, state)`.

    Returns:
        A number >= 0; 0 without motion, NaN where a snapshot is not finite.

    >>> roughness(torch.arange(9.0)[:, None] ** 2) < 0.3
    True
    """
    squared = linalg.gram(snapshots, lambda rows: rows.diff(dim=-2))
    if not bool(squared.isfinite().all()):
        return math.nan
    steps = linalg.factor_of_gram(squared)
    half = len(steps) // 2
    size = steps[half:].norm().item()
    if half < 2 or size == 0:
        return 0.0
    left, values, right = linalg.svd(steps[: half - 1])
    inverse = torch.where(values[:4] > linalg.EPS * values[0], 1 / values[:4], 0.0)
    forecast = (steps[half - 1 : -1] @ right[:, :4]) * inverse @ (left[:, :4].mT @ steps[1:half])
    errors = [(guess - steps[half:]).norm().item() for guess in (forecast, steps[half - 1 : -1])]
    return min(errors) / size


class Choice:
    """What earlier attempts have taught: how much each family gained, when it was tried, and how far ahead was best.

    >>> choice = Choice()
    >>> choice.learn(3, 0.5, 2.0)
    >>> choice.pick(2), choice.horizons[3]
    ([3, 0], 2.0)
    """

    def __init__(self) -> None:
        self.gains = [0.0] * len(FAMILIES)
        self.tried = [0] * len(FAMILIES)
        self.horizons = [family.horizon for family in FAMILIES]
        self._clock = 0

    def pick(self, count: int) -> list[int]:
        """Two thirds by gain, the others by how long ago they were tried, the first of the list first."""
        order = range(len(self.gains))
        best = [i for i in sorted(order, key=lambda i: -self.gains[i]) if self.gains[i] > 0]
        best = best[: math.ceil(2 * count / 3)]
        rest = [i for i in sorted(order, key=lambda i: self.tried[i]) if i not in best]
        return (best + rest)[:count]

    def learn(self, index: int, gain: float, horizon: float) -> None:
        """What a family's best horizon brought, as the logarithm of the loss before over that after."""
        self._clock += 1
        gain = max(-1.0, min(gain, 3.0))
        self.gains[index] = 0.5 * self.gains[index] + 0.5 * gain if self.tried[index] else gain
        self.tried[index] = self._clock
        self.horizons[index] = horizon

    def state_dict(self) -> dict[str, Any]:
        lists = {"gains": list(self.gains), "tried": list(self.tried), "horizons": list(self.horizons)}
        return lists | {"clock": self._clock}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gains, self.tried = list(state["gains"]), list(state["tried"])
        self.horizons, self._clock = list(state["horizons"]), int(state["clock"])


def finite(loss: float) -> float:
    """The loss, and Inf for all that is none: NaN and -Inf are no better than it.

    >>> finite(float("-inf"))
    inf
    """
    return loss if math.isfinite(loss) else math.inf


def gain(before: float, after: float) -> float:
    """The logarithm of the loss before over that after, or their relative difference where one is not positive.

    >>> round(gain(2.0, 1.0), 3)
    0.693
    """
    if not math.isfinite(after):
        return -math.inf
    if before > 0 and after > 0:
        return math.log(before / after)
    return (before - after) / max(abs(before), abs(after)) if before != after else 0.0


def displaced(snapshots: Float[Tensor, "time state"], now: Float[Tensor, " state"]) -> Float[Tensor, "time state"]:
    """The snapshots relative to the weights as they are, in their place.

    >>> displaced(torch.tensor([[1.0], [3.0]]), torch.tensor([4.0])).flatten()
    tensor([-3., -1.])
    """
    return snapshots.sub_(now)


def moved(
    parameters: Sequence[Tensor],
    displacements: Float[Tensor, "time state"],
    coefficients: Float[Tensor, " time"],
    ranks: Ranks | None = None,
) -> list[Tensor] | None:
    """The weights now plus what the coefficients make of the displacements.

    Displacements are small beside the weights, so their own digits do, which is several times quicker than float64.

    Args:
        parameters: the weights as they are, in their own dtype.
        displacements: `(time, state)`, of :func:`displaced`.
        coefficients: `(time,)`, which sum to 1.
        ranks: the processes that hold the other columns.

    Returns:
        A tensor a parameter, in its dtype; None if one is not finite, in any process.
    """
    given = coefficients.to(displacements.device)
    if displacements.dtype.itemsize < 4:
        change = linalg.combine(given, displacements, torch.float32)
    else:
        change = given.to(displacements.dtype) @ displacements
    return cast(parameters, change, ranks, add=True)


def combined(
    parameters: Sequence[Tensor],
    snapshots: Float[Tensor, "time state"],
    coefficients: Float[Tensor, " time"],
    ranks: Ranks | None = None,
) -> list[Tensor] | None:
    """The combination of the snapshots, in the shapes and dtypes of the parameters; None if one is not finite."""
    dtypes = {parameter.dtype for parameter in parameters}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float64
    flat = linalg.combine(coefficients.to(snapshots.device), snapshots, dtype)
    return cast(parameters, flat, ranks, add=False)


@torch.no_grad()
def cast(parameters: Sequence[Tensor], flat: Tensor, ranks: Ranks | None, add: bool) -> list[Tensor] | None:
    """The pieces of `flat`, which is used up, in the shapes and dtypes of the parameters; None if one is not finite."""
    sizes = [parameter.numel() for parameter in parameters]
    if add:
        dtypes = {parameter.dtype for parameter in parameters}
        flat = flat.to(reduce(torch.promote_types, dtypes, flat.dtype))  # no digit of theirs is lost
        for piece, parameter in zip(flat.split(sizes), parameters, strict=True):
            piece.add_(parameter.reshape(-1).to(piece.device))
    alike = len({(parameter.device, parameter.dtype) for parameter in parameters}) == 1
    if alike:
        flat = flat.to(parameters[0].device, parameters[0].dtype)  # at once, which is quicker than one by one
    pieces = zip(flat.split(sizes), parameters, strict=True)
    values = [piece.to(p.device, p.dtype).view(p.shape) for piece, p in pieces]
    finite = all(linalg.all_finite(value) for value in ([flat] if alike else values))
    return values if distributed.everywhere(finite, ranks) else None
