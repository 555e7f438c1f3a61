"""How many examples of a step go through each weight, which says how long a step takes beside products with it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from koopt.partitions import is_compiled

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

STEP = 2  # of which they are counted; before the first one other passes may have been made
COUNTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # modules whose outputs are one for each example and row


class Examples:
    """Counts examples, tokens or pixels from forward passes that are to be gone back through, by weight.

    Of other modules than linear ones and convolutions there is no count, nor where the model is compiled, as a hook
    would be compiled into it.

    Args:
        model: that is trained.
        named: its weights by name.

    Attributes:
        counts: by name; 0 as long as there are none.

    >>> model = nn.Linear(3, 2)
    >>> examples = Examples(model, dict(model.named_parameters()))
    >>> _ = model(torch.ones(5, 7, 3))
    >>> examples.counts
    {'weight': 35, 'bias': 0}
    """

    def __init__(self, model: nn.Module, named: Mapping[str, Tensor]) -> None:
        self.counts = dict.fromkeys(named, 0)
        names, self._hooks = {parameter: name for name, parameter in named.items()}, []
        if any(is_compiled(one) or one._compiled_call_impl is not None for one in model.modules()):
            return
        for module in model.modules():
            weight = module._parameters.get("weight") if isinstance(module, COUNTED) else None
            if weight is not None and weight in names:
                counting = partial(_count, self.counts, names[weight], len(weight))
                self._hooks.append(module.register_forward_hook(counting))

    def restart(self) -> None:
        """What went through until now was of no step."""
        self.counts.update(dict.fromkeys(self.counts, 0))

    def end(self) -> None:
        """Count no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _count(counts: dict[str, int], name: str, rows: int, module: nn.Module, inputs: Any, output: Any) -> None:
    if torch.is_grad_enabled() and isinstance(output, torch.Tensor) and not torch.compiler.is_compiling():
        counts[name] += output.numel() // rows
