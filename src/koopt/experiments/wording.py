"""How the report says things: numbers, times, what a row was measured on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

GROUPS = {  # rows that share these stand together
    "teacher": "{} teacher",
    "n_1": "n₁ = {}",
    "optimizer": "{}",
    "protocol": "{} data",
    "task": "{}",
    "T": "T = {}",
}
SHARES = ("success", "censored", "accuracy", "error_start", "error_trained", "error", "error_se")  # in per cent
METHODS = {
    "line": "straight line",
    "regression": "regression line",
    "mean": "mean of the window",
    "last": "no jump",
    "ema": "moving average",
    "dema": "double moving average",
    "anderson": "Anderson mixing",
}


def number(value: Any) -> str:
    """A value as a reader wants it: three digits, powers of ten where tiny or huge.

    >>> [number(v) for v in (0.92, 37.0, 3566.7, 7.6e-08, 2500, None, "adam")]
    ['0.92', '37', '3,567', '7.6·10⁻⁸', '2,500', '-', 'adam']
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e6:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{digits}·10{str(int(power)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    whole, _, decimals = f"{value:#.3g}".partition(".")
    decimals = decimals.rstrip("0").ljust(0 if abs(value) >= 10 else 2, "0")
    return f"{whole}.{decimals}" if decimals else whole


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(694.2), duration(8.26), duration(3723)
    ('11 min 34 s', '8.3 s', '1 h 2 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def cell(key: str, value: Any, bound: bool = False) -> str:
    """A row's value under a key, in its unit.

    >>> cell("success", 0.92), cell("speedup", 98.0), cell("teq_over_T", 2.5, bound=True)
    ('92 %', '98x', '≥ 2.50')
    """
    if value is None:
        return number(None)
    text = f"{100 * value:.3g} %" if key in SHARES and is_number(value) else number(value)
    return f"{'≥ ' if bound else ''}{text}{'x' if key.startswith('speedup') else ''}"


def group(row: Mapping[str, Any]) -> list[str]:
    """What a row was measured on.

    >>> group({"optimizer": "adam", "T": 2500, "success": 1.0})
    ['Adam', 'T = 2,500']
    """
    found = []
    for key, form in GROUPS.items():
        if (value := row.get(key)) is not None:
            found.append(form.format(words(value) if isinstance(value, str) else number(value)))
    return [found[0][:1].upper() + found[0][1:], *found[1:]] if found else []


def label(row: Mapping[str, Any]) -> str:
    """How a row forecasts.

    >>> label({"method": "koopman", "by": "node"}), label({"method": "line", "by": "network"})
    ('node operator', 'straight line')
    """
    if row.get("method") == "koopman":
        return f"{row['by']} operator" if row.get("by") else "operator"
    return METHODS.get(row.get("method", ""), words(str(row.get("method") or "-")))


def words(key: str) -> str:
    """A name as words."""
    return key.replace("_", " ").replace("-", " ")


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
