"""Moves of Adam made in the eigenbases of each weight matrix's gradients, where its own scale single weights."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from koopt import linalg, sharding
from koopt.live.budget import at_doubling
from koopt.live.secants import gradients, sound
from koopt.live.skipping import flag, groups_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxtyping import Float
    from torch import Tensor

LARGEST = 256  # side whose basis is found by default: to multiply by one takes as long as to forward as many examples
LONGER = 4  # times that, of a weight so small that this takes no longer than for a square one
SHARE, LONGEST = 4, 2048  # examples of a step for each row or column of longer sides, which take so little then
FIRST = 10  # gradients before the first bases
EVERY, SAMPLED = 10, 2  # steps between new bases, and between gradients that these are made from
MEMORY = 0.98  # of the averages, a step
WORTH = 0.9  # roots of squares in the bases, over those in the weights' own coordinates, from which bases bring nothing
FLOOR = 1e-6  # of the largest entry: what is smaller is rounding, and is not scaled up
REPLACED = (torch.optim.Adam, torch.optim.AdamW)  # as they are, and none derived from them
COUNTS = ("seen", "taken", "used")
log = logging.getLogger("koopt")


@dataclass(eq=False)
class Matrix:
    """The gradients of a weight, taken as a matrix of its first dimension by the others.

    Attributes:
        products: `(rows, rows)` and `(columns, columns)`, averages of the gradient times its transpose, and of the
            transpose times it; None of a side that is too long.
        bases: their eigenvectors as columns.
        momentum: `(rows, columns)`, Adam's, in the bases.
        squares: `(rows, columns)`, the average of squared gradients in the bases.
        plain: `(rows, columns)`, the same in the weights' own coordinates.
        seen: how many gradients the products are of.
        taken: steps with a gradient.
        used: whether moves are made in the bases.
    """

    products: tuple[Tensor | None, Tensor | None]
    bases: tuple[Tensor | None, Tensor | None]
    momentum: Tensor
    squares: Tensor
    plain: Tensor
    seen: int = 0
    taken: int = 0
    used: bool = True

    @classmethod
    def of(cls, parameter: Tensor, largest: int, examples: int = 0) -> Matrix:
        """With nothing seen.

        >>> Matrix.of(torch.zeros(2, 9, 9), largest=20).products
        (tensor([[0., 0.],
                [0., 0.]]), None)
        """
        dtype, zeros = torch.promote_types(parameter.dtype, torch.float32), parameter.detach().new_zeros
        sides, short = _sides(parameter), short_sides(parameter, largest, examples)

        def squared(side: int) -> Tensor | None:
            return zeros(side, side, dtype=dtype) if side in short else None

        products, bases = ((squared(sides[0]), squared(sides[1])) for _ in range(2))
        momentum, squares, plain = (zeros(sides, dtype=dtype) for _ in range(3))
        return cls(products, bases, momentum, squares, plain)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is held, by name."""
        names = ("row_products", "column_products", "row_basis", "column_basis")
        sides = zip(names, (*self.products, *self.bases), strict=True)
        held = {name: one for name, one in sides if one is not None}
        return held | {"momentum": self.momentum, "squares": self.squares, "plain": self.plain}

    @property
    def known(self) -> list[Tensor]:
        """The products of sides that are short enough."""
        return [product for product in self.products if product is not None]

    def see(self, gradient: Float[Tensor, "rows columns"], decay: float) -> None:
        """Take a gradient into the products, in which the first ones weigh alike."""
        decay = min(decay, 1 - 1 / (self.seen + 1))
        self.seen += 1
        for product, own in zip(self.products, (gradient, gradient.mT), strict=True):
            if product is not None:
                product.addmm_(own, own.mT, beta=decay, alpha=1 - decay)

    def begin(self, squares: Float[Tensor, "rows columns"]) -> None:
        """The first bases, and what squared gradients are in them if their average is a product of its margins.

        Raises:
            torch.linalg.LinAlgError: if the eigenvectors are not found.

        >>> matrix = Matrix.of(torch.zeros(2, 1), largest=2)
        >>> matrix.see(torch.tensor([[3.0], [4.0]]), decay=0.5)
        >>> matrix.begin(torch.tensor([[9.0], [16.0]]))
        >>> matrix.squares.round()
        tensor([[25.],
                [ 0.]])
        """
        tiny = torch.finfo(squares.dtype).tiny  # where there are no gradients
        total, margins = squares.sum().clamp_min(tiny), [squares.sum(1), squares.sum(0)]
        for side, (product, basis) in enumerate(zip(self.products, self.bases, strict=True)):
            if product is not None and basis is not None:
                values, vectors = linalg.eigh_there(product)
                basis.copy_(vectors.flip(1))  # the largest first, which an iteration keeps apart best
                shares = values.flip(0).clamp_min(0.0)
                margins[side] = shares * (total / shares.sum()).nan_to_num(0.0, 0.0, 0.0)
        self.squares.copy_(torch.outer(margins[0], margins[1] / total))
        self.plain.copy_(squares)
        self.used = True

    def renew(self) -> None:
        """The bases some steps later: one orthogonal iteration, after which columns still mean about the same.

        They are of use where they part large entries of gradients to come from small ones, so that roots of squares
        have a smaller sum than in the weights' own coordinates: among all bases it is smallest where entries are
        uncorrelated.
        """
        self.used = bool(self.squares.sqrt().sum() <= WORTH * self.plain.sqrt().sum())
        for product, basis in zip(self.products, self.bases, strict=True):
            if product is not None and basis is not None and is_due(self.taken // EVERY, len(basis)):
                basis.copy_(torch.linalg.qr(product @ basis)[0])

    def turned(self, matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """In the bases."""
        rows, columns = self.bases
        matrix = matrix if rows is None else rows.mT @ matrix
        return matrix if columns is None else matrix @ columns

    def move(self, epsilon: float) -> Float[Tensor, "rows columns"]:
        """Momentum over the root of the squares, in the weights' own coordinates."""
        roots = self.squares.sqrt()
        roots += (FLOOR * roots.amax()).add_(epsilon)
        rows, columns = self.bases
        found = torch.div(self.momentum, roots, out=roots)
        found = found if rows is None else rows @ found
        return found if columns is None else found @ columns.mT


class Averages(NamedTuple):
    """What Adam holds of a parameter, and what it makes a move of that by."""

    momentum: Tensor
    squares: Tensor
    corrected: float  # what the squares are divided by
    rate: float  # what the move is multiplied by
    beta: float
    epsilon: float

    @classmethod
    def of(cls, group: Mapping[str, Any], state: Mapping[str, Any], taken: float) -> Averages:
        beta1, beta2 = map(float, group["betas"])
        rate = float(group["lr"]) / (1 - beta1**taken)
        return cls(state["exp_avg"], state["exp_avg_sq"], 1 - beta2**taken, rate, beta1, float(group["eps"]))


class Eigenbases:
    """Replaces moves of Adam by those that it makes in the eigenbases of the gradients' products.

    Adam scales each weight by the size of its gradients. In these bases entries of a gradient are nearly uncorrelated,
    so that scaling them one by one comes near to multiplying by an inverse curvature. What the optimizer holds is left
    as it is, so that its own moves can follow at any time.

    Args:
        optimizer: whose moves they are, one of `REPLACED`.
        named: the parameters by name.
        largest: side whose basis is found, of a weight as a matrix of its first dimension by the others; of small
            weights up to four times that, where multiplying takes no longer than for a square one.

    Attributes:
        examples: by name, of all matrices that are held whole: how many of a step go through them, as far as is known.
        matrices: by name, of those that have such a side, or one that is short beside the examples.
        steps: at which moves were replaced.

    Source: Vyas et al. (2024), SOAP; the products are those of Gupta et al. (2018), Shampoo.

    >>> weight = nn.Parameter(torch.ones(2, 2))
    >>> optimizer = torch.optim.Adam([weight], lr=0.1)
    >>> held = Eigenbases(optimizer, {"weight": weight}, largest=2)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     weight.sum().square().backward()
    ...     optimizer.step()
    ...     held.replace()
    >>> held.steps
    11
    """

    def __init__(self, optimizer: torch.optim.Optimizer, named: Mapping[str, Any], largest: int) -> None:
        self._optimizer, self._largest = optimizer, largest
        self._parameters = {name: one for name, one in named.items() if is_matrix(one)}
        self.examples = dict.fromkeys(self._parameters, 0)
        self.matrices = self._made(self._parameters, self.examples)
        self.steps = 0

    def pass_through(self, examples: Mapping[str, int]) -> None:
        """So many examples of a step go through each weight: sides that are short beside them get a basis, too."""
        changed = {
            name: one
            for name, one in self._parameters.items()
            if short_sides(one, self._largest, examples[name]) != short_sides(one, self._largest, self.examples[name])
        }
        kept = {name: held for name, held in self.matrices.items() if name not in changed}
        self.examples, self.matrices = dict(examples), kept | self._made(changed, examples)

    def needed(self, examples: Mapping[str, int]) -> int:
        """Bytes, with so many examples."""
        return sum(nbytes_of(one, self._largest, examples[name]) for name, one in self._parameters.items())

    def _made(self, parameters: Mapping[str, Tensor], examples: Mapping[str, int]) -> dict[str, Matrix]:
        """Matrices with nothing seen."""
        return {
            name: Matrix.of(one, self._largest, examples[name])
            for name, one in parameters.items()
            if short_sides(one, self._largest, examples[name])
        }

    @torch.no_grad()
    def replace(self, jumped: bool = False) -> None:
        """The optimizer has made a move: give it up for the one in the eigenbases, once these are known.

        Args:
            jumped: whether its momentum may have been changed since the last one.
        """
        groups, replaced = groups_of(self._optimizer), False
        given = self._given(groups)
        flagged = flag(self._optimizer)
        if not given or (flagged is not None and bool(flagged)):  # waits for the device
            return
        parameters = list(given.values())
        taken = _numbers([self._optimizer.state[parameter]["step"] for parameter in parameters])
        with torch.autocast(parameters[0].device.type, enabled=False):
            found = gradients(self._optimizer, parameters)
            for (name, parameter), gradient, count in zip(given.items(), found, taken, strict=True):
                if self.matrices[name].squares.device != parameter.device:
                    self.matrices[name] = Matrix.of(parameter, self._largest, self.examples[name])
                state = self._optimizer.state[parameter]
                averages = Averages.of(groups[parameter], state, count)
                replaced |= self._replaced(parameter, gradient, averages, self.matrices[name], jumped)
        if replaced and not self.steps:
            log.info("moves are made in the eigenbases of %d weights from now on", len(self.matrices))
        self.steps += replaced

    def clear(self) -> None:
        """What was seen is too old by now."""
        for held in self.matrices.values():
            held.seen = 0

    @property
    def seen(self) -> bool:
        """Whether any gradient has been."""
        return any(held.seen for held in self.matrices.values())

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for held in self.matrices.values() for one in held.tensors.values())

    def state_dict(self, whole: bool = True) -> dict[str, Any]:
        """All that is known; not `whole`: but for what was seen of gradients."""
        return self._state(self.matrices if whole else {}, self.examples)

    def like(self, state: Any) -> dict[str, Any]:
        """What a state has to be like that has so many examples: tensors of the same shapes, which take no memory."""
        given = state if isinstance(state, dict) else {}
        examples = given["examples"] if _counts(given.get("examples"), self.examples) else self.examples
        weights = {name: one.detach().to("meta") for name, one in self._parameters.items()}
        return self._state(self._made(weights, examples) if given.get("values") else {}, examples)

    def _state(self, matrices: Mapping[str, Matrix], examples: Mapping[str, int]) -> dict[str, Any]:
        counts = {name: {key: getattr(held, key) for key in COUNTS} for name, held in matrices.items()}
        values = {name: {key: one.clone() for key, one in held.tensors.items()} for name, held in matrices.items()}
        return {"steps": self.steps, "examples": dict(examples), "counts": counts, "values": values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; where nothing was seen of gradients, bases are found anew."""
        self.steps = state["steps"]
        self.pass_through(state["examples"])
        self.clear()
        for name, values in state["values"].items():
            held = self.matrices[name]
            for key in COUNTS:
                setattr(held, key, state["counts"][name][key])
            for key, one in held.tensors.items():
                one.copy_(values[key])

    def _given(self, groups: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
        """The parameters that have a gradient, and Adam's averages of it."""
        return {
            name: one
            for name, one in self._parameters.items()
            if name in self.matrices
            and one.grad is not None
            and "exp_avg_sq" in self._optimizer.state.get(one, {})
            and not groups.get(one, {}).get("amsgrad", True)
        }

    def _replaced(self, parameter: Tensor, gradient: Tensor, averages: Averages, held: Matrix, jumped: bool) -> bool:
        """Whether there are bases yet, and they are of use."""
        gradient, momentum, squares = (
            one.reshape(held.squares.shape).to(held.squares.dtype)
            for one in (gradient, averages.momentum, averages.squares)
        )
        held.taken += 1
        begins, renews = held.seen == FIRST - 1, held.taken % EVERY == 0
        if held.seen < FIRST or held.taken % SAMPLED == 0:
            held.see(gradient, MEMORY**SAMPLED)
        if held.seen < FIRST:
            return False
        if (begins or renews) and not sound([*held.known, squares if begins else held.squares]):
            held.seen = 0
            return False
        if begins:
            try:
                held.begin(squares / averages.corrected)
            except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage], as it is documented
                log.warning("the optimizer's moves are kept for a weight: %.200s", error)
                held.seen = 0
                return False
        elif renews:
            held.renew()
        turned = held.turned(gradient)
        held.squares.mul_(MEMORY).addcmul_(turned, turned, value=1 - MEMORY)
        held.plain.mul_(MEMORY).addcmul_(gradient, gradient, value=1 - MEMORY)
        if begins or renews or jumped:
            held.momentum.copy_(held.turned(momentum))
            # momentum of gradients that the squares are not of would be scaled up without bound
            torch.maximum(held.squares, held.momentum.square(), out=held.squares)
        else:
            held.momentum.lerp_(turned, 1 - averages.beta)
        if not held.used:
            return False
        own = momentum / squares.sqrt().mul_(1 / math.sqrt(averages.corrected)).add_(averages.epsilon)
        change = own.sub_(held.move(averages.epsilon)).mul_(averages.rate)
        parameter.add_(change.nan_to_num_(0.0, 0.0, 0.0).view(parameter.shape))  # else all that follows would be lost
        return True


def is_due(time: int, side: int) -> bool:
    """Whether a basis is renewed at the `time`-th occasion: the longer, the rarer, but at first often enough.

    >>> [time for time in range(1, 20) if is_due(time, 600)]
    [1, 2, 4, 5, 8, 10, 15, 16]
    """
    return time % max(1, round((side / LARGEST) ** 2)) == 0 or at_doubling(time)


def replaces(optimizer: torch.optim.Optimizer) -> bool:
    """Whether moves of an optimizer can be replaced.

    >>> parameter = nn.Parameter(torch.ones(2))
    >>> replaces(torch.optim.AdamW([parameter])), replaces(torch.optim.NAdam([parameter]))
    (True, False)
    """
    return type(optimizer) in REPLACED


def is_matrix(parameter: Tensor) -> bool:
    """Whether a weight is one, and held whole.

    >>> [is_matrix(torch.zeros(shape)) for shape in ((20,), (8, 3, 9, 9))]
    [False, True]
    """
    return parameter.dim() > 1 and parameter.numel() > 0 and not sharding.is_sharded(parameter)


def short_sides(parameter: Tensor, largest: int, examples: int = 0) -> list[int]:
    """Those of a matrix that are more than 1 and at most so many, or longer where it is small, or beside the examples.

    >>> [short_sides(torch.zeros(shape), largest=20) for shape in ((8, 300), (30, 27), (1, 80))]
    [[8], [], [80]]
    >>> short_sides(torch.zeros(8, 300), largest=20, examples=1200)
    [8, 300]
    """
    sides, entries = _sides(parameter), parameter.numel()
    longest = min(examples // SHARE, LONGEST)
    return [s for s in sides if 1 < s <= max(longest, LONGER * largest if entries * s <= largest**3 else largest)]


def nbytes_of(parameter: Tensor, largest: int, examples: int = 0) -> int:
    """What is held for a weight.

    >>> [nbytes_of(torch.zeros(shape), largest=20) for shape in ((3, 2), (3,))]
    [176, 0]
    """
    sides = short_sides(parameter, largest, examples) if is_matrix(parameter) else []
    entries = 3 * parameter.numel() + 2 * sum(side**2 for side in sides) if sides else 0
    return entries * max(parameter.element_size(), torch.float32.itemsize)


def _counts(given: Any, examples: Mapping[str, int]) -> bool:
    """Whether they are numbers of examples of the same weights."""
    alike = isinstance(given, dict) and given.keys() == examples.keys()
    return alike and all(type(count) is int and count >= 0 for count in given.values())


def _numbers(counts: Sequence[Any]) -> list[float]:
    """Counts of steps, which fused optimizers keep on their device, waiting for it once."""
    if isinstance(counts[0], torch.Tensor):
        return torch.stack(list(counts)).tolist()
    return [float(count) for count in counts]


def _sides(parameter: Tensor) -> tuple[int, int]:
    return len(parameter), parameter[0].numel()
