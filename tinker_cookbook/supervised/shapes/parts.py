"""The parts of a row, and the description of a shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinker_cookbook.replies.json_source import JsonObject
from tinker_cookbook.supervised.row_fields import FieldReader

__all__ = ["RowParts", "Shape", "exactly_one_key", "system_message"]

SYSTEM_KEYS = ("system", "system_prompt")


@dataclass(frozen=True)
class RowParts:
    """A row's messages with their paths, or its plain text."""

    messages: list[tuple[str, Any]]
    """(Path inside the row, message); role, content, tool_calls ... are not read yet."""
    tools: Any = None
    """Tool declarations as in the row."""
    tools_at: str = "tools"
    text: str | None = None
    """Plain text, trained whole; `messages` is then empty."""
    num_context: int = 0
    """Number of first messages that are a prompt: they are not trained, whatever their
    role."""


@dataclass(frozen=True)
class Shape:
    """One way to write a row."""

    name: str
    title: str
    """Name in reports, with the keys of the shape."""
    keys: tuple[str, ...]
    """Keys that are used; others of the row are ignored."""
    matches: Callable[[JsonObject], bool]
    read: Callable[[JsonObject, FieldReader], RowParts]


def system_message(row: JsonObject, reader: FieldReader) -> list[tuple[str, object]]:
    """Return the system prompt next to a row's turns as a first message."""
    key = exactly_one_key(row, SYSTEM_KEYS, reader)
    if key is None or not reader.string(row[key], key).strip():
        return []
    return [(key, {"role": "system", "content": row[key]})]


def exactly_one_key(row: JsonObject, keys: tuple[str, ...], reader: FieldReader) -> str | None:
    """Return the key that a row uses of several with the same meaning; None if none.

    Raises:
        ConversationError: two of them, because only one would be trained.
    """
    found = [key for key in keys if row.get(key) is not None]
    if len(found) > 1:
        reader.fail(
            f"{' and '.join(map(repr, found))} are both in one row and mean the same",
            "keep one of them",
            kind="ambiguous keys",
        )
    return found[0] if found else None
