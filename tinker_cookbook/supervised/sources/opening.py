"""Opening a data file for reading in any order; a compressed one is unpacked first."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tinker_cookbook.exceptions import DataFormatError
from tinker_cookbook.utils.nearest_name import nearest_name

__all__ = ["BOM", "OpenedFile", "no_room", "open_unpacked"]

BOM = b"\xef\xbb\xbf"

_FOREIGN = {
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8"),
}


def _zstd(file: BinaryIO) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(file, "zstd")


_PACKED: dict[bytes, tuple[str, Callable[[BinaryIO], Any]]] = {
    b"\x1f\x8b": ("gzip", lambda file: gzip.GzipFile(fileobj=file)),
    b"\x28\xb5\x2f\xfd": ("zstd", _zstd),
    b"BZh": ("bzip2", bz2.BZ2File),
    b"\xfd7zXZ": ("xz", lzma.LZMAFile),
}
"""Compressions by their first bytes, whatever the name of the file."""


@dataclass(frozen=True)
class OpenedFile:
    """A file that can be read at any position."""

    path: Path
    """The path as given, and as errors show it."""
    file: BinaryIO
    """The open file, unbuffered; an unnamed temporary file if it had to be unpacked."""
    compression: str | None
    head: bytes
    """Its first bytes, without the byte order mark."""


def open_unpacked(path: str | Path) -> OpenedFile:
    """Open a file, unpacked.

    Raises:
        DataFormatError: a file that cannot be opened, is damaged, or has an unknown type.
    """
    path = Path(path).expanduser()
    file = _open(path)
    try:
        compression = None
        head = _head(file)
        for magic, (name, unpack) in _PACKED.items():
            if head.startswith(magic):
                file, compression = _unpacked(file, path, name, unpack), name
                head = _head(file)
                break
        for magic, (what, remedy) in _FOREIGN.items():
            if head.startswith(magic):
                raise DataFormatError(f"{path}: the file is {what}; {remedy}.")
    except BaseException:
        file.close()
        raise
    return OpenedFile(path, file, compression, head.removeprefix(BOM))


def _head(file: BinaryIO) -> bytes:
    file.seek(0)
    head = file.read(4096)
    file.seek(0)
    return head


def _open(path: Path) -> BinaryIO:
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed by its reader)
    except FileNotFoundError:
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest_name(path.name, names)
        hint = f" Did you mean {path.parent / near}?" if near else ""
        folder = "" if path.parent.is_dir() else f" (nor the folder {path.parent})"
        raise DataFormatError(
            f"{path}: the file does not exist{folder}; give the path of a data file.{hint}"
        ) from None
    except IsADirectoryError:
        raise DataFormatError(f"{path} is a folder; give the path of a data file.") from None
    except OSError as error:
        raise DataFormatError(f"{path} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DataFormatError(
            f"{path} is not a regular file; rows are read in any order, so a pipe does not work. "
            "Write it to a file first."
        )
    return file  # pyright: ignore[reportReturnType]


def _unpacked(source: BinaryIO, path: Path, name: str, unpack: Callable[[Any], Any]) -> BinaryIO:
    """Unpack a compressed file into a temporary file, which is deleted with the process."""
    target = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    try:
        with source, unpack(source) as packed:
            while chunk := packed.read(2**20):
                _store(target, chunk, path)
    except DataFormatError:
        target.close()
        raise
    except EOFError:
        target.close()
        raise DataFormatError(
            f"{path}: the {name} file is cut off; copy or download it again."
        ) from None
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, OSError, ValueError) as error:
        target.close()
        raise DataFormatError(f"{path}: the {name} file is damaged ({error}).") from error
    return target  # pyright: ignore[reportReturnType]


def _store(target: Any, chunk: bytes, path: Path) -> None:
    try:
        rest = memoryview(chunk)
        while rest:
            rest = rest[target.write(rest) :]  # an unbuffered file may write only a part
    except OSError as error:
        raise no_room(path, error) from error


def no_room(path: Path, error: OSError) -> DataFormatError:
    """Return the error for a file that cannot be unpacked because the disk is full."""
    return DataFormatError(
        f"{path} cannot be unpacked into {tempfile.gettempdir()}: {error.strerror}; set TMPDIR to "
        "a folder with more room."
    )
