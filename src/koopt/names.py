"""Names of layers and tensors as people read them: in natural order, and short enough for their place."""

from __future__ import annotations

import re
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names as numbers, as they are counted in the model.

    >>> sorted(["layer.10", "layer.2", "head"], key=natural)
    ['head', 'layer.2', 'layer.10']
    """
    return [(int(part[:300]), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def shortened(names: Sequence[str], most: int) -> list[str]:
    """Names of at most so many letters, or as many as it takes to tell them apart.

    What long names begin with alike goes first, then the middle: what tells layers apart stands at the ends.

    >>> shortened(["model.layers.10.attention", "model.layers.11.attention", "head"], 14)
    ['...10.a...tion', '...11.a...tion', 'head']
    """
    long = {name for name in names if len(name) > most}
    pairs = zip(min(long, default=""), max(long, default=""), strict=False)
    alike = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    start = alike.rfind(".") + 1 if len(long) > 1 else 0
    for width in range(most, max(map(len, long), default=most)):
        short = {name: _without_middle(name, width, start) for name in long}
        if len(set(short.values())) == len(long):
            return [short.get(name, name) for name in names]
    return list(names)


def _without_middle(name: str, most: int, start: int) -> str:
    kept, head = name[start:], "..." if start else ""
    room = most - len(head)
    if len(kept) <= room:
        return head + kept
    ends = max(0, room - 3)
    return head + kept[: ends - ends // 2] + "..." + kept[len(kept) - ends // 2 :]
