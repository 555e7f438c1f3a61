"""Which weights share an operator: partitions of a model's weights into patches, gather and scatter."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from torch import Tensor

    Labels = Callable[[str, nn.Parameter], "Tensor | Hashable"]

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class Partition:
    """A model's trainable weights cut into patches, as :func:`koopt.partition` returns it.

    Weights are numbered in the order of `names`, each parameter row by row. Patches come in groups of one size.

    Attributes:
        names: the parameters, as in ``model.named_parameters()``; tied weights once, frozen ones left out.
        shapes: their shapes.
        indices: one int64 tensor `(patches, state)` a patch size, by rising size: which weights make up each patch.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    indices: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """The number of weights."""
        return sum(shape.numel() for shape in self.shapes)

    def gather(self, weights: Mapping[str, Tensor]) -> list[Tensor]:
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

    def scatter(self, patches: Sequence[Tensor]) -> dict[str, Tensor]:
        """Put patches back where :meth:`gather` took them from: its exact inverse.

        Args:
            patches: as :meth:`gather` returns them.

        Returns:
            Weights by name, each `(*lead, *shape)`.

        Raises:
            ValueError: if the number of patches or their shapes do not fit.

        >>> parts = koopt.partition(nn.Linear(2, 1))
        >>> parts.scatter([torch.tensor([[1.0, 2.0, 3.0]])])["bias"]
        tensor([3.])
        """
        return self.unflatten(self.scatter_flat(patches))

    def flatten(self, weights: Mapping[str, Tensor]) -> Tensor:
        """All weights as one tensor `(*lead, size)`; arguments and errors as :meth:`gather`."""
        pieces = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in weights:
                raise KeyError(f"weights: {name!r} is missing; pass every one of the partition's names")
            tensor = weights[name].detach()
            lead = tensor.shape[: tensor.dim() - len(shape)]
            if tensor.shape != lead + shape or (pieces and pieces[0].shape[:-1] != lead):
                raise ValueError(
                    f"weights[{name!r}] has shape {tuple(tensor.shape)}, expected (*lead, {', '.join(map(str, shape))})"
                )
            pieces.append(tensor.reshape(*lead, -1) if shape else tensor.unsqueeze(-1))
        return torch.cat(pieces, dim=-1)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`flatten`: views into `flat`."""
        lead = flat.shape[:-1]
        pieces = flat.split([shape.numel() for shape in self.shapes], dim=-1)
        return {
            name: piece.reshape(lead + shape)
            for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)
        }

    def gather_flat(self, flat: Tensor) -> list[Tensor]:
        """:meth:`gather` from the tensor `(*lead, size)` that :meth:`flatten` makes; views where a patch is contiguous."""
        lead = flat.shape[:-1]
        patches = []
        for index in self.indices:
            run = _run(index)
            picked = flat[..., run] if run else flat.index_select(-1, index.reshape(-1).to(flat.device))
            patches.append(picked.reshape(lead + index.shape))
        return patches

    def scatter_flat(self, patches: Sequence[Tensor]) -> Tensor:
        """:meth:`scatter` into one tensor `(*lead, size)`."""
        if len(patches) != len(self.indices):
            raise ValueError(
                f"patches: got {len(patches)} tensors, this partition has {len(self.indices)} patch sizes; pass what gather gives"
            )
        lead = patches[0].shape[:-2]
        flat = patches[0].new_empty((*lead, self.size))
        for index, patch in zip(self.indices, patches, strict=True):
            if patch.shape != lead + index.shape:
                raise ValueError(
                    f"patches: got shape {tuple(patch.shape)}, expected (*lead, {index.shape[0]}, {index.shape[1]})"
                )
            run = _run(index)
            values = patch.reshape(*lead, -1)
            if run:
                flat[..., run] = values
            else:
                flat.index_copy_(-1, index.reshape(-1).to(flat.device), values)
        return flat

    def locate(self, group: int, patch: int) -> str:
        """The parameters in one patch, for messages: ``locate(0, 3)`` is patch 3 of the smallest size."""
        bounds = torch.tensor([shape.numel() for shape in self.shapes]).cumsum(0)
        owners = torch.bucketize(self.indices[group][patch], bounds, right=True).unique().tolist()
        return ", ".join(self.names[owner] for owner in owners[:4]) + (", ..." if len(owners) > 4 else "")


def partition(model: nn.Module, by: str | Labels = "node", max_size: int | None = None) -> Partition:
    """Cut a model's trainable weights into patches that share an operator.

    Args:
        model: any module with at least one trainable parameter.
        by: "weight": each weight alone. "node": an output unit with its bias (rows of linear, recurrent and attention
            weights, output channels of convolutions, a norm's weight and bias of one channel, a token's embedding).
            "layer": the parameters of one module. "network": all. Or a function of name and parameter that returns
            integer labels of the parameter's shape, or one label for all of it: equal labels share a patch.
        max_size: cut patches into pieces of at most this many weights, as even as can be (the paper's quasi-nodes, q).

    Returns:
        A :class:`koopt.Partition`.

    Raises:
        ValueError: if `by` is unknown, a label's shape does not fit, `max_size` is below 1, a parameter is lazy or empty, or
            nothing is trainable.

    Source: Dogra & Redman (2020), Section 3 and S7: single-weight, node, quasi-node, layer and network operators.

    >>> [tuple(index.shape) for index in koopt.partition(nn.Linear(4, 3)).indices]
    [(3, 5)]
    >>> [tuple(index.shape) for index in koopt.partition(nn.Linear(4, 3), max_size=3).indices]
    [(3, 2), (3, 3)]
    """
    if max_size is not None and (isinstance(max_size, bool) or not isinstance(max_size, int) or max_size < 1):
        raise ValueError(f"max_size is {max_size!r}, expected a whole number >= 1, or None for whole patches")
    parameters = _trainable(model)
    if callable(by):
        patches = _by_labels(parameters, by)
    elif by == "weight":
        patches = [torch.arange(sum(p.numel() for p in parameters.values())).unsqueeze(-1)]
    elif by == "node":
        patches = _by_node(model, parameters)
    elif by in ("layer", "network"):
        patches = _by_labels(parameters, lambda name, _: name.rpartition(".")[0] if by == "layer" else "")
    else:
        raise ValueError(
            f'by is {by!r}, expected "weight", "node", "layer", "network", or a function (name, parameter) -> labels'
        )
    if max_size is not None:
        patches = [piece for rows in patches for piece in rows.tensor_split(-(-rows.shape[1] // max_size), dim=1)]
    sizes = defaultdict(list)
    for rows in patches:
        sizes[rows.shape[1]].append(rows)
    return Partition(
        names=tuple(parameters),
        shapes=tuple(p.shape for p in parameters.values()),
        indices=tuple(torch.cat(sizes[size]) for size in sorted(sizes)),
    )


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in parameters.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"model: {name!r} is not initialized (a lazy module); run one batch through the model first"
            )
        if parameter.numel() == 0:
            raise ValueError(
                f"model: {name!r} is empty (shape {tuple(parameter.shape)}); freeze it (requires_grad=False) or remove it"
            )
    if not parameters:
        raise ValueError("model: no trainable parameter (all are frozen or there are none); nothing to partition")
    return parameters


def _numbered(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Each parameter's weights by their number in the flat order, in the parameter's shape."""
    numbers, start = {}, 0
    for name, parameter in parameters.items():
        numbers[name] = torch.arange(start, start + parameter.numel()).reshape(parameter.shape)
        start += parameter.numel()
    return numbers


def _by_node(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
    numbers = _numbered(parameters)
    patches = []
    for prefix, module in model.named_modules():
        own = {}
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if full in numbers and parameter is parameters.get(full):
                own[name] = numbers.pop(full)
        patches.extend(_nodes_of(module, own))
    return patches


def _nodes_of(module: nn.Module, own: dict[str, Tensor]) -> list[Tensor]:
    """The output units of one module, rows of `(units, weights)`; `own` holds its weights' numbers by name."""
    groups: list[list[Tensor]] = []

    def join(*names: str) -> None:
        rows = [_rows(own.pop(name)) for name in names if name in own]
        if rows:
            groups.append(rows)

    if isinstance(module, _ConvTransposeNd) and "weight" in own:
        weight = own["weight"].unflatten(0, (module.groups, -1))  # (groups, in, out, *kernel): a unit is (group, out)
        own["weight"] = weight.transpose(1, 2).flatten(0, 1)
        join("weight", "bias")
    elif isinstance(module, NORMS):
        own = {name: numbers.flatten() for name, numbers in own.items()}
        join("weight", "bias")
    elif isinstance(module, nn.MultiheadAttention):
        bias = own.pop("in_proj_bias", None)
        projections = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        if "in_proj_weight" in own:
            own |= {} if bias is None else {"in_proj_bias": bias}
            join("in_proj_weight", "in_proj_bias")
        else:
            for i, name in enumerate(projections):
                own |= {} if bias is None else {f"{name}_bias": bias.chunk(3)[i]}
                join(name, f"{name}_bias")
    elif isinstance(module, RECURRENT):
        for name in [name for name in own if name.startswith("weight_ih")]:
            suffix = name.removeprefix("weight_ih")
            join(name, f"weight_hh{suffix}", f"bias_ih{suffix}", f"bias_hh{suffix}")
    elif isinstance(module, (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)):
        join("weight", "bias")
    for name in list(own):
        join(name)
    return [torch.cat(rows, dim=1) for rows in groups]


def _rows(numbers: Tensor) -> Tensor:
    return numbers.reshape(len(numbers), -1) if numbers.dim() else numbers.reshape(1, 1)


def _by_labels(parameters: Mapping[str, nn.Parameter], labels: Labels) -> list[Tensor]:
    whole: dict[Hashable, list[Tensor]] = defaultdict(list)
    labelled, numbered = [], []
    for name, numbers in _numbered(parameters).items():
        label = labels(name, parameters[name])
        if not isinstance(label, torch.Tensor) or label.dim() == 0:
            whole[label.item() if isinstance(label, torch.Tensor) else label].append(numbers.flatten())
            continue
        if label.shape != numbers.shape or label.is_floating_point() or label.is_complex():
            raise ValueError(
                f"by: labels of {name!r} are {label.dtype} of shape {tuple(label.shape)}, expected integers of shape {tuple(numbers.shape)}, or one label"
            )
        labelled.append(label.detach().cpu().flatten().to(torch.int64))
        numbered.append(numbers.flatten())
    if labelled:
        values, inverse = torch.cat(labelled).unique(return_inverse=True)
        order = inverse.argsort(stable=True)
        pieces = torch.cat(numbered)[order].split(inverse.bincount().tolist())
        for value, piece in zip(values.tolist(), pieces, strict=True):
            whole[value].append(piece)
    return [torch.cat(pieces).unsqueeze(0) for pieces in whole.values()]


def _run(index: Tensor) -> slice | None:
    """The slice that a group of patches is, where its weights are consecutive."""
    first, last = int(index[0, 0]), int(index[-1, -1])
    if last - first + 1 != index.numel():
        return None
    return slice(first, last + 1) if bool((index.reshape(-1).diff() == 1).all()) else None
