"""The trained weights, which others may take the place of for a while."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor, nn


class Weights:
    """The parameters that are trained, and who holds them while they are not the trained ones.

    Args:
        named: the parameters by name.

    >>> weights = Weights({"a": nn.Parameter(torch.ones(1))})
    >>> with weights.holding("a test") as saved:
    ...     weights.write([torch.zeros(1)])
    ...     weights.holder, weights.parameters[0].item()
    ('a test', 0.0)
    >>> weights.holder, weights.parameters[0].item()
    (None, 1.0)
    """

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        self.named = dict(named)
        self.parameters = list[Any](named.values())
        self.holder: str | None = None

    @torch.no_grad()
    def write(self, values: Sequence[Tensor]) -> None:
        # one call, which Ctrl-C cannot cut in two
        torch._foreach_copy_(self.parameters, list(values))  # pyright: ignore[reportPrivateImportUsage]

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
        now = dict(model.named_parameters())
        for name, parameter in self.named.items():
            if now.get(name) is not parameter:
                raise ValueError(f"model: {name!r} was replaced after attach(); detach(), and attach again")
