"""A JSONL file whose rows are read when they are needed.

Opening scans the bytes once (no JSON is parsed) and keeps the offset where each line starts: 8
bytes per line, 4 more if the file has blank lines. A compressed file is first unpacked into an
unnamed temporary file, because a compressed stream has no random access.

How bad rows are found: `check_rows` parses every row of a file up to `FULL_CHECK_BYTES` (well under
a second). In a larger file it parses evenly spread rows, and rows whose bytes show that they are
not complete objects. Other bad rows of a large file are refused by the batch that reads them, with
their line number; `tinker-cookbook check` reads all rows beforehand.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tinker_cookbook.supervised.conversations import SourceRow
from tinker_cookbook.supervised.sources.opening import BOM, OpenedFile, open_unpacked
from tinker_cookbook.supervised.sources.row_file import (
    FULL_CHECK_BYTES,
    MAX_ROW_BYTES,
    SPREAD_CHECK_ROWS,
    RowFile,
)

__all__ = ["FULL_CHECK_BYTES", "MAX_ROW_BYTES", "ConversationFile", "TextLines"]

_BLANKS = b" \t\r\n\v\f"
_BLANK_BYTES = np.frombuffer(_BLANKS, np.uint8)


class ConversationFile(RowFile):
    """Rows of a JSONL file by index, one per line; blank lines do not count."""

    container = "JSONL"

    def __init__(self, source: str | Path | OpenedFile, *, chunk_bytes: int = 2**20) -> None:
        opened = source if isinstance(source, OpenedFile) else open_unpacked(source)
        super().__init__(opened)
        scan = _Scan(self._file, chunk_bytes)
        self._line_starts = scan.line_starts
        self._row_lines = scan.row_lines
        self._odd_rows = scan.odd_rows(SPREAD_CHECK_ROWS)
        self.num_bytes = int(self._line_starts[-1])
        self.num_blank_lines = len(self._line_starts) - 1 - len(self)
        self.fingerprint = f"{self.num_bytes}-{scan.crc32:08x}"
        self._refuse_empty()

    def __len__(self) -> int:
        if self._row_lines is not None:
            return len(self._row_lines)
        return len(self._line_starts) - 1

    def place(self, index: int) -> int:
        return (int(self._row_lines[index]) if self._row_lines is not None else index) + 1

    def row_bytes(self, index: int) -> int:
        line = self.place(index) - 1
        return int(self._line_starts[line + 1] - self._line_starts[line])

    def _read(self, index: int) -> SourceRow:
        line = self.place(index) - 1
        start = int(self._line_starts[line])
        self._file.seek(start)
        text = self._file.read(int(self._line_starts[line + 1]) - start).strip(_BLANKS)
        return self._to_row(text, self.where(index))

    def _to_row(self, text: bytes, where: str) -> SourceRow:
        return SourceRow(where, text, str(self.path.parent))

    def _suspects(self, limit: int) -> np.ndarray:
        return self._odd_rows[:limit]

    def _refuse_oversized(self) -> None:
        if int(np.diff(self._line_starts).max()) > MAX_ROW_BYTES:
            super()._refuse_oversized()


class TextLines(ConversationFile):
    """Rows of plain text, one per line."""

    container = "text, a row a line"

    def _to_row(self, text: bytes, where: str) -> SourceRow:
        try:
            return SourceRow(where, {"text": text.decode("utf-8")})
        except UnicodeDecodeError as error:
            problem = (
                f"byte 0x{text[error.start]:02x} at position {error.start + 1} is not UTF-8; "
                "save the file as UTF-8"
            )
            return SourceRow(where, {}, problem=problem)

    def _suspects(self, limit: int) -> np.ndarray:
        return np.zeros(0, np.int64)


class _Scan:
    """Line starts of a text, its blank lines, and the lines that cannot be an object."""

    def __init__(self, file: BinaryIO, chunk_bytes: int) -> None:
        file.seek(0)
        self.position = len(BOM) if file.read(len(BOM)) == BOM else 0
        self.crc32 = 0
        self.last_byte = ord("\n")
        self._starts = [np.array([self.position], np.uint64)]
        self._blank_begins: list[np.ndarray] = []
        self._odd_bytes: list[np.ndarray] = []
        file.seek(self.position)
        while chunk := file.read(chunk_bytes):
            self._feed(chunk)
        ends = [] if self.last_byte == ord("\n") else [np.array([self.position], np.uint64)]
        self.line_starts = np.concatenate([*self._starts, *ends])
        """uint64 [lines + 1]; the last entry is the end of the text."""
        self.row_lines = self._find_rows(file)
        """uint32: 0-based lines that are rows; None if all are."""

    def _feed(self, chunk: bytes) -> None:
        data = np.frombuffer(chunk, np.uint8)
        self.crc32 = zlib.crc32(chunk, self.crc32)
        newlines = np.flatnonzero(data == ord("\n"))
        begins = newlines[newlines + 1 < len(data)] + 1
        if self.last_byte == ord("\n"):
            begins = np.concatenate([np.zeros(1, begins.dtype), begins])
        first_bytes = data[begins]
        blank = np.isin(first_bytes, _BLANK_BYTES)
        last_bytes = np.concatenate([[np.uint8(self.last_byte)], data])[newlines]
        self._starts.append((newlines + 1 + self.position).astype(np.uint64))
        self._blank_begins.append(begins[blank] + self.position)
        self._odd_bytes.append(begins[(first_bytes != ord("{")) & ~blank] + self.position)
        unclosed = (last_bytes != ord("}")) & ~np.isin(last_bytes, _BLANK_BYTES)
        self._odd_bytes.append(newlines[unclosed] + self.position)
        self.last_byte = chunk[-1]
        self.position += len(chunk)

    def _find_rows(self, file: BinaryIO) -> np.ndarray | None:
        is_row = np.ones(len(self.line_starts) - 1, bool)
        for line in self._lines_at(self._blank_begins):
            start, end = int(self.line_starts[line]), int(self.line_starts[line + 1])
            if end - start <= MAX_ROW_BYTES:
                file.seek(start)
                is_row[line] = bool(file.read(end - start).strip(_BLANKS))
        return None if is_row.all() else np.flatnonzero(is_row).astype(np.uint32)

    def _lines_at(self, positions: list[np.ndarray]) -> np.ndarray:
        joined = np.concatenate([*positions, np.zeros(0, np.int64)]).astype(np.uint64)
        return np.unique(np.searchsorted(self.line_starts, joined, side="right") - 1)

    def odd_rows(self, limit: int) -> np.ndarray:
        """Indices of the first rows that do not start with `{` or do not end with `}`."""
        lines = self._lines_at(self._odd_bytes)
        if self.row_lines is None:
            return lines[:limit]
        rows = np.searchsorted(self.row_lines, lines)
        rows = rows[rows < len(self.row_lines)]
        return rows[:limit]
