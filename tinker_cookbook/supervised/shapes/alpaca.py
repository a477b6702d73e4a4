"""Alpaca: `instruction`, `input`, `output`, and earlier turns in `history`."""

from __future__ import annotations

from tinker_cookbook.replies.json_source import JsonObject
from tinker_cookbook.supervised.row_fields import FieldReader, shown
from tinker_cookbook.supervised.shapes.parts import (
    SYSTEM_KEYS,
    RowParts,
    Shape,
    exactly_one_key,
    system_message,
)

__all__ = ["SHAPE"]

INPUT_KEYS = ("input", "context")
OUTPUT_KEYS = ("output", "response")


def _read(row: JsonObject, reader: FieldReader) -> RowParts:
    output = exactly_one_key(row, OUTPUT_KEYS, reader)
    if output is None:
        reader.fail("output is missing", "write the reply as 'output'", kind="empty message")
    source = exactly_one_key(row, INPUT_KEYS, reader)
    texts = [reader.string(row["instruction"], "instruction")]
    if source is not None:
        texts.append(reader.string(row[source], source))
    asked = "\n".join(text for text in texts if text.strip())
    turns = [
        ("instruction", {"role": "user", "content": asked}),
        (output, {"role": "assistant", "content": reader.string(row[output], output)}),
    ]
    return RowParts(
        [*system_message(row, reader), *_history(row.get("history"), reader), *turns],
        row.get("tools"),
    )


def _history(value: object, reader: FieldReader) -> list[tuple[str, object]]:
    """Earlier turns, `[[question, answer], ...]`."""
    value = reader.from_json_text(value, "history")
    if value is None:
        return []
    if not isinstance(value, list):
        reader.fail_type(value, "a list of [question, answer]", "history")
    messages = []
    for i, pair in enumerate(value):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            reader.fail(
                f"history holds {shown(pair)}",
                "use a list of [question, answer]",
                kind="wrong type",
                at=f"history[{i}]",
            )
        for j, (role, text) in enumerate(zip(("user", "assistant"), pair, strict=True)):
            at = f"history[{i}][{j}]"
            messages.append((at, {"role": role, "content": reader.string(text, at)}))
    return messages


SHAPE = Shape(
    name="alpaca",
    title="Alpaca (instruction, input, output, history)",
    keys=("instruction", *INPUT_KEYS, *OUTPUT_KEYS, "history", *SYSTEM_KEYS, "tools"),
    matches=lambda row: (
        row.get("instruction") is not None and any(row.get(key) is not None for key in OUTPUT_KEYS)
    ),
    read=_read,
)
