"""Parameters that are sharded over processes, as by FSDP2 or tensor parallelism: what this process holds of them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor, told without importing these.

    >>> is_sharded(torch.zeros(1))
    False
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it, in the same memory.

    >>> tensor = torch.zeros(1)
    >>> local(tensor) is tensor
    True
    """
    if not is_sharded(tensor):
        return tensor
    given: Any = tensor
    with torch.no_grad():
        return given.to_local()


def as_whole(piece: Tensor, parameter: Tensor) -> Tensor:
    """What processes hold of a tensor, as one tensor placed like a parameter.

    Args:
        piece: `(*lead, *local)`, where `local` is the shape that this process holds of the parameter.
        parameter: a DTensor, else the piece is returned.
    """
    if not is_sharded(parameter):
        return piece
    from torch.distributed.tensor import DTensor

    given, lead = _placed(parameter), piece.shape[: piece.dim() - parameter.dim()]
    shape = torch.Size([*lead, *parameter.shape])
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = given.device_mesh, _after(len(lead), given)
    return DTensor.from_local(piece, mesh, placements, run_check=False, shape=shape, stride=stride)


def own_part(value: Tensor, parameter: Tensor) -> Tensor:
    """What this process holds of a `(*lead, *shape)` tensor placed like a parameter: undoes :func:`as_whole`."""
    if not is_sharded(parameter):
        return _placed(value).full_tensor() if is_sharded(value) else value
    from torch.distributed.tensor import distribute_tensor

    given = _placed(parameter)
    mesh, placements = given.device_mesh, _after(value.dim() - parameter.dim(), given)
    if is_sharded(value):
        return local(_placed(value).redistribute(mesh, placements))
    return local(distribute_tensor(value, mesh, placements, src_data_rank=None))


def _placed(tensor: Tensor) -> Any:
    return tensor


def _after(lead: int, parameter: Any) -> list[Any]:
    """Its placements where other dimensions come first."""
    from torch.distributed.tensor import Shard

    return [Shard(place.dim + lead) if place.is_shard() else place for place in parameter.placements]


def sharding_modules(model: nn.Module) -> list[Any]:
    """The modules that FSDP2 has taken over: after a forward pass some of them hold whole weights, until resharded."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [part for part in model.modules() if isinstance(part, fsdp.FSDPModule)]


def reshard(modules: Sequence[Any]) -> None:
    for module in modules:
        module.reshard()


def require_supported(model: nn.Module) -> None:
    """Refuse what hides the parameters that it trains."""
    first = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if first is not None and any(isinstance(part, first.FullyShardedDataParallel) for part in model.modules()):
        raise ValueError(
            "model: FullyShardedDataParallel (FSDP1) joins parameters into flat ones, whose shards have no names; "
            "shard the model with torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def mesh_of(named: Mapping[str, nn.Parameter]) -> Any:
    """The mesh that parameters are sharded over; None where they are not."""
    found: Any = None
    for name, parameter in named.items():
        if not is_sharded(parameter):
            continue
        from torch.distributed.tensor import Replicate, Shard

        given = _placed(parameter)
        if any(type(placement) not in (Shard, Replicate) for placement in given.placements):
            raise ValueError(
                f"model: {name!r} is placed as {given.placements}, expected Shard or Replicate; FSDP2 over tensor "
                "parallelism in the same dimension is not supported"
            )
        if found is not None and given.device_mesh != found:
            raise ValueError(f"model: {name!r} is sharded over another mesh than those before it, expected one mesh")
        found = given.device_mesh
    return found
