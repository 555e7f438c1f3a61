"""Tables and a figure of unseen.py."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import matplotlib.figure
from reaching import geometric

from koopt.plot import COLORS, INK

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.axes import Axes

    Row = Mapping[str, Any]

STANDS, TUNED = "as it stands", "the best of four"
LOOKS = {  # of the figure: mark, color and whether it is filled
    "koopt": ("o", COLORS[0], True),
    "koopt, history=0": ("o", COLORS[0], False),
    "guarded straight line": ("s", COLORS[1], False),
    "guarded Anderson": ("D", COLORS[3], False),
    "SOAP": ("^", COLORS[2], False),
    "L-BFGS": ("v", COLORS[2], False),
}
OWN = ("koopt", "koopt, history=0")
PLAIN, CHANCE = "the optimizer", "one rounding"
EDGE = 1.6  # where what is missed is drawn


def markdown(rows: Sequence[Row]) -> str:
    """Tables as in docs/when-it-helps.md."""
    full = [row for row in rows if "rate_is" in row]
    noisy = [row for row in rows if "rate_is" not in row]
    pieces = [_whole(full, rate) for rate in _rates(full)]
    return "\n".join(pieces + ([_noisy(noisy)] if noisy else []))


def _rates(rows: Sequence[Row]) -> list[str]:
    """Which of the tables there are."""
    return [rate for rate in (STANDS, TUNED) if any(row.get("rate_is") == rate for row in rows)]


def _whole(rows: Sequence[Row], rate: str) -> str:
    """A line a task: what each method needs to the optimizer's lowest loss; then more of koopt."""
    rows = [row for row in rows if row["rate_is"] == rate]
    methods = [name for name in LOOKS if any(row["method"] == name for row in rows)]
    ends = ["to half-way", "CPU", "lowest loss", "> 2 % worse"]
    lines = [f"### {rate}", "", "| task | " + " | ".join(methods + ends) + " |"]
    lines.append("|---" * (1 + len(methods) + len(ends)) + "|")
    for task in dict.fromkeys(row["task"] for row in rows):
        found = {row["method"]: row for row in rows if row["task"] == task}
        cells = [_share(found[name]) if name in found else "" for name in methods]
        own = [found[name] for name in OWN]
        cells += ["; ".join(number(row[sign]) for row in own) for sign in ("half", "cpu")]
        cells.append("; ".join(f"{row['final_ratio']:.1g}" for row in own))
        cells.append("; ".join(str(row["worse"]) for row in (*own, *(found[name] for name in found if name == CHANCE))))
        lines.append(f"| `{task}` | " + " | ".join(cells) + " |")
    means = [number(float(geometric([row["share"] for row in rows if row["method"] == name]))) for name in methods]
    return "\n".join([*lines, "| *geometric mean* | " + " | ".join(means) + " |" + " |" * len(ends), ""])


def _noisy(rows: Sequence[Row]) -> str:
    """A line a task: losses over those of the weights as they are."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = ["### mini-batches", "", "| task | " + " | ".join(methods) + " |", "|---" * (1 + len(methods)) + "|"]
    for task in dict.fromkeys(row["task"] for row in rows):
        found = {row["method"]: row for row in rows if row["task"] == task}
        cells = [f"{found[name]['half']:.2f} {found[name]['end']:.2f}" for name in methods]
        lines.append(f"| `{task}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _share(row: Row) -> str:
    return f"{number(row['share'])} ({number(row['low'])} to {number(row['high'])})"


def number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "∞"


def draw(rows: Sequence[Row], save: Callable[[matplotlib.figure.Figure], None]) -> None:
    """The tables of full batches as dots."""
    rates = _rates(rows)
    figure = matplotlib.figure.Figure(figsize=(10 if len(rates) > 1 else 8, 5.4), layout="constrained")
    axes = figure.subplots(1, max(1, len(rates)), sharey=True, squeeze=False)[0]
    for ax, rate in zip(axes, rates, strict=False):
        shares(ax, [row for row in rows if row.get("rate_is") == rate])
        ax.set_title(
            f"learning rate {'as it stands in the loop' if rate == STANDS else 'of each method: the best of four'}",
            fontsize=11,
        )
    named = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    save(figure)


def shares(ax: Axes, rows: Sequence[Row]) -> None:
    """The share of the optimizer's run that each method needs to its lowest loss, a line a task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    for i, (name, (mark, color, filled)) in enumerate(LOOKS.items()):
        found = [row for row in rows if row["method"] == name]
        if not found:
            continue
        places = [tasks.index(row["task"]) + 0.09 * (i - 2) for row in found]
        values = [min(row["share"], EDGE) for row in found]
        ax.plot(
            values,
            places,
            mark,
            color=color,
            mfc=color if filled else "white",
            ms=7 if filled else 6,
            label=name,
            clip_on=False,
        )
        if filled:
            for row, place in zip(found, places, strict=True):
                ax.plot([row["low"], min(row["high"], EDGE)], [place, place], color=color, lw=1.2)
    ax.axvline(1, color=INK, lw=0.8, ls=":")
    ax.set_yticks(range(len(tasks)), tasks, fontsize=11)
    ax.set(xscale="log", xlim=(0.01, EDGE), xlabel="share of the optimizer's run to its lowest loss")
    ax.set_xticks([0.01, 0.03, 0.1, 0.3, 1, EDGE], ["0.01", "0.03", "0.1", "0.3", "1", "missed"])
    ax.minorticks_off()
    ax.grid(axis="y", lw=0.4, color="#dddddd")
    ax.set_axisbelow(True)
    if not ax.yaxis_inverted():
        ax.invert_yaxis()
