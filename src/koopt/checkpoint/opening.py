"""Any checkpoint by its path: which kind it is, and its tensors by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from koopt.checkpoint import folders, pickled, safe

if TYPE_CHECKING:
    import os

    from koopt.checkpoint.stored import Checkpoint


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read names, shapes and places of a checkpoint's tensors, not the tensors.

    Args:
        path: a `.safetensors` file, a folder with one or with shards and their index (or the index itself), or a `.pt`,
            `.pth`, `.ckpt` or `.bin` file as ``torch.save`` writes it.

    Raises:
        ValueError: if the file is damaged or would have to run code, naming it and what is wrong.
        OSError: if it cannot be read.
    """
    place = Path(path)
    if place.name.endswith(".safetensors.index.json"):
        place = place.parent
    if not place.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; check the name")
    if place.is_dir():
        return folders.open_folder(place)
    if not place.is_file():
        raise ValueError(f"{path}: not a regular file; give a checkpoint's file or folder")
    if place.suffix == ".safetensors":
        return safe.open_safetensors(place)
    if place.suffix in pickled.SUFFIXES:
        return pickled.open_pickled(place)
    raise ValueError(
        f"{path}: unknown kind {place.suffix!r}, expected .safetensors, {', '.join(pickled.SUFFIXES)}, or a folder"
    )
