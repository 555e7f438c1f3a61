"""The record of an attempt: from what was found, and as text in a saved state."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from koopt.live.jumps import Found, Jump
from koopt.live.resuming import ASK

if TYPE_CHECKING:
    from collections.abc import Sequence


def record(found: Found, step: int, evaluations: int, seconds: float) -> Jump:
    """The record of an attempt.

    >>> record(Found("no candidate was better", 1.0), step=100, evaluations=9, seconds=0.01).reason
    'no candidate was better'
    """
    best = found.candidate
    return Jump(
        step=step,
        forecaster=None if best is None else best.method,
        rank=None if best is None else best.rank,
        horizon=found.horizon,
        before=found.before,
        after=found.after,
        accepted=found.weights is not None,
        reason=found.reason,
        evaluations=evaluations,
        seconds=seconds,
        moves=int(found.weights is not None),
    )


def joined(before: Jump, after: Jump) -> Jump:
    """One record of moves that follow one another.

    >>> one = Jump(100, "secants", 4, None, 0.5, 0.4, True, "better", 2, 0.25, 1)
    >>> both = joined(one, replace(one, step=101, before=0.4, after=0.3))
    >>> both.step, both.before, both.after, both.evaluations, both.moves
    (100, 0.5, 0.3, 4, 2)
    """
    return replace(
        after,
        step=before.step,
        before=before.before,
        evaluations=before.evaluations + after.evaluations,
        seconds=before.seconds + after.seconds,
        moves=before.moves + after.moves,
    )


def as_text(jumps: Sequence[Jump]) -> str:
    """Records as one JSON text: a distributed checkpoint takes lists apart, and loads only as many as before.

    >>> as_text([])
    '[]'
    """
    return json.dumps([asdict(jump) for jump in jumps])


def from_text(text: str) -> list[Jump]:
    """What :func:`as_text` wrote; errors name the state.

    >>> from_text("[]")
    []
    """
    try:
        return [Jump(**record) for record in json.loads(text)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"state['jumps'] is {text!r:.80}, expected the records of jumps as JSON; {ASK}") from error
