"""`messages`: the shape of the OpenAI API and of its fine-tuning files, and of TRL."""

from __future__ import annotations

from tinker_cookbook.replies.json_source import JsonObject
from tinker_cookbook.supervised.row_fields import FieldReader
from tinker_cookbook.supervised.shapes.parts import RowParts, Shape, exactly_one_key

__all__ = ["SHAPE", "numbered"]

TOOL_KEYS = ("tools", "functions")


def numbered(value: object, at: str, reader: FieldReader) -> list[tuple[str, object]]:
    """Return the items of a list of messages (or of its JSON text), each with its path.

    Raises:
        ConversationError: not a list, or an empty one.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = reader.from_json_text(value, at)
    if isinstance(value, dict):
        value = _by_message(value)
    if not isinstance(value, list):
        reader.fail_type(value, "a list of messages", at)
    if not value:
        reader.fail(f"{at} is empty", "give at least one message", kind="no messages")
    return [(f"{at}[{i}]", message) for i, message in enumerate(value)]


def _by_message(columns: JsonObject) -> object:
    """Return messages from a table with one list per key (a `Sequence` of datasets)."""
    lengths = {len(items) if isinstance(items, list) else -1 for items in columns.values()}
    if len(lengths) != 1 or -1 in lengths:
        return columns
    return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]


def _read(row: JsonObject, reader: FieldReader) -> RowParts:
    messages = numbered(row["messages"], "messages", reader)
    tools = {key: row.get(key) for key in TOOL_KEYS if row.get(key) not in (None, "", [])}
    tools_key = exactly_one_key(tools, TOOL_KEYS, reader) or "tools"
    if row.get("parallel_tool_calls") is not None:
        reader.notes["parallel_tool_calls is accepted: calls are trained in the order given"] += 1
    return RowParts(messages, tools.get(tools_key), tools_key)


SHAPE = Shape(
    name="messages",
    title="messages (role, content)",
    keys=("messages", *TOOL_KEYS, "parallel_tool_calls"),
    matches=lambda row: row.get("messages") is not None,
    read=_read,
)
