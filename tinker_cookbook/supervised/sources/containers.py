"""Finding a file's container: by its content if that is enough, else by its name."""

from __future__ import annotations

from pathlib import Path

from tinker_cookbook.supervised.conversation_file import ConversationFile, TextLines
from tinker_cookbook.supervised.sources.arrow_rows import ARROW_MAGIC, PARQUET_MAGIC, ArrowRows
from tinker_cookbook.supervised.sources.csv_file import CsvFile
from tinker_cookbook.supervised.sources.json_values import JsonValues
from tinker_cookbook.supervised.sources.opening import OpenedFile, open_unpacked
from tinker_cookbook.supervised.sources.row_file import RowFile

__all__ = ["DATA_SUFFIXES", "TEXT_SUFFIXES", "data_suffix", "open_rows"]

PACKED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
CSV_SUFFIXES = (".csv", ".tsv")
TEXT_SUFFIXES = (".txt", ".text")
DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet", ".arrow", *CSV_SUFFIXES)
_STREAM_HEAD = b"\xff\xff\xff\xff"


def data_suffix(path: Path) -> str:
    """Return the suffix of a file's name, without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def open_rows(path: str | Path) -> RowFile:
    """Open one data file.

    Raises:
        DataFormatError: a file that cannot be read, or has no rows.
    """
    opened = open_unpacked(path)
    return _container(opened)(opened)


def _container(opened: OpenedFile) -> type[RowFile]:
    head, suffix = opened.head, data_suffix(opened.path)
    if head.startswith((PARQUET_MAGIC, ARROW_MAGIC)):
        return ArrowRows
    if head.startswith(_STREAM_HEAD) and suffix == ".arrow":
        return ArrowRows
    if suffix in CSV_SUFFIXES:
        return CsvFile
    text = head.lstrip()
    if text.startswith(b"["):
        return JsonValues
    if text.startswith(b"{"):
        # If the first line only opens an object, every object is written over several lines.
        spread = text.partition(b"\n")[0].strip() == b"{" and b"\n" in text
        return JsonValues if spread else ConversationFile
    return TextLines if suffix in TEXT_SUFFIXES else ConversationFile
