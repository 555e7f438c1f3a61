"""koopt in a live training run: what :func:`koopt.attach` accepts."""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from koopt import distributed, sharding
from koopt.live import eigenbases, secants
from koopt.live.candidates import FEWEST
from koopt.live.handle import Live, is_attached
from koopt.live.moments import POLICIES, SECOND_POLICIES
from koopt.live.settings import Settings
from koopt.live.window import nbytes_of
from koopt.memory import free_memory
from koopt.partitions import bare, trainable
from koopt.trajectory import dtype_of_records

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from torch.distributed import ProcessGroup

MODES = ("auto", "jump", "forecast")
TAIL = 60  # steps that jumps are made from


def attach(
    optimizer: object,
    model: nn.Module,
    guard: Callable[[], object] | None = None,
    mode: str = "auto",
    *,
    window: int = 56,
    cycle: int = 100,
    tail: int | None = None,
    history: int | None = None,
    momentum: str = "keep",
    second_moments: str = "age",
    precondition: int | None = None,
    max_overhead: float = 0.06,
    refresh: Callable[[], object] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    with_optimizer: bool = False,
    group: ProcessGroup | str | None = "auto",
) -> Live:
    """Put koopt beside an optimizer: the training loop stays as it is.

    After each step the weights are recorded. With a guard a jump is tried at the end of each cycle: candidates are made
    from the last steps, a few are evaluated by the guard, and the best is kept if its loss is lower than now. In
    between, steps along secants of weights and gradients are tried; on full batches they follow one another, in the
    place of the optimizer's own moves, as long as the guard's loss falls. Where the motion is noise there are no jumps;
    there moves of Adam are made in the eigenbases of each weight matrix's gradients, as SOAP makes them. With
    ``precondition=0``, and by default without a guard, a run without accepted jumps is bit for bit as without koopt.

    Args:
        optimizer: any ``torch.optim`` optimizer, or a wrapper that holds one as `optimizer`.
        model: the module that it trains; parameters that are frozen or not in the optimizer are left alone.
        guard: called without arguments, returns the loss at the model's current weights as a float or a 0-d tensor;
            lower is better, also where the optimizer maximizes. In noisy training it should use a batch that is held
            out. Other modules that it changes, as BatchNorm of a discriminator, have to be in `model` to be put back.
        mode: "jump": weights are moved in place; "forecast": training is not touched; "auto": jumps where a guard is
            given, the last steps are smooth and the optimizer is none that preconditions with matrices, as SOAP does;
            "forecast" without a guard.
        window: even, the largest number of block means that forecasts are made from.
        cycle: optimizer steps between attempts to jump; three times as many after each that fails, up to 32
            cycles, twice as many after each look that finds noise, up to 4.
        tail: how many steps at the end of a cycle jumps are made from, at most: by means of each two of them where the
            last half is rough, and by that half where it is smooth; if there are fewer than 12, by all of them. None:
            60, at most a cycle.
        history: how many pairs of changes of weights and gradients are kept for steps along secants; 0: no such steps;
            None: 100, or as many as 16 MiB hold, but 10 at least, or none where 64 MiB do not hold these.
        momentum: after a jump "keep" it, "reset" it to zero, "scale" it by the square root of the loss ratio, or
            "combine" its recorded values as the weights were. L-BFGS starts anew, since it compares gradients of
            successive points.
        second_moments: after a jump "age" averages of squared gradients, as Adam holds them: their bias is corrected
            for as many more steps as it goes ahead, at most a cycle; or "keep" them.
        precondition: the longest side of a weight, taken as a matrix of its first dimension by the others, in whose
            eigenbasis moves are made, if the optimizer is torch's Adam or AdamW; up to four times that where it costs
            no more than for a square weight of that side. 0: all moves stay the optimizer's own; a number: from the
            start, in all modes; None: in mode "auto" with a guard, from a look that finds noise on until
            later ones say otherwise, 256, or a fourth of the examples that go through a linear layer or a convolution
            in the second step, up to 2,048; 0 in other modes. Weights that are sharded over processes keep the
            optimizer's moves.
        max_overhead: what recording, fits and the guard may cost, as a share of the steps. It is counted, not measured:
            an evaluation is 1/3 of a step, the rest goes by bytes as on batches of 64; see docs/live.md. Steps along
            secants that lowered the loss are not counted, nor are moves in eigenbases.
        refresh: called without arguments once weights are moved, to renew what depends on them, such as the statistics
            of BatchNorm: ``lambda: torch.optim.swa_utils.update_bn(loader, model)``. A jump has to be better with them
            too, else weights and buffers are put back. None: buffers stay as they are.
        dtype: of what is recorded; None: the parameters', at least float32.
        device: where it is kept; None: where the first parameter is. Eigenbases are where their parameter is.
        with_optimizer: carry koopt's state along in the optimizer's own ``state_dict()`` under "koopt".
        group: the processes that train this model together, each of which has to call this function: "auto" takes those
            of DistributedDataParallel or of the mesh of FSDP2, else all of them; None: this process alone.

    Returns:
        The handle, a :class:`koopt.Live`.

    Raises:
        TypeError: if an argument has the wrong type, or a parameter is complex.
        ValueError: if koopt is attached to this optimizer already, the model has none of its parameters, an argument is
            out of range, the memory is not there, or the processes do not fit together.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> koop = koopt.attach(optimizer, model, guard=lambda: model.weight.square().sum())
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     model.weight.square().sum().backward()
    ...     optimizer.step()
    >>> koop.jumps[0].accepted, koop.jumps[0].reason
    (True, 'better')
    """
    stepping, inner = _within(optimizer)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is {type(model).__name__}, expected the torch.nn.Module that the optimizer trains")
    if guard is not None and not callable(guard):
        raise TypeError(f"guard is {type(guard).__name__}, expected a function without arguments that returns the loss")
    if refresh is not None and not callable(refresh):
        raise TypeError(
            f"refresh is {type(refresh).__name__}, expected a function without arguments, such as "
            "lambda: torch.optim.swa_utils.update_bn(loader, model)"
        )
    for name, value, known in (
        ("mode", mode, MODES),
        ("momentum", momentum, POLICIES),
        ("second_moments", second_moments, SECOND_POLICIES),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    if mode == "jump" and guard is None:
        raise ValueError('mode is "jump", which needs a guard: a function that returns the loss at the current weights')
    shortest = FEWEST if tail is None else tail
    for name, value, least in (("window", window, 4), ("tail", shortest, FEWEST), ("cycle", cycle, shortest)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            why = ", the tail" if name == "cycle" and tail is not None else ""
            raise ValueError(f"{name} is {value!r}, expected a whole number >= {least}{why}")
    if history is not None and (isinstance(history, bool) or not isinstance(history, int) or history < 0):
        raise ValueError(f"history is {history!r}, expected a whole number >= 0, or None")
    if precondition is not None and (
        isinstance(precondition, bool) or not isinstance(precondition, int) or precondition < 0
    ):
        raise ValueError(f"precondition is {precondition!r}, expected a whole number >= 0, or None")
    if window % 2:
        raise ValueError(f"window is {window}, expected an even number: its block means merge in pairs")
    if isinstance(max_overhead, bool) or not isinstance(max_overhead, Real) or not 0 <= max_overhead < math.inf:
        raise ValueError(f"max_overhead is {max_overhead!r}, expected a share of the steps' cost >= 0, such as 0.06")
    if is_attached(inner):
        raise ValueError("optimizer: koopt is attached to it already; use that handle, or detach() it first")
    sharding.require_supported(model)
    sharding.reshard(sharding.sharding_modules(model))
    named = _trained(inner, bare(model))
    parameters = [sharding.local(parameter) for parameter in named.values()]
    dtype = dtype_of_records(named, dtype)
    place = torch.device(device) if device is not None else parameters[0].device
    inside = isinstance(inner, torch.optim.LBFGS)  # leaves gradients of other points than a step began at
    if history is None:  # by the whole parameters, so that all processes have the same
        history = 0 if inside else secants.default_length(list(named.values()), dtype)
    if tail is None:
        tail = min(cycle, TAIL)
    mode = mode if guard is not None else "forecast"
    replaced = stepping is inner and eigenbases.replaces(inner)
    if precondition and not replaced:
        raise ValueError(
            f"precondition is {precondition}, but the optimizer is {type(optimizer).__name__}, expected torch's Adam "
            "or AdamW by itself; leave it None"
        )
    if precondition and any(map(sharding.is_sharded, named.values())):
        raise ValueError(
            f"precondition is {precondition}, but weights are sharded over processes, expected whole ones, as with "
            "DistributedDataParallel; leave it None"
        )
    at_once = precondition is not None
    if precondition is None:
        precondition = eigenbases.LARGEST if mode == "auto" and replaced else 0
        if not any(map(eigenbases.is_matrix, named.values())):
            precondition = 0
    settings = Settings(
        mode=mode,
        window=window,
        cycle=cycle,
        tail=tail,
        momentum=momentum,
        second_moments=second_moments,
        max_overhead=float(max_overhead),
        dtype=dtype,
        device=place,
        history=0 if mode == "forecast" else history,
        precondition=precondition,
        at_once=at_once,
    )
    if settings.history and inside:
        raise ValueError(f"history is {history}, but L-BFGS leaves no gradient of where a step began; leave it 0")
    asked = repr((replace(settings, device=torch.device(place.type)), guard is None, refresh is None))
    ranks = distributed.join(model, named, group, asked)
    distributed.together(lambda: _require_memory(list(named.values()), settings), ranks, "attach")
    return Live(stepping, inner, model, named, guard, refresh, settings, with_optimizer, ranks)


def _within(optimizer: object) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """The outermost optimizer that runs hooks after its steps, and the innermost, which has the state.

    Lookahead runs its own once it has moved the weights itself; wrappers such as Accelerate's run none.
    """
    chain: list[Any] = [optimizer]
    while isinstance(inner := getattr(chain[-1], "optimizer", None), torch.optim.Optimizer):
        chain.append(inner)
    hooked = [one for one in chain if "_optimizer_step_post_hooks" in getattr(one, "__dict__", {})]
    if not hooked:
        given = type(optimizer).__name__
        raise TypeError(f"optimizer is {given}, expected a torch.optim.Optimizer, or a wrapper that holds one")
    return hooked[0], chain[-1]


def _trained(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, nn.Parameter]:
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    named = {name: parameter for name, parameter in trainable(model).items() if parameter in held}
    if not named:
        raise ValueError("model: none of its trainable parameters is in the optimizer; pass the model that it trains")
    return named


def _require_memory(whole: Sequence[Tensor], settings: Settings) -> None:
    """Refuse more than is free: of what is recorded where that is kept, and of bases where the parameters are."""
    parameters = [sharding.local(parameter) for parameter in whole]
    snapshots, means = settings.snapshots, settings.means
    needed = nbytes_of(parameters, snapshots, means, settings.dtype)
    needed += secants.nbytes_of(parameters, settings.history, settings.dtype)
    free = free_memory(settings.device)
    if free is not None and needed > free:
        raise ValueError(
            f"window: {snapshots + means} snapshots and {settings.history} pairs in {settings.dtype} need "
            f"{needed / 2**30:.3g} GiB, {settings.device} has {free / 2**30:.3g} GiB free; "
            "take a smaller window, tail or history, dtype=torch.bfloat16, or device='cpu'"
        )
    place = parameters[0].device
    bases = sum(eigenbases.nbytes_of(one, settings.precondition) for one in whole) if settings.precondition else 0
    beside = needed if place == settings.device else 0
    free = free_memory(place)
    if bases and free is not None and bases + beside > free:
        raise ValueError(
            f"precondition: bases of sides up to {settings.precondition} need {bases / 2**30:.3g} GiB, {place} has "
            f"{(free - beside) / 2**30:.3g} GiB free beside what is recorded; take precondition=0, or a smaller one"
        )
