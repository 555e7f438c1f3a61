"""Offline use on saved checkpoints: a later one forecast from those on disk, in two streamed passes."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from koopt import linalg
from koopt.checkpoint import rows, rules, streaming, writing
from koopt.checkpoint.factors import Accumulator, Factor, Part, measure, needs_qr
from koopt.checkpoint.groups import Group, Slab, choose, group, require_apart, slabs
from koopt.checkpoint.opening import open_checkpoint
from koopt.checkpoint.steps import even_grid, steps_of
from koopt.checkpoint.stored import require_alike, require_same_names
from koopt.names import natural

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from koopt.checkpoint.stored import Checkpoint


@dataclass(frozen=True)
class Plan:
    """What will be read and written, found from the headers alone.

    Attributes:
        checkpoints: in order of time.
        times: their optimizer steps.
        groups: of the tensors that are forecast.
        copied: the other tensors of the last checkpoint.
        weights: how many numbers are forecast.
        read: bytes that both passes read.
        written: bytes of the output.
        memory: bytes that are held at most, beside the interpreter and torch.
    """

    checkpoints: tuple[Checkpoint, ...]
    times: tuple[float, ...]
    groups: tuple[Group, ...]
    copied: tuple[str, ...]
    weights: int
    read: int
    written: int
    memory: int


@dataclass(frozen=True)
class Forecast:
    """What became of a forecast.

    Attributes:
        plan: what was read.
        step: the optimizer step that it is for.
        output: the file or folder that was written; None if none was asked for.
        rows: one a group, for tables: `group`, `tensors`, `weights`, `patches`, `method` (as used), `rank` (median),
            `motion` (the last step over the size of the weights), `step_resolution` and `window_resolution` (motion in
            roundings of the stored numbers, the median patch), `still` (tensors that never changed, and are copied),
            and with a hold-out `error`, `error_mean`, `error_line`: how far the last checkpoint was missed from the
            earlier ones, over how far it is from the one before it, so that no change is 1.
        error: that of all groups together; None without a hold-out.
    """

    plan: Plan
    step: float
    output: Path | None
    rows: tuple[dict[str, Any], ...] = field(repr=False)
    error: float | None = None


def plan_of(
    paths: Sequence[str | os.PathLike[str]],
    by: str = "network",
    steps: Sequence[float] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Plan:
    """Open and compare checkpoints; arguments and errors as :func:`forecast_checkpoints`."""
    if isinstance(paths, (str, Path)) or len(paths) < 2:
        raise ValueError(f"paths: expected at least two checkpoints, got {paths!r}; give more")
    for name, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise TypeError(f"{name} is {patterns!r}, expected several patterns; pass [{patterns!r}]")
    opened = [open_checkpoint(path) for path in paths]
    times = steps_of(opened, steps)
    order = sorted(range(len(times)), key=times.__getitem__)
    checkpoints = tuple(opened[i] for i in order)
    chosen = [choose(checkpoint, include, exclude) for checkpoint in checkpoints]
    names, last = chosen[-1], checkpoints[-1]
    if last.kind != "pt":  # a safetensors file does not keep the order of the model
        names = sorted(names, key=natural)
    if not names:
        raise ValueError(
            f"{last.path}: no floating-point tensor of {len(last.entries)} is let in; widen --include or --exclude"
        )
    require_same_names(checkpoints, chosen)
    require_alike(checkpoints, names)
    for checkpoint in checkpoints:
        require_apart(checkpoint, names)
    groups = tuple(group(last.entries, names, by))
    moved = sum(last.entries[name].nbytes for name in names)
    small = max((slab.patches for slab in slabs(groups, len(times))), default=0) * len(times) ** 2 * 8
    block = streaming.block_bytes(len(times)) * len(times)
    return Plan(
        checkpoints=checkpoints,
        times=tuple(times[i] for i in order),
        groups=groups,
        copied=tuple(name for name in last.entries if name not in set(names)),
        weights=sum(last.entries[name].size for name in names),
        read=2 * len(times) * moved,
        written=sum(file.stat().st_size for file in last.files),
        memory=2 * streaming.WORKERS * block + 8 * small + 8 * len(times) * sum(one.patches for one in groups) + 2**27,
    )


def forecast_checkpoints(
    paths: Sequence[str | os.PathLike[str]],
    ahead: float,
    output: str | os.PathLike[str] | None = None,
    method: str = "koopman",
    by: str = "network",
    steps: Sequence[float] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    holdout: bool = False,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Forecast:
    """Forecast a later checkpoint from saved ones, without the code that trained them.

    The forecast is a linear combination of the checkpoints, so they are read twice, a block at a time: memory does not
    grow with their size. Integers, running statistics of normalization and tensors that never changed are copied from
    the last. The output is of the last checkpoint's kind, with its dtypes and metadata; it appears when it is complete.

    Args:
        paths: checkpoints of one model, in any order: `.safetensors`, `.pt` state dicts, or folders.
        ahead: optimizer steps after the last checkpoint, in the unit of `steps`; may be ``math.inf``.
        output: file or folder to write; None: only the report is made.
        method: as in :meth:`koopt.Trajectory.forecast`. Where the stored numbers do not show each step, the regression
            line takes its place; where they do not show the window, the mean.
        by: "network", "layer" or "node".
        steps: of each path, where neither metadata nor names tell.
        include, exclude: shell patterns of tensor names; what is left out is copied.
        holdout: forecast the last checkpoint from the earlier ones too, and report the errors.
        overwrite: replace the output if it is a file that exists; a folder is always a new one.
        progress: called with a stage, the bytes done and all of them.
        options: of the method, as in :meth:`koopt.Trajectory.forecast`.

    Returns:
        A :class:`Forecast`: what was done for each group.

    Raises:
        TypeError: if the method has no option of that name, or `include` or `exclude` is one string.
        ValueError: if checkpoints are damaged, do not fit each other or hold NaN, an option is out of range, the
            spacing is too uneven, or no stored motion is above rounding; nothing is written then.
        OSError: if a file cannot be read or written, or the output exists.

    Source: Dogra & Redman (2020), Algorithm 1, as a combination of snapshots.

    >>> import tempfile, pathlib
    >>> from safetensors.torch import load_file, save_file
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for step, value in ((10, 8.0), (20, 4.0), (30, 2.0)):
    ...     save_file({"weight": torch.tensor([value])}, folder / f"step_{step}.safetensors")
    >>> found = koopt.forecast_checkpoints(sorted(folder.iterdir()), ahead=20, output=folder / "future.safetensors")
    >>> found.step, load_file(found.output)
    (50.0, {'weight': tensor([0.5000])})
    """
    rule = rules.Rule(method, ahead, options)
    rules.check(rule, len(paths), holdout)
    plan = plan_of(paths, by, steps, include, exclude)
    require_grid(plan, rule, holdout)
    place = None if output is None else Path(output)
    if place is not None:
        writing.require_output(place, plan.checkpoints, overwrite)
    times = torch.tensor(plan.times, dtype=torch.float64)
    found: dict[Slab, tuple[rules.Outcome, tuple[str, ...]]] = {}
    parts: dict[str, list[dict[str, Any]]] = {}
    for slab, factor in factors_of(plan, options.get("rtol"), progress):
        outcome = rules.decide(factor, times, rule)
        found[slab] = outcome, factor.still
        errors = rules.held_out(factor, times, rule) if holdout else {}
        parts.setdefault(slab.group.label, []).append(rows.part(slab, factor, outcome, errors))
    reported = tuple(rows.row(label, held) for label, held in parts.items())
    _require_seen(found, rule, plan)
    step = plan.times[-1] + ahead
    if place is not None:
        with writing.targets(plan.checkpoints[-1], place, step) as files:
            _combine(plan, found, files, progress)
    whole = rows.row("all", list(chain.from_iterable(parts.values())))
    return Forecast(plan, step, place, reported, whole.get("error"))


def factors_of(
    plan: Plan, rtol: float | None = None, progress: Callable[[str, int, int], None] | None = None
) -> Iterator[tuple[Slab, Factor]]:
    """The first pass: each slab with the small factor of its patches."""
    total, done = plan.read // 2, 0
    entries = plan.checkpoints[-1].entries

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("reading", done, total)

    def measured(block: streaming.Block, numbers: Tensor) -> Part:
        patches = numbers.view(len(numbers), block.patches, block.width).transpose(0, 1)
        try:
            return measure(patches, needs_qr(numbers.dtype, rtol))
        except OverflowError:
            raise ValueError(
                f"{entries[block.name].file}: tensor {block.name!r} has numbers too large to square in float64"
            ) from None

    size = streaming.block_bytes(len(plan.times))
    asked = chain.from_iterable(streaming.blocks(slab, entries, size) for slab in slabs(plan.groups, len(plan.times)))
    adding: Accumulator | None = None
    for block, part in streaming.work_through(plan.checkpoints, asked, measured, tell):
        if adding is None or adding.slab is not block.slab:
            if adding is not None:
                yield adding.slab, adding.finish()
            adding = Accumulator(block.slab, plan.checkpoints, rtol)
        adding.add(block, part)
    if adding is not None:
        yield adding.slab, adding.finish()


def _combine(
    plan: Plan,
    found: dict[Slab, tuple[rules.Outcome, tuple[str, ...]]],
    files: dict[Path, writing.Target],
    progress: Callable[[str, int, int], None] | None,
) -> None:
    """The second pass: combine the checkpoints, and copy the rest from the last one."""
    last = plan.checkpoints[-1]
    total = plan.read // 2 + plan.written
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("writing", done, total)

    written: dict[Path, list[tuple[int, int]]] = {file: [] for file in last.files}

    def combined(block: streaming.Block, numbers: Tensor) -> int:
        entry = last.entries[block.name]
        coefficients = found[block.slab][0].coefficients[block.first : block.first + block.patches]
        patches = numbers.view(len(numbers), block.patches, block.width).transpose(0, 1)
        made = linalg.combine(coefficients, patches).reshape(-1)
        if not linalg.all_finite(made):
            raise ValueError(
                f"{entry.file}: the forecast of tensor {block.name!r} is not finite in "
                f"{str(entry.dtype).removeprefix('torch.')}; take a shorter --ahead or a lower --rank"
            )
        writing.write(files[entry.file], entry, block.start, made.view(torch.uint8).numpy().data)
        return made.numel() * entry.dtype.itemsize

    size = streaming.block_bytes(len(plan.times))
    asked = chain.from_iterable(
        streaming.blocks(slab, last.entries, size, skip=still) for slab, (_, still) in found.items()
    )
    for block, nbytes in streaming.work_through(plan.checkpoints, asked, combined, tell):
        entry = last.entries[block.name]
        begin = entry.offset + block.start * entry.dtype.itemsize
        written[entry.file].append((begin, begin + nbytes))
        tell(nbytes)
    for file, target in files.items():
        writing.copy_rest(target, written[file], writing.data_start(last, file), tell)
    if progress is not None:
        progress("writing", total, total)


def require_grid(plan: Plan, rule: rules.Rule, holdout: bool) -> None:
    """Refuse times that are too uneven for the method before anything is read."""
    if rule.method in (*rules.TIMED, *rules.TIMELESS):
        return
    for times in (plan.times, plan.times[:-1])[: 1 + holdout]:
        rules.check(rule, len(even_grid(torch.tensor(times, dtype=torch.float64))[0]))


def _require_seen(found: dict[Slab, tuple[rules.Outcome, tuple[str, ...]]], rule: rules.Rule, plan: Plan) -> None:
    """Refuse if nothing moves, or the method is not an average and no patch moves visibly."""
    used = {method for outcome, _ in found.values() for method in outcome.used}
    if rule.method == "last" or used - {"mean", "last"} or (rule.method == "mean" and "mean" in used):
        return
    last = plan.checkpoints[-1]
    if "mean" not in used:
        raise ValueError(
            f"{last.path}: no tensor differs from those of the other checkpoints; give checkpoints of one run"
        )
    raise ValueError(
        f"{last.path}: all motion is below the resolution of the stored numbers ({rules.SEEN:g} roundings); "
        "give checkpoints further apart or of more digits, or take --method mean"
    )
