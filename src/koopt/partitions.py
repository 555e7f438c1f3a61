"""Which weights share an operator: partitions of a model's weights into patches, gather and scatter."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from jaxtyping import Shaped
    from torch import Tensor

    Labels = Callable[[str, nn.Parameter], "Tensor | Hashable"]

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True, eq=False)
class Partition:
    """A model's trainable weights cut into patches, as :func:`koopt.partition` returns it.

    Weights are numbered in the order of `names`, each parameter row by row. Patches come in groups of one size.

    Attributes:
        names: the parameters, as in ``model.named_parameters()``; tied weights once, frozen ones left out.
        shapes: their shapes.
        groups: `(patches, state)` of each patch size, by rising size.
        places: where each group's weights stand, patch by patch: a slice where they are consecutive, which costs no
            memory, else their numbers, one int64 tensor `(patches * state,)`.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    groups: tuple[tuple[int, int], ...]
    places: tuple[slice | Tensor, ...]

    @property
    def size(self) -> int:
        """The number of weights.

        >>> koopt.partition(nn.Linear(2, 1)).size
        3
        """
        return sum(shape.numel() for shape in self.shapes)

    @property
    def indices(self) -> tuple[Tensor, ...]:
        """Which weights make up each patch: their numbers, one int64 tensor `(patches, state)` a patch size.

        >>> koopt.partition(nn.Linear(2, 2)).indices
        (tensor([[0, 1, 4],
                [2, 3, 5]]),)
        """
        return tuple(
            (torch.arange(place.start, place.stop, device="cpu") if isinstance(place, slice) else place).reshape(group)
            for group, place in zip(self.groups, self.places, strict=True)
        )

    def gather(self, weights: Mapping[str, Tensor]) -> list[Shaped[Tensor, "*lead _ _"]]:
        """Collect weights into patches.

        Args:
            weights: by name, each `(*lead, *shape)` with the same leading axes (none for plain weights, time for a
                window); other names are ignored.

        Returns:
            One tensor `(*lead, patches, state)` a patch size, in a dtype that holds all of the given ones.

        Raises:
            KeyError: if a parameter is missing.
            ValueError: if a shape does not fit.

        >>> parts = koopt.partition(nn.Linear(2, 1))
        >>> parts.gather({"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])})
        [tensor([[1., 2., 3.]])]
        """
        return self.gather_flat(self.flatten(weights))

    def scatter(self, patches: Sequence[Shaped[Tensor, "*_"]]) -> dict[str, Tensor]:
        """Put patches back where :meth:`gather` took them from: its exact inverse.

        Args:
            patches: as :meth:`gather` returns them.

        Returns:
            Weights by name, each `(*lead, *shape)`; they share memory with each other, and with the patches where these
            are the weights in order, as for "network".

        Raises:
            ValueError: if the number of patches or their shapes do not fit.

        >>> parts = koopt.partition(nn.Linear(2, 1))
        >>> parts.scatter([torch.tensor([[1.0, 2.0, 3.0]])])["bias"]
        tensor([3.])
        """
        return self.unflatten(self.scatter_flat(patches))

    def flatten(self, weights: Mapping[str, Tensor]) -> Shaped[Tensor, "*lead weights"]:
        """All weights as one tensor.

        Args:
            weights: as in :meth:`gather`.

        Returns:
            `(*lead, size)`, in a dtype that holds all of the given ones.

        Raises:
            KeyError: if a parameter is missing.
            ValueError: if a shape does not fit.

        >>> parts = koopt.partition(nn.Linear(2, 1))
        >>> parts.flatten({"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])})
        tensor([1., 2., 3.])
        """
        pieces, first = [], None
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in weights:
                raise KeyError(f"weights: {name!r} is missing; pass every one of the partition's names")
            tensor = weights[name].detach()
            lead = tensor.shape[: max(0, tensor.dim() - len(shape))]
            first = lead if first is None else first
            if tensor.shape != lead + shape or lead != first:
                raise ValueError(
                    f"weights[{name!r}] has shape {tuple(tensor.shape)}, expected {(*first, *shape)}: the parameter's "
                    f"shape after the same leading axes in all"
                )
            pieces.append(tensor.reshape(*lead, shape.numel()))
        return torch.cat(pieces, dim=-1)

    def unflatten(self, flat: Shaped[Tensor, "*_"]) -> dict[str, Tensor]:
        """The inverse of :meth:`flatten`.

        Args:
            flat: `(*lead, size)`.

        Returns:
            Weights by name, each `(*lead, *shape)`, views into `flat`.

        Raises:
            ValueError: if the shape does not fit.

        >>> koopt.partition(nn.Linear(2, 1)).unflatten(torch.tensor([1.0, 2.0, 3.0]))
        {'weight': tensor([[1., 2.]]), 'bias': tensor([3.])}
        """
        if flat.shape[-1:] != (self.size,):
            raise ValueError(f"flat has shape {tuple(flat.shape)}, expected (*lead, {self.size}): what flatten gives")
        lead = flat.shape[:-1]
        pieces = flat.split([shape.numel() for shape in self.shapes], dim=-1)
        return {
            name: piece.reshape(lead + shape)
            for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)
        }

    def gather_flat(self, flat: Shaped[Tensor, "*_"]) -> list[Shaped[Tensor, "*lead _ _"]]:
        """:meth:`gather` from the tensor that :meth:`flatten` makes.

        Args:
            flat: `(*lead, size)`.

        Returns:
            One tensor `(*lead, patches, state)` a patch size, a view where its weights are consecutive.

        Raises:
            ValueError: if the shape does not fit.

        >>> koopt.partition(nn.Linear(2, 2)).gather_flat(torch.arange(6.0))
        [tensor([[0., 1., 4.],
                [2., 3., 5.]])]
        """
        if flat.shape[-1:] != (self.size,):
            raise ValueError(f"flat has shape {tuple(flat.shape)}, expected (*lead, {self.size}): what flatten gives")
        patches = []
        for group, place in zip(self.groups, self.places, strict=True):
            if isinstance(place, slice):
                picked = flat.narrow(-1, place.start, place.stop - place.start)
            else:
                picked = flat.index_select(-1, place.to(flat.device))
            patches.append(picked.reshape(flat.shape[:-1] + group))
        return patches

    def scatter_flat(self, patches: Sequence[Shaped[Tensor, "*_"]]) -> Shaped[Tensor, "*lead weights"]:
        """:meth:`scatter` into one tensor.

        Args:
            patches: as :meth:`gather` returns them.

        Returns:
            `(*lead, size)`, a view where the patches are already that.

        Raises:
            ValueError: if the number of patches or their shapes do not fit.

        >>> koopt.partition(nn.Linear(2, 2)).scatter_flat([torch.tensor([[0.0, 1.0, 4.0], [2.0, 3.0, 5.0]])])
        tensor([0., 1., 2., 3., 4., 5.])
        """
        if len(patches) != len(self.groups):
            raise ValueError(
                f"patches: got {len(patches)} tensors, this partition has {len(self.groups)} patch sizes; pass what "
                f"gather gives"
            )
        lead = patches[0].shape[:-2]
        for group, patch in zip(self.groups, patches, strict=True):
            if patch.shape != lead + group:
                raise ValueError(
                    f"patches: got shape {tuple(patch.shape)}, expected {(*lead, *group)}; pass what gather gives"
                )
        if len(self.places) == 1 and isinstance(self.places[0], slice):
            return patches[0].flatten(-2)
        flat = patches[0].new_empty((*lead, self.size))
        for place, patch in zip(self.places, patches, strict=True):
            values = patch.flatten(-2)
            if isinstance(place, slice):
                flat.narrow(-1, place.start, place.stop - place.start).copy_(values)
            else:
                flat.index_copy_(-1, place.to(flat.device), values)
        return flat

    def locate(self, group: int, patch: int) -> str:
        """The parameters in one patch, for messages: ``locate(0, 3)`` is patch 3 of the smallest size.

        >>> koopt.partition(nn.Linear(2, 2)).locate(0, 1)
        'weight, bias'
        """
        bounds = torch.tensor([shape.numel() for shape in self.shapes], device="cpu").cumsum(0)
        numbers = self.indices[group][patch].cpu()
        owners = torch.bucketize(numbers, bounds, right=True).unique().tolist()
        return ", ".join(self.names[owner] for owner in owners[:4]) + (", ..." if len(owners) > 4 else "")

    def to(self, device: torch.device | str) -> Partition:
        """The same partition with its numbers on another device, so that gathering there copies none.

        >>> koopt.partition(nn.Linear(2, 2)).to("cpu").groups
        ((2, 3),)
        """
        return replace(self, places=tuple(p if isinstance(p, slice) else p.to(device) for p in self.places))


def partition(model: nn.Module, by: str | Labels = "node", max_size: int | None = None) -> Partition:
    """Cut a model's trainable weights into patches that share an operator.

    Args:
        model: any module with at least one trainable parameter; of a compiled or parallel one the module within.
        by: "weight": each weight alone. "node": an output unit with its bias (rows of linear, recurrent and attention
            weights, output channels of convolutions, a norm's weight and bias of one channel, a token's embedding).
            "layer": the parameters of one module. "network": all. Or a function of name and parameter that returns
            integer labels of the parameter's shape, or one label for all of it: equal labels share a patch.
        max_size: cut patches into pieces of at most this many weights, as even as can be (the paper's quasi-nodes, q).

    Returns:
        A :class:`koopt.Partition`.

    Raises:
        ValueError: if `by` is unknown, a label's shape does not fit, `max_size` is below 1, a parameter is
            lazy or empty, or nothing is trainable.

    Source: Dogra & Redman (2020), Section 3 and S7: single-weight, node, quasi-node, layer and network operators.

    >>> koopt.partition(nn.Linear(4, 3)).groups
    ((3, 5),)
    >>> koopt.partition(nn.Linear(4, 3), max_size=3).groups
    ((3, 2), (3, 3))
    """
    model = bare(model)
    return partition_of(trainable(model), model, by, max_size)


def bare(model: nn.Module) -> nn.Module:
    """The module within DataParallel, DistributedDataParallel or what ``torch.compile`` made: its names are plain.

    >>> bare(nn.DataParallel(nn.Linear(1, 1)))
    Linear(in_features=1, out_features=1, bias=True)
    """
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or is_compiled(model):
        model = model._orig_mod if is_compiled(model) else model.module  # pyright: ignore[reportAssignmentType], both are modules
    return model


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` made it.

    >>> is_compiled(nn.Linear(1, 1))
    False
    """
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # as soon as there is a compiled module
    return compiler is not None and isinstance(model, compiler.OptimizedModule)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that :func:`koopt.partition` covers, by name; errors as there."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in parameters.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"model: {name!r} is not initialized (a lazy module); run one batch through the model first"
            )
        if parameter.numel() == 0:
            raise ValueError(
                f"model: {name!r} is empty, of shape {tuple(parameter.shape)}; freeze it (requires_grad=False)"
            )
    if not parameters:
        raise ValueError(
            "model: no trainable parameter (all are frozen or there are none); unfreeze what is to be moved"
        )
    return parameters


def partition_of(
    parameters: Mapping[str, nn.Parameter], model: nn.Module, by: str | Labels = "node", max_size: int | None = None
) -> Partition:
    """:func:`koopt.partition` of these parameters of the model, whether or not they are trainable now."""
    if max_size is not None and (isinstance(max_size, bool) or not isinstance(max_size, int) or max_size < 1):
        raise ValueError(f"max_size is {max_size!r}, expected a whole number >= 1, or None for whole patches")
    names, shapes = tuple(parameters), tuple(p.shape for p in parameters.values())
    size = sum(shape.numel() for shape in shapes)
    if by == "weight" or (by == "network" and max_size is None):  # needs no numbers, which outgrow a large model
        return Partition(names, shapes, ((size, 1) if by == "weight" else (1, size),), (slice(0, size),))
    if callable(by):
        patches = _by_labels({name: by(name, p) for name, p in parameters.items()}, parameters)
    elif by == "node":
        patches = _by_node(parameters, model)
    elif by in ("layer", "network"):
        patches = _by_labels({name: module_of(name) if by == "layer" else "" for name in names}, parameters)
    else:
        raise ValueError(
            f'by is {by!r}, expected "weight", "node", "layer", "network", or a function (name, parameter) -> labels'
        )
    if max_size is not None:
        patches = [piece for rows in patches for piece in rows.tensor_split(-(-rows.shape[1] // max_size), dim=1)]
    by_size = defaultdict(list)
    for rows in patches:
        by_size[rows.shape[1]].append(rows)
    groups = [torch.cat(by_size[size]) for size in sorted(by_size)]
    places = tuple(_place(rows.flatten()) for rows in groups)
    return Partition(names, shapes, tuple((len(rows), rows.shape[1]) for rows in groups), places)


def _place(numbers: Tensor) -> slice | Tensor:
    """A slice where the numbers are consecutive, else the numbers themselves."""
    first, last = int(numbers[0]), int(numbers[-1])
    consecutive = last - first + 1 == len(numbers) and bool((numbers.diff() == 1).all())
    return slice(first, last + 1) if consecutive else numbers


def _numbers(start: int, stop: int) -> Tensor:
    return torch.arange(start, stop, device="cpu")  # whatever the default device is


def _numbered(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Each parameter's weights by their number in the flat order, in the parameter's shape."""
    numbers, start = {}, 0
    for name, parameter in parameters.items():
        numbers[name] = _numbers(start, start + parameter.numel()).reshape(parameter.shape)
        start += parameter.numel()
    return numbers


def module_of(name: str) -> str:
    """The module that a parameter belongs to; the originals of a parametrized one to the module that it serves.

    >>> module_of("body.0.weight"), module_of("body.0.parametrizations.weight.original0")
    ('body.0', 'body.0')
    """
    return re.sub(r"(^|\.)parametrizations\.[^.]+$", "", name.rpartition(".")[0])


def _by_node(parameters: Mapping[str, nn.Parameter], model: nn.Module) -> list[Tensor]:
    numbered = _numbered(parameters)
    numbers = {id(parameter): numbered[name] for name, parameter in parameters.items()}
    patches = []
    for module in model.modules():
        own = {name: numbers.pop(id(p)) for name, p in _own_parameters(module) if id(p) in numbers}
        patches.extend(_nodes_of(module, own))
    return patches + [_rows(left) for left in numbers.values()]


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters; those that stand for another (pruned, parametrized) are named as ``that.original``."""
    for name, parameter in module._parameters.items():  # wrappers override named_parameters
        if parameter is not None:
            yield re.sub("_orig$", ".original", name), parameter
    if parametrize.is_parametrized(module):
        for name, originals in module.parametrizations.items():  # type: ignore[union-attr], which only such modules have
            for key, parameter in originals.named_parameters(recurse=False):
                yield f"{name}.{key}", parameter


def _nodes_of(module: nn.Module, own: dict[str, Tensor]) -> list[Tensor]:
    """The output units of one module, rows of `(units, weights)`; `own` holds its weights' numbers by name."""
    nodes = []

    def join(*names: str) -> None:
        joined = defaultdict(list)  # by the number of units: what has another number of rows stands alone
        for name in names:
            for key in [key for key in own if key == name or key.startswith(f"{name}.")]:
                rows = _rows(own.pop(key))
                joined[len(rows)].append(rows)
        nodes.extend(torch.cat(rows, dim=1) for rows in joined.values())

    if isinstance(module, _ConvTransposeNd):
        own = {name: _units_first(module, numbers) for name, numbers in own.items()}
    elif isinstance(module, NORMS):
        own = {name: numbers.flatten() for name, numbers in own.items()}
    elif isinstance(module, nn.MultiheadAttention):
        if not module._qkv_same_embed_dim and "in_proj_bias" in own:
            for part, rows in zip("qkv", own.pop("in_proj_bias").chunk(3), strict=True):
                own[f"{part}_proj_bias"] = rows
        for part in ("in", "q", "k", "v"):
            join(f"{part}_proj_weight", f"{part}_proj_bias")
    elif isinstance(module, RECURRENT):
        for suffix in {re.sub("^(weight|bias)_[ih]h", "", name.partition(".")[0]): None for name in own}:
            join(f"weight_ih{suffix}", f"weight_hh{suffix}", f"bias_ih{suffix}", f"bias_hh{suffix}")
    if isinstance(module, (*NORMS, nn.Linear, nn.Bilinear, _ConvNd)):
        join("weight", "bias")
    return nodes + [_rows(numbers) for numbers in own.values()]


def _units_first(module: _ConvTransposeNd, weight: Tensor) -> Tensor:
    """A transposed convolution's weight `(in, out / groups, *kernel)` with its output channels as rows."""
    if weight.dim() < 2 or module.groups * weight.shape[1] != module.out_channels or len(weight) % module.groups:
        return weight
    return weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)


def _rows(numbers: Tensor) -> Tensor:
    return numbers.reshape(len(numbers), -1) if numbers.dim() else numbers.reshape(1, 1)


def _by_labels(labels: Mapping[str, object], parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
    """Patches of equal labels, in the order in which the labels first appear."""
    labelled = {name: _labels_of(name, parameter, labels[name]) for name, parameter in parameters.items()}
    if all(inverse is None for _, inverse in labelled.values()):  # as for layers: no weight needs a label of its own
        pieces = defaultdict(list)
        for name, numbers in _numbered(parameters).items():
            pieces[labelled[name][0][0]].append(numbers.flatten())
        return [torch.cat(numbers).unsqueeze(0) for numbers in pieces.values()]
    patch_of: dict[Hashable, int] = {}
    owners = []
    for name, (values, inverse) in labelled.items():
        owner = torch.tensor([patch_of.setdefault(value, len(patch_of)) for value in values], device="cpu")
        owners.append(owner.expand(parameters[name].numel()) if inverse is None else owner[inverse])
    owner = torch.cat(owners)
    order, sizes = owner.argsort(stable=True), owner.bincount()
    starts = sizes.cumsum(0) - sizes
    return [order[starts[sizes == size].unsqueeze(-1) + _numbers(0, size)] for size in sizes.unique().tolist()]


def _labels_of(name: str, parameter: nn.Parameter, label: object) -> tuple[Sequence[Hashable], Tensor | None]:
    """The different labels in one parameter, and which of them each weight has; None where there is only one."""
    if isinstance(label, torch.Tensor):
        if label.dim() == 0:
            return [label.item()], None
        if label.shape != parameter.shape or label.is_floating_point() or label.is_complex():
            raise ValueError(
                f"by: labels of {name!r} are {label.dtype} of shape {tuple(label.shape)}, expected integers of shape "
                f"{tuple(parameter.shape)}, or one label"
            )
        values, inverse = label.detach().cpu().flatten().to(torch.int64).unique(return_inverse=True)
        return values.tolist(), inverse
    if label is None or not isinstance(label, Hashable):
        raise ValueError(
            f"by: the label of {name!r} is {type(label).__name__}, expected an integer tensor of shape "
            f"{tuple(parameter.shape)}, or one hashable label such as a string"
        )
    return [label], None
