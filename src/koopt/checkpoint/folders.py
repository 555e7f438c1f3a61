"""Folders as Hugging Face writes them: safetensors files, an index of the shards, configuration and tokenizer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from koopt.checkpoint.safe import open_safetensors
from koopt.checkpoint.stored import Checkpoint

if TYPE_CHECKING:
    from pathlib import Path

INDEX = ".safetensors.index.json"
BESIDE = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}  # what makes the weights loadable
OF_THE_RUN = {"trainer_state.json", "optimizer.json", "scheduler.json"}  # not true of a forecast


def open_folder(folder: Path) -> Checkpoint:
    """The tensors of a folder's only safetensors file, or of all shards that its index names."""
    indices = sorted(path for path in folder.iterdir() if path.name.endswith(INDEX))
    single = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    if len(indices) > 1:
        raise ValueError(f"{folder}: {len(indices)} indices, {indices[0].name} and {indices[1].name}; keep one")
    if indices:
        return _open_shards(folder, indices[0])
    preferred = [path for path in single if path.name == "model.safetensors"] or single
    if len(preferred) != 1:
        held = "no safetensors file" if not single else f"{len(single)} safetensors files and no index of them"
        raise ValueError(f"{folder}: {held}; give a folder with model.safetensors or model{INDEX}, or name the file")
    found = open_safetensors(preferred[0])
    return Checkpoint(folder, "folder", found.entries, found.metadata | _trainer_step(folder), found.files)


def beside(folder: Path, weights: tuple[Path, ...]) -> list[Path]:
    """The files of a folder, other than weights, that are needed to load it."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in BESIDE and path.name not in OF_THE_RUN and path not in weights
    ]


def _open_shards(folder: Path, index: Path) -> Checkpoint:
    placed, metadata = read_index(index)
    files = dict.fromkeys(placed.values())
    entries = {}
    for name in files:
        if "/" in name or "\\" in name or name in (".", "..") or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: names the shard {name!r}, expected a .safetensors file of this folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: this shard, which {index.name} names, is missing; copy it again")
        shard = open_safetensors(folder / name).entries
        for tensor in shard:
            if placed.get(tensor) != name:
                raise ValueError(f"{folder / name}: holds tensor {tensor!r}, which {index.name} does not place there")
        entries |= shard
    for tensor, name in placed.items():
        if tensor not in entries:
            raise ValueError(f"{folder / name}: tensor {tensor!r}, which {index.name} places there, is missing")
    metadata = {key: value for key, value in metadata.items() if key != "total_size"}
    return Checkpoint(folder, "folder", entries, metadata | _trainer_step(folder), tuple(folder / n for n in files))


def read_index(index: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Which file each tensor is in, and the metadata of the index."""
    found = _json(index)
    placed = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise ValueError(f"{index}: damaged index, no weight_map from tensors to files; copy it again")
    metadata = found.get("metadata", {})
    return placed, metadata if isinstance(metadata, dict) else {}


def _trainer_step(folder: Path) -> dict[str, Any]:
    """The step that a trainer wrote down beside the weights."""
    state = folder / "trainer_state.json"
    if not state.is_file():
        return {}
    found = _json(state)
    return {"global_step": found["global_step"]} if isinstance(found, dict) and "global_step" in found else {}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error}); copy it again") from None
