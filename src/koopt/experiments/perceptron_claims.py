"""What the perceptron runs say about claims for Koopman training: verdicts and reasons, computed from the rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


MENDED = (("weight", "affine"), ("node", "affine"), ("node", "rank 1"), ("network", "affine"), ("network", "rank 1"))


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A row, and the errors of every simulation for paired comparisons, each `(seeds,)`.

    Attributes:
        row: as it stands in the result.
        error: of the forecast.
        start: at the window's end.
        trained: at the end of training.
    """

    row: dict[str, Any]
    error: Tensor
    start: Tensor
    trained: Tensor


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and standard error of at least two values.

    >>> mean_and_error(torch.tensor([1.0, 1.0]))
    (1.0, 0.0)
    """
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def about_operators(batch: Sequence[Evaluated], teacher_share: float) -> list[dict[str, Any]]:
    """Claims about one batch of simulations.

    Args:
        batch: its forecasts.
        teacher_share: the share of its squared length that a teacher unit's largest weight holds, on average.
    """
    last, mean = _find(batch, method="last"), _find(batch, method="mean")
    because = f"{_share(last.row, 'error_start')} there, {_share(last.row, 'error_trained')} at the end"
    claims = [_claim(last, None, "training lowers the error after the window", last.trained - last.start, because)]
    for by in ("weight", "node", "network"):
        found = _find(batch, by=by, setting="paper")
        because = _ratios(found.row, teacher_share) if by == "weight" else _spectrum(found.row)
        for claim, other in (
            ("lower the error of the window's end", found.start),
            ("end below training", found.trained),
            ("end below the mean of the window", mean.error),
        ):
            claims.append(_claim(found, by, f"{by} operators {claim}", found.error - other, because))
    for by, fit in MENDED:
        found = _find(batch, by=by, fit=fit, data="all snapshots")
        for claim, other in (("end below training", found.trained), ("end below the mean of the window", mean.error)):
            name, because = f"{by} operators ({fit})", _likeness(found.row)
            claims.append(_claim(found, by, f"{name} {claim}", found.error - other, because))
    return claims


def about_size(batch: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Claims about one batch of simulations of a larger perceptron: what careful data change."""
    claims = []
    for by in ("weight", "node", "network"):
        plain, careful = (_find(batch, by=by, setting=setting) for setting in ("paper", "careful"))
        because = (
            f"{_share(careful.row)} with {careful.row['snapshots']} block means, {_share(plain.row)} with "
            f"{plain.row['snapshots']} snapshots, weights to an operator: {plain.row['patch']}; "
            f"training {_share(plain.row, 'error_trained')}"
        )
        difference = careful.error - plain.error
        claims.append(_claim(careful, by, f"careful data lower the error of {by} operators", difference, because))
    return claims


def _ratios(row: dict[str, Any], teacher_share: float) -> str:
    return (
        f"{_ends(row)}; every weight is multiplied by its own ratio {row['horizon']} times, after which the largest of "
        f"a unit holds {row['largest_share']:.0%} of its squared length (teacher: {teacher_share:.0%})"
    )


def _spectrum(row: dict[str, Any]) -> str:
    turning, steady = (row[f"cosine_{kind}"] for kind in ("turning", "steady"))
    text = f"{_ends(row)}; noise is fitted too: {row['turning']:.0%} of the operators have a leading pair that turns"
    if turning is None or steady is None:
        return text
    return f"{text} (cosine of forecast and window mean {turning:.2f}, {steady:.2f} for the others)"


def _likeness(row: dict[str, Any]) -> str:
    return f"{_ends(row)}; cosine of forecast and window mean {row['cosine_to_mean']:.3f}"


def _ends(row: dict[str, Any]) -> str:
    return f"{_share(row)}, training {_share(row, 'error_trained')}"


def _find(batch: Sequence[Evaluated], **wanted: Any) -> Evaluated:
    (found,) = (line for line in batch if all(line.row[key] == value for key, value in wanted.items()))
    return found


def _claim(found: Evaluated, by: str | None, claim: str, difference: Tensor, because: str) -> dict[str, Any]:
    """Holds where the paired difference is negative by two standard errors, fails where it is positive by as many."""
    mean, spread = mean_and_error(difference)
    verdict = "holds" if mean < -2 * spread else "fails" if mean > 2 * spread else "undecided"
    row = found.row
    line = {"study": "finding", **{key: row[key] for key in ("teacher", "n_1", "window", "stride", "seeds")}, "by": by}
    line |= {"claim": claim, "difference": mean, "difference_se": spread, "verdict": verdict}
    every = f", every {row['stride']} steps" if row["stride"] > 1 else ""
    where = f"{row['teacher']} teacher, n_1 = {row['n_1']}, window {row['window']:,}{every}"
    return line | {"finding": f"{claim}: {verdict} ({where}): {because}"}


def _share(row: dict[str, Any], key: str = "error") -> str:
    return f"{row[key]:.1%} ± {row[f'{key}_se']:.1%}"
