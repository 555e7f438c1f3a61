"""The safetensors format: a header of JSON that says where each tensor lies."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from koopt.checkpoint.stored import Checkpoint, Entry

if TYPE_CHECKING:
    from pathlib import Path

LONGEST = 100_000_000  # bytes of a header, as in the format's own reader
MOST_AXES = 64
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def open_safetensors(path: Path) -> Checkpoint:
    """The tensors of one file, in the order of the data; all of the header is checked.

    Source: the safetensors format, https://huggingface.co/docs/safetensors.
    """
    header, start = read_header(path)
    size = path.stat().st_size - start
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: damaged header, __metadata__ is not a map of strings")
    found = [(*_place(path, name, given), name) for name, given in header.items()]
    found.sort(key=lambda item: item[:2])
    entries, end = {}, 0
    for begin, stop, dtype, shape, name in found:
        if begin != end:
            raise ValueError(f"{path}: damaged header, the data of tensor {name!r} begin at {begin}, expected {end}")
        if stop > size:
            raise ValueError(
                f"{path}: truncated, tensor {name!r} ends {stop - size:,} bytes past the end of the file; copy it again"
            )
        entries[name] = Entry(path, start + begin, dtype, shape, tuple(range(len(shape))))
        end = stop
    if end != size:
        raise ValueError(f"{path}: damaged, {size - end:,} bytes after the last tensor belong to none")
    return Checkpoint(path, "safetensors", entries, metadata, (path,))


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a file, and where the data begin."""
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(LONGEST, size - 8):
            raise ValueError(
                f"{path}: not a safetensors file, or truncated: {size:,} bytes, a header of {length:,}; copy it again"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged header ({error}); copy it again") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: damaged header, not a map of tensors; copy it again")
    return header, 8 + length


def header_bytes(path: Path, metadata: dict[str, str]) -> bytes:
    """The start of a file like `path` with this metadata: the tensors lie in it as they do there."""
    header, _ = read_header(path)
    header.pop("__metadata__", None)
    raw = json.dumps(({"__metadata__": metadata} if metadata else {}) | header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def _place(path: Path, name: str, given: Any) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
    """Begin, end, dtype and shape of one tensor of a header."""
    if not isinstance(given, dict) or given.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{path}: damaged header, tensor {name!r} needs a dtype, a shape and data_offsets")
    dtype, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{path}: tensor {name!r} has the dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    if not _whole(shape) or not _whole(offsets) or len(offsets) != 2 or len(shape) > MOST_AXES:
        raise ValueError(f"{path}: damaged header, shape or data_offsets of tensor {name!r} are not whole numbers >= 0")
    numel = 1
    for length in shape:
        numel *= length
    begin, end = offsets
    if end - begin != numel * DTYPES[dtype].itemsize:
        raise ValueError(
            f"{path}: damaged header, tensor {name!r} of shape {tuple(shape)} in {dtype} takes "
            f"{numel * DTYPES[dtype].itemsize:,} bytes, its data_offsets {begin} to {end} say otherwise"
        )
    return begin, end, DTYPES[dtype], tuple(shape)


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
