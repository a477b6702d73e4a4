"""Tables: Parquet and Arrow files, through pyarrow.

A Parquet file is decoded once, a few rows at a time, into an unnamed temporary Arrow file, from
which any row can be read directly: row groups are far too large to be decoded for every row of a
shuffled batch. One such portion is in memory; the unpacked table is on disk.
"""

from __future__ import annotations

import errno
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from tinker_cookbook.exceptions import DataFormatError
from tinker_cookbook.supervised.conversations import SourceRow
from tinker_cookbook.supervised.sources.opening import OpenedFile, no_room
from tinker_cookbook.supervised.sources.row_file import MAX_ROW_BYTES, RowFile

__all__ = ["ARROW_MAGIC", "PARQUET_MAGIC", "ArrowRows"]

PARQUET_MAGIC = b"PAR1"
ARROW_MAGIC = b"ARROW1"
ROWS_PER_PORTION = 32


class ArrowRows(RowFile):
    """Rows of a Parquet file, or of an Arrow file as Hugging Face `save_to_disk` writes them."""

    row_word = "row"

    def __init__(self, opened: OpenedFile) -> None:
        self.container = "Parquet" if opened.head.startswith(PARQUET_MAGIC) else "Arrow"
        super().__init__(opened)
        import pyarrow

        self._table_file = tempfile.TemporaryFile()  # noqa: SIM115  (goes with the object)
        self._large_rows: dict[int, int] = {}
        try:
            self._first_rows = self._unpack(opened)
        except (pyarrow.ArrowException, OSError) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise no_room(self.path, error) from error  # pyright: ignore[reportArgumentType]
            problem = " ".join(str(error).split())
            raise DataFormatError(
                f"{self.path}: the {self.container} file cannot be read ({problem}); copy or "
                "download it again."
            ) from error
        self.fingerprint = f"{self.num_bytes}-{_crc32(self._file):08x}"
        self._table_file.seek(0)
        self._table = pyarrow.ipc.open_file(self._table_file)
        self._portion: tuple[int, Any] = (-1, None)
        self._refuse_empty()

    def _unpack(self, opened: OpenedFile) -> np.ndarray:
        """Write all rows into the temporary file; return int64 [portions + 1], the first row of
        each portion."""
        import pyarrow

        schema, portions = _portions(opened)
        counts = [0]
        with pyarrow.ipc.new_file(self._table_file, schema) as writer:
            for portion in portions:
                writer.write_batch(portion)
                self.num_bytes += portion.nbytes
                self._note_large_rows(portion, sum(counts[-1:]))
                counts.append(counts[-1] + portion.num_rows)
        return np.asarray(counts, np.int64)

    def _note_large_rows(self, portion: Any, first: int) -> None:
        if portion.nbytes <= MAX_ROW_BYTES:
            return
        for i in range(portion.num_rows):
            size = portion.slice(i, 1).nbytes
            if size > MAX_ROW_BYTES:
                self._large_rows[first + i] = size

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def place(self, index: int) -> int:
        return index + 1

    def where(self, index: int) -> str:
        return f"{self.path} row {index + 1}"

    def row_bytes(self, index: int) -> int:
        return self._large_rows.get(index, 0)

    def _read(self, index: int) -> SourceRow:
        number = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        if self._portion[0] != number:
            self._portion = (number, self._table.get_batch(number))
        offset = index - int(self._first_rows[number])
        [value] = self._portion[1].slice(offset, 1).to_pylist()
        return SourceRow(self.where(index), value, str(self.path.parent))

    def close(self) -> None:
        self._table_file.close()
        super().close()


def _portions(opened: OpenedFile) -> tuple[Any, Iterator[Any]]:
    """Return the schema of a table, and its rows in portions of at most `ROWS_PER_PORTION`."""
    import pyarrow
    import pyarrow.parquet

    opened.file.seek(0)
    if opened.head.startswith(PARQUET_MAGIC):
        table = pyarrow.parquet.ParquetFile(opened.file)
        return table.schema_arrow, table.iter_batches(batch_size=ROWS_PER_PORTION)
    if opened.head.startswith(ARROW_MAGIC):
        stored = pyarrow.ipc.open_file(opened.file)
        batches = (stored.get_batch(i) for i in range(stored.num_record_batches))
        return stored.schema, _cut(batches)
    stream = pyarrow.ipc.open_stream(opened.file)
    return stream.schema, _cut(iter(stream))


def _cut(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_PER_PORTION):
            yield batch.slice(start, ROWS_PER_PORTION)


def _crc32(file: BinaryIO) -> int:
    file.seek(0)
    crc32 = 0
    while chunk := file.read(2**20):
        crc32 = zlib.crc32(chunk, crc32)
    return crc32
