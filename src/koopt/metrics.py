"""How good a jump was: success, equivalent steps and speed-up, as the paper defines them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Num
    from torch import Tensor


def success(forecast_loss: Float[Tensor, " seeds"], loss: Float[Tensor, "time seeds"]) -> Bool[Tensor, " seeds"]:
    """Whether the jump lowered the loss.

    Args:
        forecast_loss: `(seeds,)`, loss at the forecast weights; NaN and Inf count as failures.
        loss: `(time, seeds)`, training losses from t2 on; the first row is at t2.

    Returns:
        `(seeds,)` booleans.

    Source: Dogra & Redman (2020), Section 4.

    >>> success(torch.tensor([0.5, 2.0]), torch.ones(1, 2))
    tensor([ True, False])
    """
    return forecast_loss < loss[0]


def equivalent_steps(
    forecast_loss: Float[Tensor, " seeds"], loss: Float[Tensor, "time seeds"], every: int = 1
) -> tuple[Int[Tensor, " seeds"], Bool[Tensor, " seeds"]]:
    """T_eq: the optimizer steps after t2 that training needs to get at or below the loss of the forecast.

    Args:
        forecast_loss: `(seeds,)`, loss at the forecast weights.
        loss: `(time, seeds)`, training losses from t2 on; the first row is at t2.
        every: optimizer steps from row to row, for instance an epoch; the loss is taken to be straight between them.

    Returns:
        `(seeds,)` steps: 0 where the forecast is no better than t2, the last recorded step where training never gets
        there; and `(seeds,)` booleans that mark the latter (censored).

    Source: Dogra & Redman (2020), Eq. 10, and Eq. 12 where the loss is known at the end of each epoch.

    >>> loss = torch.tensor([[4.0], [3.0], [2.0]])
    >>> equivalent_steps(torch.tensor([2.5]), loss)
    (tensor([2]), tensor([False]))
    >>> equivalent_steps(torch.tensor([2.5]), loss, every=100)
    (tensor([150]), tensor([False]))
    >>> equivalent_steps(torch.tensor([1.0]), loss)
    (tensor([2]), tensor([True]))
    """
    reached = (loss[1:] <= forecast_loss).cumsum(dim=0) > 0
    better = success(forecast_loss, loss)
    row = ((~reached).sum(dim=0) + 1).clamp(max=len(loss) - 1)
    censored = better & ~reached.any(dim=0)
    before, at = (loss.gather(0, index.unsqueeze(0)).squeeze(0).double() for index in ((row - 1).clamp(min=0), row))
    share = (before - forecast_loss.double()) / (before - at)
    share = torch.where(censored | ~share.isfinite(), 1.0, share)
    steps = ((row - 1 + share) * every).ceil().to(row.dtype)
    return torch.where(better, steps, 0), censored


def error_over_motion(
    forecast: Float[Tensor, "*weights"], start: Float[Tensor, "*weights"], truth: Float[Tensor, "*weights"]
) -> float:
    """The median over weights of ``|forecast - truth| / |truth - start|``.

    Args:
        forecast: forecast weights, any shape.
        start: weights at t2, where the jump started.
        truth: weights at t2 + T, where training went.

    Returns:
        A share of the motion; weights that did not move count 0 if forecast so, else infinity.

    Source: Dogra & Redman (2020), Figure 2e.

    >>> error_over_motion(torch.tensor([1.5]), torch.tensor([0.0]), torch.tensor([1.0]))
    0.5
    """
    error, motion = (forecast - truth).abs(), (truth - start).abs()
    ratio = torch.where(error == 0, 0.0, error / motion)
    return median(torch.where(ratio.isnan(), math.inf, ratio))


def median(values: Num[Tensor, "*any"]) -> float:
    """The mean of the two middle values, where torch takes the lower one; infinities count as large.

    >>> median(torch.tensor([1, 2, 4, torch.inf]))
    3.0
    """
    ordered = values.flatten().double().sort().values
    if len(ordered) == 0:
        raise ValueError("values are empty, expected at least one")
    return ((ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2).item()


def binomial_interval(rate: float, trials: int, level: float = 0.95) -> tuple[float, float]:
    """The central interval in which a success rate over `trials` falls with probability `level` if `rate` is true.

    Args:
        rate: the true success rate, 0 to 1.
        trials: how many seeds.
        level: probability of the interval.

    Returns:
        Lowest and highest rate.

    >>> binomial_interval(0.84, 25)
    (0.68, 0.96)
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate}, expected a share from 0 to 1")
    if trials < 1:
        raise ValueError(f"trials is {trials}, expected at least 1")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected a probability between 0 and 1, such as 0.95")
    tail = (1 - level) / 2
    counts = torch.arange(trials + 1, dtype=torch.float64, device="cpu")
    choices = math.lgamma(trials + 1) - torch.lgamma(counts + 1) - torch.lgamma(trials - counts + 1)
    share = torch.tensor(rate, dtype=torch.float64, device="cpu")
    below = (choices + torch.xlogy(counts, share) + torch.xlogy(trials - counts, 1 - share)).exp().cumsum(0)
    low, high = ((below < bound - 1e-12).sum().clamp(max=trials).item() for bound in (tail, 1 - tail))
    return low / trials, high / trials


def speedup(steps: float, step_seconds: float, jump_seconds: float, recording_seconds: float = 0.0) -> float:
    """How many times faster a jump is than the optimizer steps it replaces.

    Args:
        steps: T_eq, the steps replaced.
        step_seconds: time of one optimizer step.
        jump_seconds: time to fit, forecast and write the weights.
        recording_seconds: what recording the window cost, where it is to count.

    Source: Dogra & Redman (2020), Section 4 and Table 1.

    >>> speedup(1000, 0.001, 0.01)
    100.0
    """
    return steps * step_seconds / (jump_seconds + recording_seconds)
