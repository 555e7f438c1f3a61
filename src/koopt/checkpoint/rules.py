"""From a patch's factor to coefficients over its checkpoints: even grid, cut, resolution, held-out error."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from koopt import linalg
from koopt.checkpoint.factors import resolution
from koopt.checkpoint.steps import even_grid
from koopt.forecasters import METHODS, RANKS, require_options
from koopt.operator import fit_in_form

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from jaxtyping import Float
    from torch import Tensor

    from koopt.checkpoint.factors import Factor
    from koopt.operator import Operator

TIMED = ("line", "regression")  # take checkpoints at any times
TIMELESS = ("last", "mean", "ema", "anderson")  # do not look at them
SAFE = ("last", "mean", "ema")  # averages: rounding does not grow
SEEN = 4.0  # motion of so many roundings is told from rounding
LOST = 0.5  # of its length at the start of the window: a patch that has less is on its way to zero
MODEST = 2  # rank where as many directions as pairs of checkpoints are visible: all of them would fit anything
LEAST = {"ensemble": 4}  # checkpoints; of others, two
PEERS = {"last": {}, "mean": {}, "line": {}}  # what every forecast is set beside


class Rule(NamedTuple):
    """A forecaster and how far it looks.

    Attributes:
        method: a name of ``koopt.forecasters.METHODS``.
        ahead: optimizer steps after the last checkpoint.
        options: of the method.
    """

    method: str
    ahead: float
    options: Mapping[str, Any]


class Outcome(NamedTuple):
    """What was decided for the patches of a slab.

    Attributes:
        coefficients: `(patches, time)`.
        used: the method that each patch ended up with.
        rank: of each patch's operator, 0 where there is none.
        step, window: motion in roundings of the stored numbers, as :func:`resolution` gives them.
        motion: `(patches,)` length of the last step.
    """

    coefficients: Float[Tensor, "patches time"]
    used: list[str]
    rank: Tensor
    step: Tensor
    window: Tensor
    motion: Tensor


def check(rule: Rule, checkpoints: int, holdout: bool = False) -> None:
    """Refuse what no checkpoint would make right: unknown methods and options, too few of them."""
    require_options(rule.method, rule.options)
    if isinstance(rule.ahead, bool) or not isinstance(rule.ahead, (int, float)) or not rule.ahead >= 0:
        raise ValueError(f"ahead is {rule.ahead!r}, expected optimizer steps >= 0 after the last checkpoint, or inf")
    if math.isinf(rule.ahead) and rule.method in (*TIMED, "dema"):
        raise ValueError(f"ahead is inf, but {rule.method} has no limit; give a number of steps")
    least, fitted = LEAST.get(rule.method, 2) + bool(rule.options.get("difference")), checkpoints - holdout
    if fitted < least:
        more = " and one held out" if holdout else ""
        raise ValueError(f"{rule.method} needs at least {least} checkpoints{more}, got {checkpoints}; give more")
    METHODS[rule.method](torch.arange(float(fitted)).unsqueeze(1), 1, **rule.options)  # refuses options out of range


def decide(factor: Factor, times: Float[Tensor, " time"], rule: Rule) -> Outcome:
    """Coefficients of each patch, by the rule where the stored numbers show the motion that it needs.

    A patch whose steps are below ``SEEN`` roundings gets the regression line, one whose whole window is gets the mean,
    one that does not move its last snapshot.
    """
    step, window, moves = resolution(factor)
    used = [rule.method] * len(step)
    if rule.method not in SAFE:
        for i, (small, smaller) in enumerate(zip((step < SEEN).tolist(), (window < SEEN).tolist(), strict=True)):
            if smaller:
                used[i] = "mean"
            elif small and rule.method != "regression":
                used[i] = "regression" if math.isfinite(rule.ahead) else "mean"
    used = [method if moving else "last" for method, moving in zip(used, moves.tolist(), strict=True)]
    coefficients = torch.zeros(factor.rows.shape[:2], dtype=torch.float64)
    rank = torch.zeros(len(used), dtype=torch.int64)
    for method in dict.fromkeys(used):
        chosen = torch.tensor([i for i, name in enumerate(used) if name == method])
        part = factor._replace(rows=factor.rows[chosen], eps=factor.eps[chosen])
        own = rule._replace(method=method, options=rule.options if method == rule.method else {})
        coefficients[chosen], rank[chosen] = _coefficients(part, times, own)
    motion = (factor.rows[:, -1] - factor.rows[:, -2]).norm(dim=-1)
    return Outcome(coefficients, used, rank, step, window, motion)


def held_out(factor: Factor, times: Float[Tensor, " time"], rule: Rule) -> dict[str, Float[Tensor, " patches"]]:
    """How far forecasts of the last checkpoint from the earlier ones miss it, by the rule and by each of its peers.

    Returns:
        Lengths of the errors of each patch: "koopt" for the rule with what it falls back to, and the peers' names.
    """
    earlier = factor._replace(rows=factor.rows[:, :-1])
    ahead = (times[-1] - times[-2]).item()
    found = {"koopt": decide(earlier, times[:-1], rule._replace(ahead=ahead)).coefficients}
    for method, options in PEERS.items():
        found[method], _ = _coefficients(earlier, times[:-1], Rule(method, ahead, options))
    end = factor.rows[:, -1]
    return {name: (linalg.combine(c, earlier.rows) - end).norm(dim=-1) for name, c in found.items()}


def operator(factor: Factor, times: Float[Tensor, " time"], options: Mapping[str, Any]) -> tuple[Operator, float]:
    """One operator a patch on the factor of one slab whose patches have the same resolution, and its time step."""
    weights, spacing = even_grid(times)
    rows = weights @ factor.rows
    options = dict(options)
    options.pop("max_modulus", None)
    rtol = max(cut(factor._replace(rows=rows), options))
    (_, op), *_ = _operators(rows, factor.state, rtol, options)
    return op, spacing


def cut(factor: Factor, options: Mapping[str, Any]) -> list[float]:
    """The share of each patch's largest singular value up to which others are cut.

    It is that of :func:`koopt.fit` on the weights themselves, whose dtype and number the factor does not show.
    """
    patches, time, _ = factor.rows.shape
    own = max(linalg.EPS * max(time, factor.state), linalg.EPS)
    if options.get("rtol") is not None:
        return [max(options["rtol"], linalg.EPS)] * patches
    eps = factor.eps.clamp_min(own)
    if not (options.get("difference") or options.get("center")):
        return eps.tolist()
    rows = factor.rows.diff(dim=1) if options.get("difference") else factor.rows
    if options.get("center"):
        rows = rows - rows[:, :-1].mean(dim=1, keepdim=True)
    largest = torch.linalg.matrix_norm(rows[:, :-1], 2).tolist()
    ends = factor.rows[:, [0, -1]].norm(dim=-1).amax(dim=-1)
    rounding = (factor.eps * ends).tolist()
    return [
        linalg.share_of_rounding(error, time, size, share)
        for error, size, share in zip(rounding, largest, eps.tolist(), strict=True)
    ]


def _coefficients(factor: Factor, times: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Coefficients of one method over all patches, and the ranks of its operators."""
    none = torch.zeros(len(factor.rows), dtype=torch.int64)
    if rule.method in TIMED:
        return METHODS[rule.method](factor.rows, rule.ahead, times=times, **rule.options), none
    if rule.method in TIMELESS:
        return METHODS[rule.method](factor.rows, rule.ahead, **rule.options), none
    weights, spacing = even_grid(times)
    horizon = rule.ahead / spacing
    if abs(horizon - round(horizon)) < 1e-9 * max(1.0, horizon) if math.isfinite(horizon) else False:
        horizon = round(horizon)  # whole steps go by powers
    rows = weights @ factor.rows
    if rule.method == "ensemble" and math.isinf(horizon):  # one whose limit is zero would halve the weights
        for rank in rule.options.get("ranks", RANKS):
            part = METHODS["ensemble"](rows, horizon, **{**rule.options, "ranks": (rank,)})
            _require_some(part, rows, "koopman with --center or --difference")
    if rule.method != "koopman":
        return METHODS[rule.method](rows, horizon, **rule.options) @ weights, none
    options = dict(rule.options)
    max_modulus = options.pop("max_modulus", None)
    shares = torch.tensor(cut(factor._replace(rows=rows), options), dtype=torch.float64)
    coefficients, ranks = torch.zeros(rows.shape[:2], dtype=torch.float64), none
    shares = torch.exp2((16 * shares.log2()).ceil() / 16) if len(shares) > 1 else shares  # a few fits, not one a patch
    for share in shares.unique().tolist():
        chosen = (shares == share).nonzero().squeeze(-1)
        for part, found in _operators(rows[chosen], factor.state, min(share, 0.5), options):
            coefficients[chosen[part]], ranks[chosen[part]] = found.coefficients(horizon, max_modulus), found.rank
    if math.isinf(horizon):
        _require_some(coefficients, rows, "--center, --difference or, where a mode grows, --max-modulus 1")
    return coefficients @ weights, ranks


def _require_some(coefficients: Tensor, rows: Tensor, instead: str) -> None:
    """Refuse a limit of zeros, but of patches that go there: those that lost half of their length in the window."""
    zero = (coefficients == 0).all(dim=-1)
    staying = rows[:, -1].norm(dim=-1) > LOST * rows[:, 0].norm(dim=-1)
    if bool((zero & staying).any()):
        raise ValueError(
            f"ahead is inf, but an operator without eigenvalue 1 leads to zeros; take {instead}, or a number of steps"
        )


def _operators(rows: Tensor, state: int, rtol: float, options: Mapping[str, Any]) -> Iterator[tuple[Tensor, Operator]]:
    """The operators of patches, by index, of the rank asked for, or of all that is visible.

    Where as many directions as pairs are visible, the fit is exact whatever the motion is, noise too: without a rank
    asked for, such patches get ``MODEST``. Fewer directions are a law that the pairs agree on to rounding.
    """
    rank = options.get("rank")
    common = {**options, "rtol": rtol, "snapshot_form": True}
    found = fit_in_form(rows, **{**common, "rank": state if rank is None else min(rank, state)})
    pairs = rows.shape[1] - 1 - bool(options.get("difference")) - bool(options.get("center"))
    filled = found.rank >= max(pairs, MODEST + 1)
    if rank is not None or not bool(filled.any()):
        yield torch.arange(len(rows)), found
        return
    yield filled.nonzero().squeeze(-1), fit_in_form(rows[filled], **{**common, "rank": MODEST})
    if not bool(filled.all()):
        yield (~filled).nonzero().squeeze(-1), fit_in_form(rows[~filled], **{**common, "rank": state})
