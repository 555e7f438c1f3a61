"""What a forecast reports: one line a group of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from koopt.checkpoint.factors import Factor
    from koopt.checkpoint.groups import Slab
    from koopt.checkpoint.rules import Outcome


def part(slab: Slab, factor: Factor, outcome: Outcome, errors: dict[str, Tensor]) -> dict[str, Any]:
    """Sums over the patches of a slab, of which a group's row is made."""
    return {
        "slab": slab,
        "used": outcome.used,
        "rank": outcome.rank,
        "step": outcome.step,
        "window": outcome.window,
        "still": factor.still,
        "state": factor.state,
        "motion": outcome.motion.square().sum().item(),
        "size": factor.rows[:, -1].square().sum().item(),
        "errors": {name: error.square().sum().item() for name, error in errors.items()},
    }


def row(label: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """A group in one line."""
    used = [method for part in parts for method in part["used"]]
    counts = {method: used.count(method) for method in dict.fromkeys(used)}
    motion, size = (sum(part[key] for part in parts) ** 0.5 for key in ("motion", "size"))
    ranks = torch.cat([part["rank"] for part in parts])
    ranks = ranks[ranks > 0]
    method = used[0] if len(counts) == 1 else ", ".join(f"{name} {count}" for name, count in counts.items())
    found: dict[str, Any] = {
        "group": label,
        "tensors": len({name for part in parts for name in part["slab"].group.names}),
        "still": len({name for part in parts for name in part["still"]}),
        "weights": sum(part["slab"].patches * part["state"] for part in parts),
        "patches": len(used),
        "method": method,
        "rank": int(ranks.median()) if len(ranks) else None,
        "motion": motion / size if size > 0 else None,
        "step_resolution": torch.cat([part["step"] for part in parts]).median().item(),
        "window_resolution": torch.cat([part["window"] for part in parts]).median().item(),
    }
    for name, key in (("koopt", "error"), ("mean", "error_mean"), ("line", "error_line")):
        if parts[0]["errors"]:
            missed = sum(part["errors"][name] for part in parts) ** 0.5
            found[key] = missed / motion if motion > 0 else None
    return found
