"""A CSV file: its first record names the columns, the others are rows."""

from __future__ import annotations

import csv
import io
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from tinker_cookbook.exceptions import DataFormatError
from tinker_cookbook.supervised.conversations import SourceRow
from tinker_cookbook.supervised.sources.opening import OpenedFile
from tinker_cookbook.supervised.sources.row_file import MAX_ROW_BYTES, ByteRows

__all__ = ["CsvFile"]

_DELIMITERS = ",\t;|"


class CsvFile(ByteRows):
    """Rows of a CSV (or TSV) file; a record may span several lines.

    The delimiter is the most frequent one of comma, tab, semicolon and bar in the header. Memory:
    20 bytes per row.
    """

    container = "CSV"

    def __init__(self, opened: OpenedFile) -> None:
        super().__init__(opened)
        csv.field_size_limit(MAX_ROW_BYTES)  # a limit of the whole process; the default is 128 KiB
        header = opened.head.partition(b"\n")[0].decode("utf-8", errors="replace")
        self._delimiter = max(_DELIMITERS, key=header.count)
        scan = _RecordScan(self)
        self.columns = scan.columns
        self.num_bytes = scan.position
        self.num_blank_lines = scan.num_blank_lines
        self.fingerprint = f"{self.num_bytes}-{scan.crc32:08x}"
        self._set_ranges(scan.starts, scan.ends, scan.lines)

    def _to_row(self, text: bytes, index: int) -> SourceRow:
        lines = io.StringIO(text.decode("utf-8"), newline="")
        fields = next(csv.reader(lines, delimiter=self._delimiter, strict=True))
        if len(fields) != len(self.columns):
            problem = (
                f"the row has {len(fields)} fields, but the header names {len(self.columns)} "
                f"({', '.join(self.columns)}); put fields that hold {self._delimiter!r}, quotes or "
                "line ends between double quotes"
            )
            return SourceRow(self.where(index), {}, problem=problem)
        value = dict(zip(self.columns, fields, strict=True))
        return SourceRow(self.where(index), value, str(self.path.parent))


class _RecordScan:
    """Starts and ends of a file's records, found by the reader that will read them again."""

    def __init__(self, file: CsvFile) -> None:
        self.starts, self.ends, self.lines = array("Q"), array("Q"), array("I")
        self.position = self.crc32 = self.num_lines = self.num_blank_lines = 0
        self._file = file
        records = csv.reader(self._text_lines(file._file), delimiter=file._delimiter, strict=True)
        try:
            self.columns = self._checked_columns(next(records, []))
            self._scan(records)
        except csv.Error as error:
            line = (self.lines[-1] if self.lines else 0) + 1
            raise DataFormatError(
                f"{file.path}:{self.num_lines}: not CSV: {error}, in a record that begins after "
                f"line {line - 1}; write quotes inside a field twice, and close every quoted field."
            ) from error

    def _scan(self, records: Iterator[list[str]]) -> None:
        start, line = self.position, self.num_lines
        for record in records:
            if record:
                self.starts.append(start)
                self.ends.append(self.position)
                self.lines.append(line + 1)
            else:
                self.num_blank_lines += 1
            start, line = self.position, self.num_lines

    def _text_lines(self, file: BinaryIO) -> Iterator[str]:
        file.seek(0)
        rest = b""
        while chunk := file.read(2**20):
            self.crc32 = zlib.crc32(chunk, self.crc32)
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield self._counted(line + b"\n")
        if rest:
            yield self._counted(rest)

    def _counted(self, line: bytes) -> str:
        self.position += len(line)
        self.num_lines += 1
        return self._decoded(line)

    def _decoded(self, line: bytes) -> str:
        try:
            return line.decode("utf-8-sig" if self.num_lines == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataFormatError(
                f"{self._file.path}:{self.num_lines}: byte 0x{line[error.start]:02x} at position "
                f"{error.start + 1} is not UTF-8; save the file as UTF-8."
            ) from error

    def _checked_columns(self, record: list[str]) -> tuple[str, ...]:
        columns = tuple(name.strip() for name in record)
        twice = [name for name, count in Counter(columns).items() if count > 1]
        if twice:
            raise DataFormatError(
                f"{self._file.path}:1: column {twice[0]!r} is given twice in the header; "
                "name every column once."
            )
        return columns
