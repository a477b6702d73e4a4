"""Files that survive a crash: after it there is the old content or the new, never a part of it."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from tinker_cookbook.utils.disk_errors import naming_file

__all__ = ["flush_folder", "move_durably", "write_atomically", "write_durably"]


def write_atomically(path: Path, content: bytes | str, *, mode: int = 0o666) -> None:
    """Replace a file in one step, so that a reader or a crash never sees half of it.

    The content is written to a hidden file in the same folder, flushed to disk and renamed. If that
    fails, the hidden file is removed and the old file is unchanged.

    Args:
        path: file to replace or create.
        content: new content; text is written as UTF-8.
        mode: permissions of the new file, less those that the umask takes away.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with naming_file(path):
            _write(aside, content, mode)
        aside.replace(path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
    flush_folder(path.parent)


def write_durably(path: Path, content: bytes | str) -> None:
    """Write a file and flush it to disk, where no reader looks yet, such as in a staging folder."""
    with naming_file(path):
        _write(path, content)


def move_durably(source: Path, target: Path) -> None:
    """Flush a finished file, or a folder of files, to disk and rename it to `target`.

    Both must be on the same file system. An existing file is replaced; an existing folder must be
    empty.
    """
    if source.is_dir():
        for path in source.iterdir():
            _flush(path)
    _flush(source)
    source.replace(target)
    flush_folder(target.parent)


def flush_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk, so that a new or renamed file survives a crash."""
    _flush(folder)


def _write(path: Path, content: bytes | str, mode: int = 0o666) -> None:
    data = content.encode("utf-8") if isinstance(content, str) else content
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming_file(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
