"""State dicts as ``torch.save`` writes them: a zip archive of plain tensors, whose places are found without reading."""

from __future__ import annotations

import pickle
import re
import struct
import sys
import warnings
import zipfile
from typing import TYPE_CHECKING, Any

import torch

from koopt.checkpoint.stored import Checkpoint, Entry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
NESTED = ("state_dict", "model_state_dict", "model")  # where a larger dict keeps the model's weights
LOCAL = struct.Struct("<4s5H3I2H")  # a local header of a zip archive


def open_pickled(path: Path) -> Checkpoint:
    """The tensors of a state dict, alone or under one of the usual keys; nothing that could run code is loaded."""
    records = data_records(path)
    loaded = _load(path)
    weights = _state_dict(path, loaded)
    base = _start_of_mapping(path, records, loaded)
    entries = {}
    for name, tensor in weights.items():
        order = tuple(sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis)))
        if tensor.layout != torch.strided or not tensor.permute(order).is_contiguous():
            raise ValueError(f"{path}: tensor {name!r} is not a whole strided tensor; save it with .contiguous()")
        offset = tensor.data_ptr() - base if tensor.numel() else 0
        entries[name] = Entry(path, offset, tensor.dtype, tuple(tensor.shape), order)
    entries = dict(sorted(entries.items(), key=lambda item: item[1].offset))
    numbers: dict[str, object] = {k: v for k, v in loaded.items() if isinstance(k, str) and type(v) is int}
    return Checkpoint(path, "pt", entries, numbers, (path,))


def data_records(path: Path) -> dict[int, int]:
    """Where each tensor's record begins in the file, and its size; empty ones are left out."""
    records, wrong = {}, None
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for info in archive.infolist():
                if "/data/" in info.filename and info.file_size:
                    records[data_offset(file, info.header_offset)] = info.file_size
                if info.compress_type != zipfile.ZIP_STORED:
                    wrong = f"record {info.filename!r} is compressed, which torch.save never does"
                if info.filename.endswith("/byteorder") and archive.read(info) != sys.byteorder.encode():
                    wrong = "saved in another byte order; load and save it on this machine"
    except Exception as error:  # whatever damaged bytes lead to
        raise ValueError(
            f"{path}: not what torch.save writes since 1.6, or truncated ({error}); copy it, or save it, again"
        ) from None
    if wrong is not None:
        raise ValueError(f"{path}: {wrong}")
    end = path.stat().st_size
    for offset, size in records.items():
        if offset + size > end:
            raise ValueError(f"{path}: truncated, a record ends past the end of the file; copy it again")
    return records


def data_offset(file: Any, header: int) -> int:
    """Where the data of the record begin whose local header is at `header`."""
    file.seek(header)
    fields = LOCAL.unpack(file.read(LOCAL.size))
    if fields[0] != b"PK\x03\x04":
        raise zipfile.BadZipFile("a record has no header")
    return header + LOCAL.size + fields[-2] + fields[-1]


def _load(path: Path) -> dict[Any, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL [\w.]+", str(error))
        raise ValueError(
            f"{path}: not loaded, since it holds more than plain tensors ({what[0] if what else 'objects'}), "
            "which may run code; save the state dict alone"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # whatever damaged bytes lead to
        raise ValueError(
            f"{path}: damaged ({str(error).strip()[:200] or type(error).__name__}); copy it again"
        ) from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}, expected a state dict: tensors by name")
    return loaded


def _state_dict(path: Path, loaded: dict[Any, Any]) -> dict[str, torch.Tensor]:
    """The model's weights: under a usual key, whatever lies beside it (a loss, a counter), else at the top."""
    nested = {key: _tensors_of(loaded[key]) for key in NESTED if isinstance(loaded.get(key), dict)}
    full = [key for key, weights in nested.items() if weights]
    if len(full) > 1:
        raise ValueError(f"{path}: tensors under {full[0]!r} and under {full[1]!r}; save one state dict")
    weights = nested[full[0]] if full else _tensors_of(loaded)
    if not weights:
        raise ValueError(
            f"{path}: no tensors by name, neither at the top nor under {', '.join(NESTED)}; save the model's state dict"
        )
    inside = {key: _numbers_of(value) for key, value in loaded.items() if isinstance(value, dict)}
    inner = [key for key, count in inside.items() if count > sum(one.numel() for one in weights.values())]
    if not full and inner:  # what lies at the top may be a loss, and the weights are in there
        raise ValueError(
            f"{path}: tensors at the top and a dict under {inner[0]!r}; save the state dict alone or under 'model'"
        )
    if not all(isinstance(name, str) for name in weights):
        raise ValueError(f"{path}: tensors are named by something other than strings; save a state dict")
    return weights


def _numbers_of(held: dict[Any, Any]) -> int:
    deeper = sum(_numbers_of(value) for value in held.values() if isinstance(value, dict))
    return deeper + sum(tensor.numel() for tensor in _tensors_of(held).values())


def _tensors_of(held: dict[Any, Any]) -> dict[Any, torch.Tensor]:
    return {name: value for name, value in held.items() if isinstance(value, torch.Tensor)}


def _start_of_mapping(path: Path, records: dict[int, int], loaded: Any) -> int:
    """The address of the file's first byte: storages lie in the mapping as records lie in the file."""
    storages = {}
    for tensor in _tensors(loaded, 0):
        if tensor.layout == torch.strided and tensor.untyped_storage().nbytes():
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    addresses = sorted(storages)
    places = sorted(records)
    if not addresses:
        return 0
    base = addresses[0] - places[0] if places else -1
    if [address - base for address in addresses] != places or any(storages[base + p] > records[p] for p in places):
        raise ValueError(f"{path}: its records are not those of its tensors; load it and save it again")
    return base


def _tensors(value: Any, depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth < 20 and isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner, depth + 1)
