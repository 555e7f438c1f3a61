"""A forecast on disk: the last checkpoint's files with the forecast tensors in place, under a temporary name first."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from koopt.checkpoint import folders, pickled, safe
from koopt.checkpoint.steps import KEYS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import BinaryIO

    from koopt.checkpoint.stored import Checkpoint, Entry

PIECE = 8 * 2**20  # bytes that are copied at a time


class Target(NamedTuple):
    """One file that is being written.

    Attributes:
        source: the file of the last checkpoint that it takes after.
        path: where it is written.
        shift: how much later its data begin than those of the source.
        file: open for writing.
        lock: held while a place is looked up and written.
    """

    source: Path
    path: Path
    shift: int
    file: BinaryIO
    lock: threading.Lock


def require_output(output: Path, checkpoints: Sequence[Checkpoint], overwrite: bool = False) -> None:
    """Refuse, before any work, an output that is an input, of another kind than the last checkpoint, or in the way."""
    last = checkpoints[-1]
    try:
        os.stat(output)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{output}: a symbolic link to itself; choose another name") from None
    place = output.resolve()
    for checkpoint in checkpoints:
        taken = [checkpoint.path.resolve(), *(file.resolve() for file in checkpoint.files)]
        if place in taken or any(output.exists() and output.samefile(path) for path in taken):
            raise ValueError(f"{output}: this output is an input; choose another name, inputs are never changed")
        if last.kind == "folder" and any(place in path.parents for path in taken):
            raise ValueError(f"{output}: this output holds the input {checkpoint.path}; choose another folder")
        if checkpoint.kind == "folder" and checkpoint.path.resolve() in place.parents:
            raise ValueError(f"{output}: this output lies in the input {checkpoint.path}; choose another place")
    if last.kind != "folder" and output.is_dir():
        raise IsADirectoryError(f"{output}: a folder, but {last.path} is a file; name a file")
    if last.kind == "folder" and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output}: exists already; choose a new folder")
    wanted = pickled.SUFFIXES if last.kind == "pt" else (".safetensors",)
    if last.kind != "folder" and output.suffix not in wanted:
        raise ValueError(f"{output}: the forecast is written like {last.path}; end its name with {' or '.join(wanted)}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output.parent}: no such folder to write {output.name} to; make it first")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{output.parent}: cannot be written; choose another folder")
    if last.kind != "folder" and os.path.lexists(output) and not overwrite:
        raise FileExistsError(
            f"{output}: exists already; choose another name, or take --force (overwrite=True) to replace it"
        )
    needed = sum(file.stat().st_size for file in last.files)
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise OSError(
            f"{output}: needs {needed / 2**20:,.0f} MiB on disk, {free / 2**20:,.0f} MiB are free; choose another disk"
        )


@contextlib.contextmanager
def targets(last: Checkpoint, output: Path, step: float) -> Iterator[dict[Path, Target]]:
    """The files to be written, by the file each takes after; they appear under their names when all has gone well.

    Args:
        last: the checkpoint that they take after.
        output: file or folder.
        step: that the forecast is for, which replaces the one in metadata.
    """
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    made: dict[Path, Target] = {}
    try:
        if last.kind == "folder":
            temporary.mkdir()
            for path in folders.beside(last.path, last.files):
                shutil.copyfile(path, temporary / path.name)
        with contextlib.ExitStack() as stack:
            for source in last.files:
                path = temporary / source.name if last.kind == "folder" else temporary
                file = stack.enter_context(path.open("w+b", buffering=0))
                made[source] = _begin(last, source, path, file, step)
            yield made
            if last.kind == "pt":
                for target in made.values():
                    renew_checksums(target)
        _replace(temporary, output)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def _begin(last: Checkpoint, source: Path, path: Path, file: BinaryIO, step: float) -> Target:
    """A file with all its space taken, and its header."""
    size, shift = source.stat().st_size, 0
    head = b""
    if last.kind != "pt":
        header, data = safe.read_header(source)
        metadata = dict(header.get("__metadata__", {}))
        for key in KEYS:
            if key in metadata:
                metadata[key] = f"{step:.12g}"
        metadata["koopt_step"] = f"{step:.12g}"
        head = safe.header_bytes(source, metadata)
        shift = len(head) - data
    if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not half way
        try:
            os.posix_fallocate(file.fileno(), 0, size + shift)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
    else:
        file.truncate(size + shift)
    write_fully(file, memoryview(head))
    return Target(source, path, shift, file, threading.Lock())


def write(target: Target, entry: Entry, start: int, data: memoryview) -> None:
    """Put numbers of a tensor, from number `start` on, in their place."""
    with target.lock:
        target.file.seek(entry.offset + target.shift + start * entry.dtype.itemsize)
        write_fully(target.file, data)


def write_fully(file: BinaryIO, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += file.write(data[done:])


def copy_rest(target: Target, written: Iterable[tuple[int, int]], data: int, tell: Callable[[int], None]) -> None:
    """Copy what was not written from the source.

    Args:
        target: where to.
        written: bytes of the source `(begin, end)` that the forecast replaces.
        data: where the source's data begin; what is before it is the header, which is written already.
        tell: called with the bytes copied since the last time.
    """
    place = data
    size = target.source.stat().st_size
    with target.source.open("rb", buffering=0) as source:
        for begin, end in [*sorted(written), (size, size)]:
            while place < begin:
                source.seek(place)
                piece = source.read(min(PIECE, begin - place))
                if not piece:
                    raise ValueError(f"{target.source}: truncated while it was read; copy it again")
                target.file.seek(place + target.shift)
                write_fully(target.file, memoryview(piece))
                place += len(piece)
                tell(len(piece))
            place = max(place, end)


def data_start(last: Checkpoint, source: Path) -> int:
    """Where the data of a file begin; a `.pt` file has no header of its own."""
    return 0 if last.kind == "pt" else safe.read_header(source)[1]


def renew_checksums(target: Target) -> None:
    """Put the checksums of a zip archive's records right, in its directory and beside the records."""
    import zipfile

    file = target.file
    with zipfile.ZipFile(target.path) as archive:
        records = archive.infolist()
        directory = archive.start_dir
    for info in records:
        begin = pickled.data_offset(file, info.header_offset)
        found, left = 0, info.file_size
        file.seek(begin)
        while left:
            piece = file.read(min(PIECE, left))
            found = zlib.crc32(piece, found)
            left -= len(piece)
        raw = found.to_bytes(4, "little")
        after = begin + info.file_size
        if info.flag_bits & 8:  # the checksum follows the record
            file.seek(after)
            after += 4 * (file.read(4) == b"PK\x07\x08")
        else:
            after = info.header_offset + 14
        file.seek(after)
        write_fully(file, memoryview(raw))
        file.seek(directory + 16)
        write_fully(file, memoryview(raw))
        file.seek(directory + 28)
        lengths = [int.from_bytes(file.read(2), "little") for _ in range(3)]
        directory += 46 + sum(lengths)


def _replace(temporary: Path, output: Path) -> None:
    """Give the finished file or folder its name."""
    os.replace(temporary, output)
