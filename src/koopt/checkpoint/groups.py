"""Which tensors are forecast, which are copied, and which share an operator."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from koopt.checkpoint.stored import SMALL
from koopt.partitions import module_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from koopt.checkpoint.stored import Checkpoint, Entry

BY = ("network", "layer", "node")
STATISTICS = ("running_mean", "running_var")  # of activations: they belong to weights that were run
SLAB = 2**21  # numbers in the k x k matrices of the patches that are held at a time


@dataclass(frozen=True)
class Group:
    """Tensors that are cut alike: `patches` patches, each with an equal share of every one of them.

    Attributes:
        label: what it is called in reports: a layer, or "network".
        names: of its tensors.
        patches: how many operators it has; 1 for a layer or a network.
    """

    label: str
    names: tuple[str, ...]
    patches: int = 1


class Slab(NamedTuple):
    """Patches `first` up to `stop` of a group: what is worked on at a time."""

    group: Group
    first: int
    stop: int

    @property
    def patches(self) -> int:
        return self.stop - self.first


def choose(checkpoint: Checkpoint, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """The tensors to be forecast: real floating-point weights that the patterns let through.

    Integers, booleans, empty tensors and the running statistics of normalization are left to be copied.

    Args:
        checkpoint: whose tensors these are.
        include: shell patterns of names, any of which lets a tensor in; none: all.
        exclude: shell patterns of names, any of which keeps it out.

    Raises:
        ValueError: if a tensor that is let in is of a dtype that cannot be combined, or tied to one that is left out.
    """
    chosen, held = [], {}
    out = dict.fromkeys(name for name in checkpoint.entries if not _let_in(name, include, exclude))
    for name, entry in checkpoint.entries.items():
        if name in out or not entry.size or name.rpartition(".")[2] in STATISTICS:
            continue
        if entry.dtype in SMALL:
            if entry.place not in held:  # tied weights are one tensor with several names
                chosen.append(name)
            held.setdefault(entry.place, name)
        elif entry.dtype.is_floating_point or entry.dtype.is_complex:
            raise ValueError(
                f"{entry.file}: tensor {name!r} is {str(entry.dtype).removeprefix('torch.')}, only float16, bfloat16, "
                "float32 and float64 are forecast; leave it out with --exclude, and it is copied"
            )
    for name in out:
        entry = checkpoint.entries[name]
        if entry.size and entry.place in held:
            raise ValueError(
                f"{entry.file}: tensor {name!r} is left out, but tied to {held[entry.place]!r}, which is forecast: "
                "they are one; let in or leave out both"
            )
    return chosen


def _let_in(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    let_in = not include or any(fnmatchcase(name, pattern) for pattern in include)
    return let_in and not any(fnmatchcase(name, pattern) for pattern in exclude)


def require_apart(checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """Refuse tensors that share a part of their bytes."""
    by_place = sorted((checkpoint.entries[name] for name in names), key=lambda entry: (entry.file, entry.offset))
    for one, other in pairwise(by_place):
        if one.place != other.place and one.file == other.file and one.offset + one.nbytes > other.offset:
            raise ValueError(f"{one.file}: two tensors share a part of their memory; save them with .clone()")


def group(entries: dict[str, Entry], names: Sequence[str], by: str) -> list[Group]:
    """Cut the chosen tensors into groups, in the order of `names`.

    Args:
        entries: of the checkpoint.
        names: the tensors that are forecast.
        by: "network", "layer" (the parameters of one module) or "node" (the rows of a module's tensors with as many
            rows: an output unit with its bias, as far as names and shapes tell).

    Raises:
        ValueError: if `by` is unknown, or a tensor's rows are not stored one after another.
    """
    if by not in BY:
        raise ValueError(f"by is {by!r}, expected {', '.join(BY)}")
    if by == "network":
        return [Group("network", tuple(names))]
    found = defaultdict(list)
    for name in names:
        entry = entries[name]
        rows = entry.shape[0] if by == "node" and entry.shape else 1
        if rows > 1 and entry.order[0] != 0 and entry.size > rows:
            raise ValueError(
                f"{entry.file}: the rows of tensor {name!r} are not stored one after another; take --by layer"
            )
        found[module_of(name), rows].append(name)
    return [Group(module or "(top)", tuple(members), rows) for (module, rows), members in found.items()]


def slabs(groups: Sequence[Group], snapshots: int) -> Iterator[Slab]:
    """The groups in pieces whose k x k matrices fit in memory."""
    most = max(1, SLAB // snapshots**2)
    for one in groups:
        for first in range(0, one.patches, most):
            yield Slab(one, first, min(one.patches, first + most))
