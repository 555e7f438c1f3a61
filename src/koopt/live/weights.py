"""The trained weights, which others may take the place of for a while."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from koopt import sharding

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn


class Weights:
    """The parameters that are trained, and who holds them while they are not the trained ones.

    Args:
        named: the parameters by name.
        sharding_modules: those that are to be resharded before their weights are read or written.

    >>> weights = Weights({"a": nn.Parameter(torch.ones(1))})
    >>> with weights.holding("a test") as saved:
    ...     weights.write([torch.zeros(1)])
    ...     weights.holder, weights.parameters[0].item()
    ('a test', 0.0)
    >>> weights.holder, weights.parameters[0].item()
    (None, 1.0)
    """

    def __init__(self, named: Mapping[str, nn.Parameter], sharding_modules: Sequence[Any] = ()) -> None:
        self.named = dict(named)
        self._own = list[Any](named.values())
        self._sharding = list(sharding_modules)
        self._placed = any(sharding.is_sharded(parameter) for parameter in self._own)
        self._places: list[int] = []
        self._values: list[Tensor] = []
        self.holder: str | None = None

    @property
    def parameters(self) -> list[Any]:
        """What this process holds of each parameter, in its memory."""
        return [sharding.local(parameter) for parameter in self._own] if self._placed else self._own

    @property
    def values(self) -> list[Tensor]:
        """The same, detached: reading them needs no ``torch.no_grad()``, which costs more than a small copy.

        >>> weights = Weights({"a": nn.Parameter(torch.ones(1))})
        >>> weights.values
        [tensor([1.])]
        """
        own = self.parameters
        places = [parameter.data_ptr() for parameter in own]
        if places != self._places or self._placed:  # `parameter.data = ...` puts it elsewhere
            self._places, self._values = places, [parameter.detach() for parameter in own]
        return self._values

    @torch.no_grad()
    def write(self, values: Sequence[Tensor]) -> None:
        sharding.reshard(self._sharding)  # else the next forward pass would take whole weights of before
        # one call, which Ctrl-C cannot cut in two
        torch._foreach_copy_(self.parameters, list(values))  # pyright: ignore[reportPrivateImportUsage], as torch.optim takes it
        torch.clear_autocast_cache()  # else a forward pass within the same region would take copies of before

    @contextlib.contextmanager
    def holding(self, who: str) -> Iterator[list[Tensor]]:
        """The weights may be changed within; whatever happens, they are put back."""
        saved = [parameter.detach().clone() for parameter in self.parameters]
        self.holder = who
        try:
            yield saved
        finally:
            self.write(saved)
            self.holder = None

    def require_free(self) -> None:
        if self.holder is not None:
            raise RuntimeError(f"the weights are held by {self.holder}, and not the trained ones there; leave it first")

    def require_in(self, model: nn.Module) -> None:
        """Refuse a model whose parameters are no longer these."""
        sharding.reshard(self._sharding)
        now = dict(model.named_parameters())
        for name, parameter in self.named.items():
            if now.get(name) is not parameter:
                raise ValueError(f"model: {name!r} was replaced after attach(); detach(), and attach again")

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """A copy of recorded columns, cut into parameters and placed like them.

        Args:
            flat: `(*lead, state)`.

        Returns:
            `(*lead, *shape)` by name.

        >>> Weights({"a": nn.Parameter(torch.ones(1, 2))}).by_name(torch.zeros(3, 2))["a"].shape
        torch.Size([3, 1, 2])
        """
        found, own = {}, self.parameters
        pieces = flat.split([parameter.numel() for parameter in own], dim=-1)
        for (name, parameter), piece, held in zip(self.named.items(), pieces, own, strict=True):
            copied = piece.clone(memory_format=torch.contiguous_format)
            found[name] = sharding.as_whole(copied.view(*flat.shape[:-1], *held.shape), parameter)
        return found

    def flat(self, by_name: Mapping[str, Tensor]) -> Tensor:
        """The columns that :meth:`by_name` was made of."""
        pieces = []
        for name, parameter in self.named.items():
            piece = sharding.own_part(by_name[name], parameter)
            pieces.append(piece.reshape(*piece.shape[: piece.dim() - parameter.dim()], -1))
        return torch.cat(pieces, dim=-1)

    def named_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of what is recorded with its columns by name, as it does not depend on the number of processes."""
        return {key: self.by_name(value) if isinstance(value, torch.Tensor) else value for key, value in state.items()}

    def flat_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return {key: self.flat(value) if hasattr(value, "keys") else value for key, value in state.items()}
