"""A prompt and its reply, as texts or as lists of messages; only the reply is trained."""

from __future__ import annotations

from tinker_cookbook.replies.json_source import JsonObject, load_json
from tinker_cookbook.supervised.row_fields import FieldReader
from tinker_cookbook.supervised.shapes.openai_messages import numbered
from tinker_cookbook.supervised.shapes.parts import (
    SYSTEM_KEYS,
    RowParts,
    Shape,
    exactly_one_key,
    system_message,
)

__all__ = ["SHAPE"]

PROMPT_KEYS = ("prompt", "question", "query")
REPLY_KEYS = ("completion", "response", "answer")


def _read(row: JsonObject, reader: FieldReader) -> RowParts:
    prompt = exactly_one_key(row, PROMPT_KEYS, reader) or ""
    reply = exactly_one_key(row, REPLY_KEYS, reader) or ""
    before = _messages(row[prompt], prompt, "user", reader)
    before = [*system_message(row, reader), *before]
    after = _messages(row[reply], reply, "assistant", reader)
    return RowParts([*before, *after], row.get("tools"), num_context=len(before))


def _messages(value: object, key: str, role: str, reader: FieldReader) -> list[tuple[str, object]]:
    value = _from_cell(value)
    if isinstance(value, list):
        return numbered(value, key, reader)
    if isinstance(value, dict):
        return [(key, value)]
    if not isinstance(value, str):
        reader.fail_type(value, "a string or a list of messages", key)
    return [(key, {"role": role, "content": value})]


def _from_cell(value: object) -> object:
    """Return messages from JSON text of a list (tables store lists so); else the value."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        items = load_json(value)
    except ValueError:
        return value
    are_messages = bool(items) and all(
        isinstance(item, dict) and "role" in item and ("content" in item or "tool_calls" in item)
        for item in items
    )
    return items if are_messages else value


def _matches(row: JsonObject) -> bool:
    return all(any(row.get(key) is not None for key in keys) for keys in (PROMPT_KEYS, REPLY_KEYS))


SHAPE = Shape(
    name="prompt_completion",
    title="prompt and completion",
    keys=(*PROMPT_KEYS, *REPLY_KEYS, *SYSTEM_KEYS, "tools"),
    matches=_matches,
    read=_read,
)
