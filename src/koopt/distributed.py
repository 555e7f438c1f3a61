"""Several processes that train one model: who they are, and one decision for all of them."""

from __future__ import annotations

import contextlib
import hashlib
import math
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from koopt.exchange import Ranks, all_reduce, answered, counted, first
from koopt.sharding import is_sharded, local, mesh_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

    T = TypeVar("T")

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
HASHED = 2**20  # numbers hashed at a time
GOLDEN, MIXING = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9  # odd
MESSAGE = 256  # bytes of an error that others are told


def join(model: nn.Module, named: Mapping[str, nn.Parameter], group: object, settings: str) -> Ranks | None:
    """The processes that train a model; all of them have to call it.

    Args:
        model: perhaps within DistributedDataParallel.
        named: the parameters that are recorded.
        group: a process group, None for this process alone, or "auto".
        settings: as text; has to be the same everywhere.

    Raises:
        TypeError: if `group` is none of these.
        ValueError: if the processes differ in what they record, or parameters are sharded in a way that is not known.

    >>> join(nn.Linear(1, 1), {}, "auto", "") is None
    True
    """
    dist = torch.distributed
    mesh = mesh_of(named)
    started = dist.is_available() and dist.is_initialized()
    if not isinstance(group, (str, type(None))) and not (started and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f'group is {group!r}, expected a torch.distributed.ProcessGroup, None or "auto"')
    if isinstance(group, str) and group != "auto":
        raise ValueError(f'group is {group!r}, expected a torch.distributed.ProcessGroup, None or "auto"')
    if group == "auto":
        group = model.process_group if isinstance(model, torch.nn.parallel.DistributedDataParallel) else None
        group = dist.group.WORLD if started and group is None else group
    if group is None and mesh is not None and mesh.size() > 1:
        raise ValueError('group is None, but the parameters are shards of several processes; leave it "auto"')
    members = dist.get_process_group_ranks(group) if isinstance(group, dist.ProcessGroup) else [0]
    if mesh is not None and mesh.size() > 1 and sorted(members) != sorted(mesh.mesh.flatten().tolist()):
        raise ValueError(
            f"group: {len(members)} processes, but the parameters are sharded over {mesh.size()}; pipeline stages and "
            "meshes within meshes are not supported, else pass the group of the mesh"
        )
    if not isinstance(group, dist.ProcessGroup) or len(members) == 1:
        return None
    control, parameters = _control(group, members), list(named.values())
    owned = _owned(parameters, control.rank(), control.size())
    ranks = Ranks(control, owned, sum(parameter.numel() for parameter in parameters))
    shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
    text = hashlib.blake2b(repr((settings, shapes)).encode(), digest_size=7).digest()
    same_settings, same_weights = alike([int.from_bytes(text, "big"), fingerprint(parameters)], ranks)
    if not same_settings:
        raise ValueError(
            "attach: the processes differ in options, in whether there is a guard, or in the parameters' names and "
            "shapes; make them the same, or pass group=None where each process trains a model of its own"
        )
    if not same_weights:
        raise ValueError(
            "model: the processes hold different weights; wrap it in DistributedDataParallel or start from one "
            "checkpoint before attach(), or pass group=None where each process trains a model of its own"
        )
    return ranks


def _control(group: ProcessGroup, members: list[int]) -> ProcessGroup:
    """A gloo group of the same processes, with the timeout of theirs."""
    dist = torch.distributed
    if not dist.is_gloo_available():
        raise ValueError("group: koopt exchanges small tensors by gloo, which this build of PyTorch lacks")
    timeout = None
    with contextlib.suppress(AttributeError, RuntimeError):
        timeout = group._get_backend(group._device_types[0]).options._timeout
    part = len(members) < dist.get_world_size()
    made = dist.new_group(members, timeout=timeout, backend="gloo", use_local_synchronization=part)
    assert isinstance(made, dist.ProcessGroup)
    return made


def _owned(parameters: Sequence[Tensor], rank: int, size: int) -> tuple[slice, ...]:
    """Columns that a process contributes to sums; parameters that the same processes hold are shared out as one."""
    runs: list[tuple[object, int, int, int]] = []  # who holds copies; which of how many this is; columns
    for parameter in parameters:
        copies, which, holders = size, rank, None
        if is_sharded(parameter):
            given: Any = parameter
            copies, which, holders = 1, 0, given.placements
            coordinate = given.device_mesh.get_coordinate()
            for at, length, placement in zip(coordinate, given.device_mesh.shape, given.placements, strict=True):
                if placement.is_replicate():
                    copies, which = copies * length, which * length + at
        columns = local(parameter).numel()
        if runs and runs[-1][0] == holders:
            columns += runs.pop()[-1]
        runs.append((holders, which, copies, columns))
    start, owned = 0, []
    for _, which, copies, columns in runs:
        owned.append(slice(start + columns * which // copies, start + columns * (which + 1) // copies))
        start += columns
    return tuple(owned)


def everywhere(flag: bool, ranks: Ranks | None) -> bool:
    """Whether it holds in every process.

    >>> everywhere(True, None)
    True
    """
    if ranks is None:
        return flag
    return bool(all_reduce(torch.tensor([float(flag)], dtype=torch.float64, device="cpu"), ranks, "MIN"))


def alike(numbers: Sequence[int], ranks: Ranks | None) -> list[bool]:
    """Which whole numbers are the same in every process.

    >>> alike([3], None)
    [True]
    """
    if ranks is None:
        return [True] * len(numbers)
    own = torch.tensor(list(numbers), dtype=torch.int64, device="cpu")
    largest, negative = all_reduce(torch.stack([own, -own]), ranks, "MAX")
    return (largest == -negative).tolist()


def least(numbers: Sequence[int], ranks: Ranks | None) -> list[int]:
    """The smallest of each number over all processes.

    >>> least([3, 4], None)
    [3, 4]
    """
    if ranks is None:
        return list(numbers)
    return all_reduce(torch.tensor(list(numbers), dtype=torch.int64, device="cpu"), ranks, "MIN").tolist()


def union(indices: list[int], count: int, ranks: Ranks | None) -> list[int]:
    """Those of `count` indices that any process names.

    >>> union([0, 2], 3, None)
    [0, 2]
    """
    if ranks is None:
        return indices
    named = torch.zeros(count, dtype=torch.float64, device="cpu")
    named[indices] = 1.0
    return all_reduce(named, ranks, "MAX").nonzero().flatten().tolist()


def unlike(steps: int, parameters: Iterable[Tensor], ranks: Ranks | None) -> str:
    """Why the processes cannot decide together; nothing if they can.

    Raises:
        RuntimeError: if they have taken different numbers of steps, and would never meet again.
    """
    if ranks is None:
        return ""
    same_steps, same_weights = alike([steps, fingerprint(parameters)], ranks)
    if not same_steps:
        raise RuntimeError(f"the processes have recorded different numbers of steps, this one {steps}")
    return "" if same_weights else "the processes hold different weights"


def agreed(coefficients: Tensor | None, time: int, ranks: Ranks | None) -> Tensor | None:
    """Those of the first process, which elsewhere may differ by rounding; None where it has none."""
    if ranks is None:
        return coefficients
    shared = coefficients if coefficients is not None else torch.full((time,), math.nan, device="cpu")
    shared = first(shared.to("cpu", torch.float64), ranks)
    return shared if bool(shared.isfinite().all()) else None


def together(function: Callable[[], T], ranks: Ranks | None, what: str) -> T:
    """Call a function that may raise: if it does in one process, all of them raise.

    >>> together(lambda: 1, None, "guard")
    1
    """
    if ranks is None:
        return function()
    results: list[T] = []
    mean_of(lambda: results.append(function()) or 0.0, ranks, what)
    return results[0]


def mean_of(function: Callable[[], float], ranks: Ranks | None, what: str) -> float:
    """The mean of a number over all processes; NaN or Inf in one of them makes it so, and an error in one fails all.

    Raises:
        RuntimeError: where another process failed, with what it said; the one that failed raises its own error.

    >>> mean_of(lambda: 0.5, None, "guard")
    0.5
    """
    if ranks is None:
        return function()
    error, value = None, 0.0
    try:
        value = function()
    except Exception as caught:
        error = caught
    try:
        total, failed = all_reduce(
            torch.tensor([value, error is not None], dtype=torch.float64, device="cpu"), ranks
        ).tolist()
        said = _messages(error, ranks) if failed else []
    except RuntimeError:
        if error is not None:
            raise error from None  # the others do not answer, since they failed too or are gone
        raise
    if error is not None:
        raise error
    for rank, message in enumerate(said):
        if message:
            raise RuntimeError(f"{what} failed in process {rank} of {len(said)}: {message}")
    return total / ranks.group.size()


def _messages(error: Exception | None, ranks: Ranks) -> list[str]:
    """What each process has to say of its error; nothing where there is none."""
    text = b"" if error is None else f"{type(error).__name__}: {error}".encode()[:MESSAGE]
    own = torch.zeros(MESSAGE, dtype=torch.uint8, device="cpu")
    own[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else own[:0]
    found = [torch.zeros_like(own) for _ in range(ranks.group.size())]
    with answered():
        torch.distributed.all_gather(found, own, group=ranks.group)
    return [bytes(counted(one).tolist()).rstrip(b"\0").decode(errors="replace") for one in found]


def fingerprint(parameters: Iterable[Tensor]) -> int:
    """A number that differs if bits of the parameters do, or their places; those that are sharded are left out.

    >>> fingerprint([torch.zeros(2)]) == fingerprint([torch.zeros(2)]) != fingerprint([torch.ones(2)])
    True
    """
    sums, start = list[Any](), 0
    for parameter in parameters:
        if not is_sharded(parameter):
            bits = parameter.detach().reshape(-1).view(INTEGERS[parameter.element_size()])
            for piece in bits.split(HASHED):
                sums.append(_hashed(piece, start))
                start += len(piece)
    # one transfer in all
    return int(torch.stack([part.to(sums[0].device) for part in sums]).sum()) % 2**62 if sums else 0


def _hashed(bits: Tensor, start: int) -> Tensor:
    """The sum of a hash of each number with its place: in a plain sum opposite changes would cancel."""
    places = torch.arange(start, start + len(bits), device=bits.device)
    mixed = places.mul_(GOLDEN).add_(bits).mul_(MIXING)
    mixed ^= mixed >> 32
    return mixed.mul_(GOLDEN).sum()


@torch.no_grad()
def settle(parameters: Iterable[Tensor], ranks: Ranks | None) -> None:
    """Give all processes the weights of the first one, if rounding has made them differ, as on unlike processors."""
    if ranks is None or all(alike([fingerprint(parameters)], ranks)):
        return
    for parameter in parameters:
        if not is_sharded(parameter):
            parameter.copy_(first(parameter.detach().cpu(), ranks))
