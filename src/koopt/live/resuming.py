"""Whether a saved state belongs to the run that is to take it over."""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from koopt.live.settings import Settings

ASK = "pass what state_dict() returned"
POSITIVE = ("block", "wait")  # counts that are never 0


def compared(settings: Settings, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """What has to be the same in a resumed run."""
    own = {name: getattr(settings, name) for name in ("mode", "window", "tail", "history")}
    own["precondition"] = settings.precondition if settings.at_once else None
    own["dtype"] = str(settings.dtype)
    shapes = {name: list(parameter.shape) for name, parameter in named.items()}
    return own | {"combine": settings.momentum == "combine", "shapes": shapes}


def without_values(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same with tensors that have shapes and dtypes, and take no memory.

    >>> without_values({"rows": torch.zeros(2), "taken": 1})
    {'rows': tensor(..., device='meta', size=(2,)), 'taken': 1}
    """
    return {name: one.to("meta") if isinstance(one, torch.Tensor) else one for name, one in state.items()}


def require_fits(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse a state unless it has the settings and the structure of the run's own.

    Args:
        state: what is to be loaded.
        own: the state of the run as it is.

    Raises:
        ValueError: naming the setting that differs, or what is missing or malformed.

    >>> require_fits({"settings": {"tail": 30}}, {"settings": {"tail": 20}})
    Traceback (most recent call last):
    ValueError: state: recorded with tail=30, this run has tail=20; make them the same
    """
    settings = state.get("settings")
    if isinstance(settings, dict):
        for name, value in own["settings"].items():
            given = settings.get(name)
            # dicts are equal in any order, but the columns of the snapshots are not
            if given != value or (isinstance(given, dict) and list(given) != list(value)):
                raise ValueError(f"state: {_difference(name, given, value)}; make them the same")
    _require_like(state, own, "state")


def _difference(name: str, given: Any, own: Any) -> str:
    """What differs, in few words: of all shapes the first, by place."""
    if isinstance(given, dict) and isinstance(own, dict):
        pairs = zip_longest(given.items(), own.items())
        there, here = next((a, b) for a, b in pairs if a != b)
        shown = [f"{one[0]!r} of shape {one[1]}" if one else "no parameter more" for one in (there, here)]
        return f"recorded with {shown[0]} where this run has {shown[1]}"
    return f"recorded with {name}={given!r}, this run has {name}={own!r}"


def _require_like(given: Any, own: Any, where: str, least: int = 0) -> None:
    """The same keys, shapes, dtypes and kinds of numbers."""
    if isinstance(own, dict):
        if not hasattr(given, "keys") or given.keys() != own.keys():
            found = sorted(map(str, given)) if hasattr(given, "keys") else type(given).__name__
            raise ValueError(f"{where} has {found}, expected {sorted(own)}; {ASK}")
        for name, value in own.items():
            _require_like(given[name], value, f"{where}[{name!r}]", least=int(name in POSITIVE))
    elif isinstance(own, torch.Tensor):
        found = (tuple(given.shape), given.dtype) if isinstance(given, torch.Tensor) else type(given).__name__
        if found != (tuple(own.shape), own.dtype):
            raise ValueError(f"{where} is {found}, expected {(tuple(own.shape), own.dtype)}; {ASK}")
    elif isinstance(own, (int, float)):
        if type(given) is not type(own) or not least <= given < math.inf:
            raise ValueError(f"{where} is {given!r}, expected {type(own).__name__} >= {least}; {ASK}")
    elif isinstance(own, list) and (not isinstance(given, list) or len(given) != len(own)):  # one number a family
        raise ValueError(f"{where} does not fit this version of koopt; {ASK}")
