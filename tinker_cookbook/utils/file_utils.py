"""Read small JSONL files."""

from __future__ import annotations

import json

from tinker_cookbook.exceptions import DataFormatError

__all__ = ["read_jsonl"]


def read_jsonl(path: str) -> list[dict]:
    """Return all objects of a JSONL file that fits into memory; blank lines are skipped.

    `supervised.FromConversationFileBuilder` reads files of conversations row by row instead.

    Raises:
        DataFormatError: if a line is not a JSON object, or the file cannot be read.
    """
    rows = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if text.strip():
                    rows.append(_parse_object(text, f"{path}:{number}"))
    except OSError as error:
        raise DataFormatError(f"{path}: the file cannot be read: {error.strerror}.") from error
    return rows


def _parse_object(line: bytes, where: str) -> dict:
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataFormatError(f"{where}: not JSON ({error}); write one object per line.") from error
    if not isinstance(value, dict):
        raise DataFormatError(
            f"{where}: the line holds a {type(value).__name__}; write one JSON object per line."
        )
    return value
