"""The interface of every source of rows, and the base class of containers that are one file."""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol, TypeAlias

import numpy as np

from tinker_cookbook.exceptions import DataFormatError, DataValidationError
from tinker_cookbook.supervised.conversations import (
    Conversation,
    MarkupMode,
    SourceRow,
    parse_row,
)
from tinker_cookbook.supervised.shapes import SHAPES
from tinker_cookbook.supervised.sources.opening import OpenedFile

__all__ = [
    "FULL_CHECK_BYTES",
    "MAX_ROW_BYTES",
    "SPREAD_CHECK_ROWS",
    "ByteRows",
    "DataSource",
    "ReadCounts",
    "RowFile",
]

MAX_ROW_BYTES = 64 * 2**20
"""Maximum size of a row. Tokenizing a longer one would take minutes and gigabytes, only to cut
it."""
FULL_CHECK_BYTES = 16 * 2**20
SPREAD_CHECK_ROWS = 1000

_ROWS_PER_READ = 64
_BLANKS = b" \t\r\n\v\f"
_TITLES = {shape.name: shape.title for shape in SHAPES}


class Readable(Protocol):
    """A row that was read, with its description."""

    @property
    def shape(self) -> str | None: ...

    @property
    def notes(self) -> Counter[str]: ...

    @property
    def unused(self) -> tuple[str, ...]: ...


@dataclass
class ReadCounts:
    """Counts of how rows were read: their shapes, conversions, and unused keys."""

    num_rows: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    note_rows: Counter[str] = field(default_factory=Counter)
    """Number of rows by conversion."""
    notes: Counter[str] = field(default_factory=Counter)
    """Number of conversions by kind."""
    unused: Counter[str] = field(default_factory=Counter)
    """Number of rows by unused key."""

    def add(self, row: Readable) -> None:
        """Count one row."""
        self.num_rows += 1
        self.shapes[row.shape or ""] += 1
        self.note_rows.update(row.notes.keys())
        self.notes.update(row.notes)
        self.unused.update(row.unused)

    def __iadd__(self, other: ReadCounts) -> ReadCounts:
        self.num_rows += other.num_rows
        for name in ("shapes", "note_rows", "notes", "unused"):
            getattr(self, name).update(getattr(other, name))
        return self

    def lines(self, name: str, num_rows: int) -> list[str]:
        """Return the lines that describe the data before a run.

        Args:
            name: name and size of the data.
            num_rows: number of rows of the data; those counted here may be a part of them.
        """
        seen = "" if self.num_rows == num_rows else f" (of {self.num_rows:,} rows read so far)"
        return [f"{name}, read as {'; '.join(self.shape_lines())}{seen}", *self.note_lines()]

    def shape_lines(self) -> list[str]:
        """Return the titles of the shapes, with their numbers of rows if there are several."""
        if len(self.shapes) == 1:
            return [_TITLES[next(iter(self.shapes))]]
        return [f"{_TITLES[name]}: {count:,} rows" for name, count in self.shapes.most_common()]

    def note_lines(self) -> list[str]:
        """Return a line for each kind of conversion."""
        lines = []
        for note, rows in self.note_rows.most_common():
            times = self.notes[note]
            often = f"{times:,} times in " if times != rows else ""
            lines.append(f"{often}{rows:,} row{'s' * (rows != 1)}: {note}")
        return lines

    def unused_text(self) -> str:
        """Return the unused keys, the most frequent ones first."""
        names = {key: key if key.strip() else repr(key) for key in self.unused}
        listed = [
            names[key]
            if rows == self.num_rows
            else f"{names[key]} ({rows:,} row{'s' * (rows != 1)})"
            for key, rows in self.unused.most_common(12)
        ]
        return ", ".join([*listed, "..."] if len(self.unused) > 12 else listed)


RowCheck: TypeAlias = Callable[[str, Conversation], None]


def accept_row(where: str, conversation: Conversation) -> None:
    """Refuse no row."""


class DataSource(Protocol):
    """Rows by index, from one file or several."""

    @property
    def name(self) -> str: ...

    @property
    def container(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def num_blank_lines(self) -> int: ...

    @property
    def fingerprint(self) -> str | None: ...

    def __len__(self) -> int: ...

    def place(self, index: int) -> int | str: ...

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[SourceRow]: ...

    def oversize(self, index: int) -> str | None: ...

    def check_rows(
        self,
        markup: MarkupMode = "convert",
        *,
        full_check_bytes: int = FULL_CHECK_BYTES,
        spread_rows: int = SPREAD_CHECK_ROWS,
        refuse: RowCheck = accept_row,
    ) -> ReadCounts: ...

    def close(self) -> None: ...


class RowFile:
    """Rows of one file by index. Thread-safe.

    The file must not change while it is open; a change is noticed and refused.
    """

    container = ""
    """Name of this kind of file in reports."""
    row_word = "line"
    """Unit that `place` counts: lines of a text, rows of a table."""

    def __init__(self, opened: OpenedFile) -> None:
        self.path: Path = opened.path
        self.fingerprint: str | None = None
        """Digest that changes with the content, not with compression or name."""
        self.num_bytes = 0
        """Size of the unpacked content in bytes."""
        self.num_blank_lines = 0
        self._file: BinaryIO = opened.file
        self._lock = threading.Lock()
        self._stat = _identity(self._file)
        self._close = weakref.finalize(self, self._file.close)
        if opened.compression is not None:
            self.container = f"{self.container}, {opened.compression}"

    @property
    def name(self) -> str:
        return str(self.path)

    def __len__(self) -> int:
        raise NotImplementedError

    def place(self, index: int) -> int:
        """Return the 1-based line (of a table: row) of row `index`."""
        raise NotImplementedError

    def line_number(self, index: int) -> int:
        """Return the 1-based line of row `index`, for files of lines."""
        return self.place(index)

    def row_bytes(self, index: int) -> int:
        """Return the size of row `index` in bytes."""
        raise NotImplementedError

    def _read(self, index: int) -> SourceRow:
        raise NotImplementedError

    def _suspects(self, limit: int) -> np.ndarray:
        """Return rows whose bytes look wrong, to be checked whatever the size of the file."""
        return np.zeros(0, np.int64)

    def where(self, index: int) -> str:
        return f"{self.path}:{self.place(index)}"

    def rows(self, indices: Sequence[int] | np.ndarray) -> list[SourceRow]:
        """Read rows without parsing them.

        Raises:
            DataValidationError: a row over `MAX_ROW_BYTES`, or a file that changed since.
        """
        with self._lock:
            if _identity(self._file) != self._stat:
                raise DataValidationError(
                    f"{self.path}: the file changed while it was in use; leave it as it is until "
                    "the run ends, then start again."
                )
            return [self._read_checked(int(index)) for index in indices]

    def _read_checked(self, index: int) -> SourceRow:
        if problem := self.oversize(index):
            raise DataValidationError(problem)
        return self._read(index)

    def oversize(self, index: int) -> str | None:
        """Return why row `index` is too long to be read; None if it is not."""
        size = self.row_bytes(index)
        if size <= MAX_ROW_BYTES:
            return None
        return (
            f"{self.where(index)}: the {self.row_word} has {size / 1e6:.0f} MB; at most "
            f"{MAX_ROW_BYTES / 1e6:.0f} MB are read. Split the conversation, and keep large images "
            "in separate files."
        )

    def check_rows(
        self,
        markup: MarkupMode = "convert",
        *,
        full_check_bytes: int = FULL_CHECK_BYTES,
        spread_rows: int = SPREAD_CHECK_ROWS,
        refuse: RowCheck = accept_row,
    ) -> ReadCounts:
        """Parse every row of a file up to this size, or evenly spread rows of a larger file.

        Args:
            markup: as of `parse_row`.
            full_check_bytes: size up to which every row is checked.
            spread_rows: number of checked rows of a larger file.
            refuse: raises a DataError for a row, given its place and its content, that can be read
                but not used.

        Raises:
            DataError: for the first unusable row, with its file and line.
        """
        self._refuse_oversized()
        everything = self.num_bytes <= full_check_bytes
        count = len(self) if everything else min(len(self), spread_rows)
        spread = np.linspace(0, len(self) - 1, count).astype(np.int64)
        picked = np.union1d(spread, self._suspects(spread_rows)).astype(np.int64)
        counts = ReadCounts()
        for start in range(0, len(picked), _ROWS_PER_READ):
            for row in self.rows(picked[start : start + _ROWS_PER_READ]):
                conversation = parse_row(row, markup)
                refuse(row.where, conversation)
                counts.add(conversation)
        return counts

    def _refuse_oversized(self) -> None:
        for index in range(len(self)):
            if problem := self.oversize(index):
                raise DataValidationError(problem)

    def _refuse_empty(self) -> None:
        if len(self) == 0:
            raise DataFormatError(f"{self.path}: the file has no rows; give at least one.")

    def close(self) -> None:
        """Close the file; dropping the last reference also closes it."""
        self._close()


class ByteRows(RowFile):
    """Rows that are ranges of bytes: 16 bytes of memory per row, and 4 for its line."""

    def _set_ranges(self, starts: Sequence[int], ends: Sequence[int], lines: Sequence[int]) -> None:
        self._starts = np.asarray(starts, np.uint64)
        self._ends = np.asarray(ends, np.uint64)
        self._lines = np.asarray(lines, np.uint32)
        self._refuse_empty()

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, index: int) -> int:
        return int(self._lines[index])

    def row_bytes(self, index: int) -> int:
        return int(self._ends[index] - self._starts[index])

    def _refuse_oversized(self) -> None:
        if int((self._ends - self._starts).max()) > MAX_ROW_BYTES:
            super()._refuse_oversized()

    def _read(self, index: int) -> SourceRow:
        start, end = int(self._starts[index]), int(self._ends[index])
        self._file.seek(start)
        return self._to_row(self._file.read(end - start).strip(_BLANKS), index)

    def _to_row(self, text: bytes, index: int) -> SourceRow:
        return SourceRow(self.where(index), text, str(self.path.parent))


def _identity(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns
