"""A JSON file whose rows are the objects of one array, or objects written over several lines.

The bytes are scanned once to find where objects begin and end. Brackets and quotes are found with
NumPy, and no JSON is parsed, so an array of any size is read row by row, like lines.
"""

from __future__ import annotations

import zlib
from array import array
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from tinker_cookbook.exceptions import DataFormatError
from tinker_cookbook.supervised.row_fields import shown
from tinker_cookbook.supervised.sources.opening import BOM, OpenedFile
from tinker_cookbook.supervised.sources.row_file import ByteRows

__all__ = ["JsonValues"]

_QUOTE, _BACKSLASH, _NEWLINE = b'"\\\n'
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1
"""Change of the nesting depth by a byte outside of strings."""
_MAX_GAP_BYTES = 2**16


class JsonValues(ByteRows):
    """Rows of a JSON array, or of consecutive objects (as `jq .` writes them)."""

    def __init__(self, opened: OpenedFile, *, chunk_bytes: int = 2**20) -> None:
        is_array = opened.head.lstrip().startswith(b"[")
        self.container = "JSON array" if is_array else "JSON objects"
        super().__init__(opened)
        scan = _ObjectScan(self._file, self.path, is_array=is_array, chunk_bytes=chunk_bytes)
        self.num_bytes = scan.position
        self.fingerprint = f"{self.num_bytes}-{scan.crc32:08x}"
        self._set_ranges(scan.starts, scan.ends, scan.lines)


class _ObjectScan:
    """Starts and ends of the objects of a text, with their lines."""

    def __init__(self, file: BinaryIO, path: Path, *, is_array: bool, chunk_bytes: int) -> None:
        self.starts, self.ends, self.lines = array("Q"), array("Q"), array("I")
        self.crc32 = 0
        self._path = path
        self._is_array = is_array
        self._base = int(is_array)
        self._depth = 0
        self._in_string = False
        self._num_backslashes = 0
        self._line = 1
        self._inside = False
        self._gap = b""
        file.seek(0)
        self.position = len(BOM) if file.read(len(BOM)) == BOM else 0
        file.seek(self.position)
        while chunk := file.read(chunk_bytes):
            self._feed(chunk)
        self._finish()

    def _feed(self, chunk: bytes) -> None:
        data = np.frombuffer(chunk, np.uint8)
        self.crc32 = zlib.crc32(chunk, self.crc32)
        newlines = np.flatnonzero(data == _NEWLINE)
        cursor = 0
        borders = self._borders(data)
        lines = np.searchsorted(newlines, borders) + self._line
        for place, line in zip(borders.tolist(), lines.tolist(), strict=True):
            if self._inside:
                self.ends.append(self.position + place + 1)
                cursor = place + 1
            else:
                self._close_gap(chunk[cursor:place], line)
                self.starts.append(self.position + place)
                self.lines.append(line)
            self._inside = not self._inside
        if not self._inside:
            self._gap += chunk[cursor:]
            if len(self._gap.strip()) > _MAX_GAP_BYTES:
                self._fail_gap(self._line)
        self._line += len(newlines)
        self.position += len(chunk)

    def _borders(self, data: np.ndarray) -> np.ndarray:
        """Return the positions where an object of the outermost level starts or ends,
        alternating."""
        quotes = self._real_quotes(data)
        brackets = np.flatnonzero(_STEPS[data])
        before = np.searchsorted(quotes, brackets) + int(self._in_string)
        brackets = brackets[before % 2 == 0]
        self._in_string = bool((len(quotes) + int(self._in_string)) % 2)
        if not len(brackets):
            return brackets
        step = _STEPS[data[brackets]]
        depth = self._depth + np.cumsum(step, dtype=np.int64)
        self._depth = int(depth[-1])
        starts = (step == 1) & (depth == self._base + 1)
        ends = (step == -1) & (depth == self._base)
        return brackets[starts | ends]

    def _real_quotes(self, data: np.ndarray) -> np.ndarray:
        """Return the quotes that are not escaped; a pair of backslashes is one character."""
        quotes = np.flatnonzero(data == _QUOTE)
        slashes = np.flatnonzero(data == _BACKSLASH)
        numbers = np.arange(len(slashes))
        first = np.r_[True, np.diff(slashes) != 1] if len(slashes) else np.zeros(0, bool)
        run_starts = np.maximum.accumulate(np.where(first, numbers, 0))
        run_lengths = numbers - run_starts + 1
        if len(slashes) and slashes[0] == 0:
            run_lengths[run_starts == 0] += self._num_backslashes
        last = np.searchsorted(slashes, quotes) - 1
        touching = (last >= 0) & (slashes[last] == quotes - 1) if len(slashes) else last >= 0
        counts = np.where(touching, run_lengths[last] if len(slashes) else 0, 0)
        if len(quotes) and quotes[0] == 0:
            counts[0] = self._num_backslashes
        ends_with_slash = len(slashes) and slashes[-1] == len(data) - 1
        self._num_backslashes = int(run_lengths[-1]) if ends_with_slash else 0
        return quotes[counts % 2 == 0]

    def _close_gap(self, piece: bytes, line: int) -> None:
        """Check the text between two objects: a comma in an array, else nothing."""
        self._gap += piece
        between = b"," if self.starts else b"["
        if self._gap.strip() != (between if self._is_array else b""):
            self._fail_gap(line)
        self._gap = b""

    def _fail_gap(self, line: int) -> NoReturn:
        found = shown(self._gap.strip().decode("utf-8", errors="replace"))
        if not self._is_array:
            accepted = "write one object after the other, or a JSON array of objects"
        elif not self._gap.strip():
            accepted = "write a comma between two objects"
        else:
            accepted = "an array holds objects with a comma between them, and nothing else"
        raise DataFormatError(f"{self._path}:{line}: {found} is before an object; {accepted}.")

    def _finish(self) -> None:
        if self._inside or self._in_string:
            line = self.lines[-1] if self.lines else 1
            raise DataFormatError(
                f"{self._path}:{line}: the object that begins in this line has no end; copy the "
                "file again, or close its brackets and quotes."
            )
        end = self._gap.strip()
        wanted = (b"]" if self.starts else b"[]") if self._is_array else b""
        if b"".join(end.split()) != wanted:
            found = shown(end.decode("utf-8", errors="replace"))
            ending = "a closing ]" if self._is_array else "an object"
            if self._is_array and end.startswith(b","):
                ending += "without a comma before it"
            raise DataFormatError(
                f"{self._path}:{self._line}: the file ends with {found}; it must end with {ending}."
            )
