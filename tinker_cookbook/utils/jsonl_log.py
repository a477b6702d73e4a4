"""Append-only JSONL files that survive a crash at any moment.

A row is one `write` of one line, flushed to disk. A process killed inside that write leaves a torn
last line, which readers skip and the next writer cuts off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from tinker_cookbook.exceptions import DataFormatError
from tinker_cookbook.utils.disk_errors import naming_file
from tinker_cookbook.utils.durable_files import write_atomically

__all__ = ["Row", "append_row", "change_rows", "keep_rows", "read_rows"]

Row = dict[str, Any]
"""A JSON object."""


def append_row(path: Path, row: Row) -> None:
    """Append one JSON object as a line and flush it to disk."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
    with naming_file(path), path.open("ab+") as file:
        size = file.tell()
        if size and not _ends_with_newline(file, size):
            file.truncate(_end_of_last_line(path))
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """Read every complete row; an empty list if the file does not exist.

    Raises:
        DataFormatError: if a line other than a torn last one is not a JSON object.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataFormatError(
                f"{path}:{number}: not JSON ({error}); every line is one JSON object."
            ) from error
        if not isinstance(row, dict):
            raise DataFormatError(f"{path}:{number}: not an object; every line is one JSON object.")
        rows.append(row)
    return rows


def keep_rows(path: Path, keep: Callable[[Row], bool], *, backup: Path | None = None) -> int:
    """Rewrite a file with only the rows that `keep` accepts, in one atomic step.

    Args:
        path: The file; nothing happens if it does not exist.
        keep: Returns whether a row is kept.
        backup: Where the old file is copied to if any row is dropped.

    Returns:
        The number of dropped rows.
    """
    rows = read_rows(path)
    kept = [row for row in rows if keep(row)]
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    if len(kept) == len(rows) and not torn:
        return 0
    if backup is not None and len(kept) < len(rows):
        write_atomically(backup, path.read_bytes())
    write_atomically(path, _encode(kept))
    return len(rows) - len(kept)


def change_rows(path: Path, change: Callable[[Row], Row]) -> None:
    """Rewrite every row of a file that exists, in one atomic step."""
    write_atomically(path, _encode(change(row) for row in read_rows(path)))


def _encode(rows: Iterable[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")


def _ends_with_newline(file: BinaryIO, size: int) -> bool:
    file.seek(size - 1)
    return file.read(1) == b"\n"


def _end_of_last_line(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1
