"""Data sets: looked for in ``KOOPT_DATA``, else downloaded once, checked by their unpacked bytes."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Int, UInt8
    from torch import Tensor

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
FILES = {  # name -> md5 of the unpacked bytes, since archives of the same data differ
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_MD5 = "6fb458f1232090904fb40fe944165e91"


@dataclass(frozen=True)
class Mnist:
    """Handwritten digits: images `(count, 784)` uint8, labels `(count,)` int64."""

    train_images: UInt8[Tensor, "train 784"]
    train_labels: Int[Tensor, " train"]
    test_images: UInt8[Tensor, "test 784"]
    test_labels: Int[Tensor, " test"]


def mnist(progress: Callable[[str, int, int], None] | None = None) -> Mnist:
    """The full MNIST, from ``KOOPT_DATA/mnist`` or a cache that is filled from a public mirror.

    Args:
        progress: called with a stage, the bytes loaded and their total, while something is downloaded.

    Raises:
        ValueError: if a file of ``KOOPT_DATA`` is damaged or of other data.
        OSError: if there is neither the folder nor a mirror that answers.
    """
    files = [
        _File("MNIST", "mnist", name, md5, tuple(f"{mirror}{name}.gz" for mirror in MIRRORS))
        for name, md5 in FILES.items()
    ]
    arrays = [parsed(_content(file, progress)) for file in files]
    train_images, train_labels, test_images, test_labels = (torch.from_numpy(array) for array in arrays)
    return Mnist(train_images.flatten(1), train_labels.long(), test_images.flatten(1), test_labels.long())


def shakespeare(progress: Callable[[str, int, int], None] | None = None) -> str:
    """A million characters of Shakespeare's plays, from ``KOOPT_DATA/tinyshakespeare`` or a cache, as :func:`mnist`.

    Args:
        progress: called with a stage, the bytes loaded and their total, while something is downloaded.

    Raises:
        ValueError: if the file of ``KOOPT_DATA`` is damaged or another text.
        OSError: if there is neither the folder nor an answer from the network.

    Source: Karpathy (2015), char-rnn.
    """
    file = _File("Tiny Shakespeare", "tinyshakespeare", "input.txt", SHAKESPEARE_MD5, (SHAKESPEARE,))
    return _content(file, progress).decode()


def parsed(content: bytes) -> np.ndarray:
    """The uint8 array of a file in IDX form.

    Raises:
        ValueError: if the header does not fit the content.

    >>> parsed(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
    array([7, 9], dtype=uint8)
    """
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError("content is not IDX of unsigned bytes; expected it to begin with 0, 0, 8")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], ">i4").tolist()
    if len(content) != start + int(np.prod(shape)):
        raise ValueError(f"content has {len(content) - start} bytes of data, its header says {shape}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


@dataclass(frozen=True)
class _File:
    """One file of the data set `of`: where under ``KOOPT_DATA``, MD5 of the unpacked bytes, public addresses."""

    of: str
    folder: str
    name: str
    md5: str
    addresses: tuple[str, ...]


def _content(file: _File, progress: Callable[[str, int, int], None] | None) -> bytes:
    folder = os.environ.get("KOOPT_DATA")
    return _from_folder(Path(folder) / file.folder, file) if folder else _from_cache(file, progress)


def _from_folder(folder: Path, file: _File) -> bytes:
    for path in (folder / f"{file.name}.gz", folder / file.name):
        if path.is_file():
            return _checked(path.read_bytes(), file, path)
    raise FileNotFoundError(
        f"KOOPT_DATA: {folder} has no {file.name} or {file.name}.gz; put the files of {file.of} there, "
        "or unset KOOPT_DATA to download them"
    )


def _from_cache(file: _File, progress: Callable[[str, int, int], None] | None) -> bytes:
    import pooch

    path = Path(pooch.os_cache("koopt")) / file.folder / Path(file.addresses[0]).name
    if path.is_file():
        try:
            return _checked(path.read_bytes(), file, path)
        except ValueError:  # an interrupted download, or an older file
            path.unlink()
    pooch.get_logger().setLevel("ERROR")  # its advice on hashes is for packed files
    failures = []
    for address in file.addresses:
        found = _downloaded(address, path, _Bar(file.of, progress))
        if isinstance(found, Path):
            return _checked(found.read_bytes(), file, found)
        failures.append(f"{address} ({type(found).__name__})")
    raise OSError(
        f"{file.of} could not be downloaded from {' or '.join(failures)}; connect to the network, or put its files "
        f"({file.name}, ...) in a folder {file.folder}/ and name the folder above it in KOOPT_DATA"
    )


def _downloaded(address: str, path: Path, bar: _Bar) -> Path | Exception:
    import pooch

    # both take what their documentation says, which is more than their annotations allow
    downloader = pooch.HTTPDownloader(progressbar=bar, timeout=30)  # pyright: ignore[reportArgumentType]
    try:
        return Path(pooch.retrieve(address, None, fname=path.name, path=path.parent, downloader=downloader))  # pyright: ignore[reportArgumentType]
    except Exception as error:  # of the network, in the words of several libraries; the next mirror may do
        path.unlink(missing_ok=True)
        return error


def _checked(content: bytes, file: _File, path: Path) -> bytes:
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged; delete it or fetch it again") from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != file.md5:
        raise ValueError(f"{path} is damaged or not the {file.name} of {file.of}; delete it or fetch it again")
    return content


class _Bar:
    """What pooch expects of a progress bar."""

    def __init__(self, of: str, progress: Callable[[str, int, int], None] | None) -> None:
        self.of = of
        self.progress = progress
        self.total = 0
        self.done = 0

    def update(self, count: int) -> None:
        self.done += count
        if self.progress:
            self.progress(f"download {self.of}", self.done, max(self.done, self.total))

    def reset(self) -> None:
        self.done = 0

    def close(self) -> None:
        pass
