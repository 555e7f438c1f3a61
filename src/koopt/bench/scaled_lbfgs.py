"""Self-scaled L-BFGS: a quasi-Newton optimizer for full-batch losses, one iteration a step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lbfgs import _strong_wolfe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from jaxtyping import Float
    from torch import Tensor

LEAST_CURVATURE = 1e-12  # of a pair, relative to its lengths
TRIES = 25  # evaluations of a line search at most


class ScaledLBFGS(torch.optim.Optimizer):
    """L-BFGS in which each update first shrinks the curvature that the ones before had too large.

    L-BFGS scales its first guess anew at each iteration by the last pair, which throws away what the other pairs say of
    directions outside their span. Here the first guess is that of the oldest pair, and the estimate B is multiplied by
    ``min(1, s.y / s.B s)`` before each update. The line search is torch's, with strong Wolfe conditions; the loss and
    the gradient at the point that it found are kept, so that no evaluation is made twice, as long as the weights and
    the loss do not change between steps. For noisy losses it is of no use.

    Args:
        params: the parameters, one group, all on one device.
        history: how many pairs are held, two copies of the weights each; a few hundred are better than torch's 10.

    Raises:
        ValueError: if `history` is not a whole number >= 1, or there are several parameter groups.

    Source: Al-Baali (1998), numerical experience with self-scaling quasi-Newton methods; Nocedal (1980) for the memory.

    >>> weight = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    >>> optimizer = ScaledLBFGS([weight])
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (weight.square() * torch.tensor([1.0, 100.0])).sum()
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(10):
    ...     _ = optimizer.step(closure)
    >>> bool(closure() < 1e-12)
    True
    """

    def __init__(self, params: Iterable[Any], history: int = 400) -> None:
        if isinstance(history, bool) or not isinstance(history, int) or history < 1:
            raise ValueError(f"history is {history!r}, expected a whole number >= 1, such as 400")
        super().__init__(params, {"history": history})
        if len(self.param_groups) != 1:
            raise ValueError(f"params has {len(self.param_groups)} groups, expected one: curvature is of all weights")
        self._parameters: list[Any] = self.param_groups[0]["params"]

    def step(self, closure: Callable[[], Any]) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride], torch lets it be None
        """One iteration: a direction and a line search, most often of one evaluation.

        Args:
            closure: clears gradients, computes the loss and its gradients, and returns the loss.

        Returns:
            The loss before the iteration.
        """
        evaluate = torch.enable_grad()(closure)

        def at(origin: Tensor, length: Any, along: Tensor) -> tuple[float, Tensor]:
            self._write(origin + length * along)
            loss = evaluate()
            return loss.item() if isinstance(loss, torch.Tensor) else float(loss), self._gradient()

        state, now = self.state[self._parameters[0]], self._weights()
        state.setdefault("pairs", [])
        known = "weights" in state and torch.equal(state["weights"], now)
        loss, gradient = (state["loss"], state["gradient"]) if known else at(now, 0.0, now)
        if not math.isfinite(loss):
            return loss
        while True:
            pairs = state["pairs"]
            along = direction(gradient, pairs)
            slope = gradient.dot(along)
            if pairs and not slope < 0:
                state["pairs"] = []
                continue
            first = 1.0 if pairs else min(1.0, 1 / max(float(gradient.abs().sum()), 1e-300))
            found = _strong_wolfe(at, now, first, along, loss, gradient, slope, tolerance_change=0.0, max_ls=TRIES)
            after, slopes, length = float(found[0]), found[1], float(found[2])
            if after < loss or not pairs:
                break
            state["pairs"] = []  # the memory misleads: once more, along the gradient
        if not after < loss:
            self._write(now)
            state.update(weights=now, loss=loss, gradient=gradient)
            return loss
        add(state["pairs"], length * along, slopes - gradient, -(length**2) * float(slope))
        del state["pairs"][: -self.param_groups[0]["history"]]
        self._write(now + length * along)
        state.update(weights=self._weights(), loss=after, gradient=slopes)
        return loss

    def _weights(self) -> Tensor:
        return torch.cat([parameter.detach().reshape(-1) for parameter in self._parameters])

    def _gradient(self) -> Tensor:
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        return torch.cat([piece.detach().reshape(-1) for piece in pieces])

    @torch.no_grad()
    def _write(self, weights: Tensor) -> None:
        pieces = weights.split([parameter.numel() for parameter in self._parameters])
        for parameter, piece in zip(self._parameters, pieces, strict=True):
            parameter.copy_(piece.view_as(parameter))


def add(pairs: list[Any], step: Tensor, change: Tensor, predicted: float) -> None:
    """Append a pair and its scale, unless it has no positive curvature.

    Args:
        pairs: of (step, change of the gradient, factor on the inverse before this pair).
        step, change: `(state,)`.
        predicted: the curvature along the step, s.B s, as it was thought to be.
    """
    curvature = float(step.dot(change))
    if curvature > LEAST_CURVATURE * float(step.norm() * change.norm()):
        pairs.append((step, change, max(1.0, predicted / curvature) if pairs else 1.0))


def direction(gradient: Float[Tensor, " state"], pairs: list[Any]) -> Float[Tensor, " state"]:
    """Minus the gradient times the inverse that the pairs make, by two loops.

    >>> step, change = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0])
    >>> direction(torch.tensor([4.0, 4.0]), [(step, change, 1.0)])
    tensor([-2., -2.])
    """
    found, shares = -gradient, list[Any]()
    for step, change, _ in reversed(pairs):
        shares.append(step.dot(found) / step.dot(change))
        found = found - shares[-1] * change
    if pairs:
        step, change, _ = pairs[0]
        found = found * (step.dot(change) / change.dot(change))
    for (step, change, scale), share in zip(pairs, reversed(shares), strict=True):
        found = found * scale
        found = found + (share - change.dot(found) / step.dot(change)) * step
    return found
