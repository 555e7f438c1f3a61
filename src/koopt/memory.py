"""How much memory can still be taken."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

GROUPS = Path("/sys/fs/cgroup")
# by version: limit, use, and the share of the use that is given back when asked for
FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device; None where there is no way to know.

    On the CPU the least of what the machine has and what the control groups of a container allow.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    return min((free for free in (_of_machine(), allowed_by_groups()) if free is not None), default=None)


def allowed_by_groups(own: Path = Path("/proc/self/cgroup"), root: Path = GROUPS) -> int | None:
    """Bytes that the process's control groups still allow, the tightest of them; None without a limit.

    Args:
        own: where the kernel lists the groups of this process.
        root: where they are mounted.
    """
    free: list[int] = []
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            version = 1 if "memory" in kinds.split(",") else 2 if not kinds else None
            if version is not None:
                mount = root / "memory" if version == 1 else root
                free += _left(mount, path, *FILES[version])
    return min(free, default=None)


def _left(mount: Path, path: str, limit: str, used: str, reclaimable: str) -> Iterator[int]:
    """What a group and those above it leave; seen from a container, its own group is the mount itself."""
    inner = mount / path.lstrip("/")
    for group in (inner, *(above for above in inner.parents if mount in (above, *above.parents))):
        with contextlib.suppress(OSError, ValueError):  # no such group, or no limit: "max"
            allowed, taken = (int((group / name).read_text()) for name in (limit, used))
            lines = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
            cache = next((int(size) for name, size in lines if name == reclaimable), 0)
            yield max(0, allowed - max(0, taken - cache))


def _of_machine() -> int | None:
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pages = "SC_AVPHYS_PAGES"
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") if pages in getattr(os, "sysconf_names", {}) else None
