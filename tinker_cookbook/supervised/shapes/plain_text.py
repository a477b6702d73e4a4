"""Plain `text`: no turns; every token is trained, and the end-of-document token after it."""

from __future__ import annotations

from tinker_cookbook.replies.json_source import JsonObject
from tinker_cookbook.supervised.row_fields import FieldReader
from tinker_cookbook.supervised.shapes.parts import RowParts, Shape

__all__ = ["SHAPE"]


def _read(row: JsonObject, reader: FieldReader) -> RowParts:
    text = reader.string(row["text"], "text")
    if not text.strip():
        reader.fail("text is empty", "write its text or remove the row", kind="empty message")
    return RowParts([], text=text)


SHAPE = Shape(
    name="text",
    title="plain text (trained whole)",
    keys=("text",),
    matches=lambda row: row.get("text") is not None,
    read=_read,
)
