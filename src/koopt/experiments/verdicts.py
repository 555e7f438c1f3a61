"""Whether the paper's numbers came back: one rule, applied to every row that carries them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from koopt.experiments.wording import cell, group, is_number, label

if TYPE_CHECKING:
    from collections.abc import Sequence

AGREES, BETTER, MISSED, OPEN = "agrees", "better", "did not come back", "open"
BAND = 0.1  # ratios this close agree
LOWER_IS_BETTER = ("error_over_motion", "loss", "error")
NOUNS = {  # of a number that the paper gives, by row key
    "success": "success",
    "teq_over_T": "T_eq/T",
    "speedup": "speed-up",
    "speedup_with_recording": "speed-up with recording",
    "error_over_motion": "error / motion",
    "accuracy": "accuracy",
    "loss": "loss",
    "error": "error",
}


@dataclass(frozen=True)
class Claim:
    """A number of the paper, and what became of it.

    Attributes:
        about: where it was measured and what it is, as a reader would say it.
        paper: the paper's value, with its range where there is one.
        ours: measured with the paper's method.
        verdict: on it.
        best: measured with the recommended setting; empty where there is none.
        best_verdict: on it; empty where there is none.
        baseline: the best of the baselines by this number, and its name; empty where there is none.
    """

    about: str
    paper: str
    ours: str
    verdict: str
    best: str = ""
    best_verdict: str = ""
    baseline: tuple[str, str] = ("", "")


def verdict(key: str, ours: Any, paper: float, low: float, high: float, censored: bool = False) -> str:
    """Whether a number of the paper came back.

    Args:
        key: of the row; says whether more or less is better.
        ours: as measured; None if nothing was.
        paper: the paper's.
        low, high: what counts as the same.
        censored: `ours` is a lower bound.

    >>> verdict("speedup", 37.0, 98.0, 88.2, 107.8)
    'did not come back'
    """
    if not is_number(ours) or (censored and ours < low):
        return OPEN
    if low <= ours <= high or ours == paper:
        return AGREES
    return BETTER if (ours > high) != (key in LOWER_IS_BETTER) else MISSED


def claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """Every number that the paper gives, from the rows that carry it as ``paper_<key>`` beside ``<key>``."""
    found = []
    for row in rows:
        beside = [other for other in rows if group(other) == group(row)]
        best = next((other for other in beside if other.get("setting") == "recommended"), None)
        for key in claimed(row):
            paper, low, high = paper_value(row, key)
            span = f" ({cell(key, low)} to {cell(key, high)})" if f"paper_{key}_low" in row and low != high else ""
            claim: dict[str, Any] = {
                "about": ", ".join([*group(row), NOUNS[key]]),
                "paper": cell(key, paper) + span,
                "ours": cell(key, row.get(key), is_bound(row, key)),
                "verdict": verdict(key, row.get(key), paper, low, high, is_bound(row, key)),
            }
            if best is not None and best is not row and best.get(key) is not None:
                claim["best"] = cell(key, best[key], is_bound(best, key))
                claim["best_verdict"] = verdict(key, best[key], paper, low, high, is_bound(best, key))
            simple = [r for r in beside if r.get("setting") == "baseline" and is_number(r.get(key))]
            if simple:
                top = (min if key in LOWER_IS_BETTER else max)(simple, key=lambda r: r[key])
                claim["baseline"] = cell(key, top[key], is_bound(top, key)), label(top)
            found.append(Claim(**claim))
    return found


def claimed(row: dict[str, Any]) -> list[str]:
    """The keys under which a row carries a number of the paper."""
    return [key for key in NOUNS if is_number(row.get(f"paper_{key}"))]


def paper_value(row: dict[str, Any], key: str) -> tuple[float, float, float]:
    """The paper's value and what counts as the same: its range where the row has one, else a band."""
    paper = row[f"paper_{key}"]
    low, high = row.get(f"paper_{key}_low"), row.get(f"paper_{key}_high")
    if low is None or high is None:
        low, high = paper * (1 - BAND), paper * (1 + BAND)
    return paper, low, high


def is_bound(row: dict[str, Any], key: str) -> bool:
    """Whether a number is a lower bound: the median of T_eq is censored, and what is computed from it."""
    censored: Any = row.get("censored")
    return key in ("teq_over_T", "speedup", "speedup_with_recording") and is_number(censored) and censored > 0.5
