"""ShareGPT: `conversations`, a list of `{"from", "value"}`; some files write role and content."""

from __future__ import annotations

from typing import Any

from tinker_cookbook.replies.json_source import JsonObject
from tinker_cookbook.supervised.row_fields import FieldReader, shown
from tinker_cookbook.supervised.shapes.openai_messages import numbered
from tinker_cookbook.supervised.shapes.parts import (
    SYSTEM_KEYS,
    RowParts,
    Shape,
    exactly_one_key,
    system_message,
)

__all__ = ["SHAPE"]

LIST_KEYS = ("conversations", "conversation")
CALL_SPEAKERS = ("function_call", "tool_call", "tool_calls")
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    **dict.fromkeys(CALL_SPEAKERS, "assistant"),
}
_TURN_KEYS = ("from", "value", "weight", "name", "tool_call_id", "trainable")
_ANSWER_TAGS = ("<tool_response>", "</tool_response>")


def _read(row: JsonObject, reader: FieldReader) -> RowParts:
    key = exactly_one_key(row, LIST_KEYS, reader) or LIST_KEYS[0]
    turns = numbered(row[key], key, reader)
    messages = [(at, _message(turn, at, reader)) for at, turn in turns]
    separate = system_message(row, reader)
    if separate and turns and messages[0][1].get("role") == "system":
        reader.fail(
            f"{separate[0][0]!r} is next to {key}, which also begins with a system message",
            "keep one of them",
            kind="ambiguous keys",
        )
    return RowParts([*separate, *messages], row.get("tools"))


def _message(turn: object, at: str, reader: FieldReader) -> JsonObject:
    if not isinstance(turn, dict):
        reader.fail_type(turn, "an object with from and value", at)
    if turn.get("role") is not None and turn.get("from") is None:
        return turn  # role and content, in a list with another name
    reader.check_keys(turn, _TURN_KEYS, at)
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        problem = "from is missing" if speaker is None else f"from {shown(speaker)} is unknown"
        reader.fail(problem, f"use one of {', '.join(SPEAKERS)}", kind="unknown role", at=at)
    message = {key: turn[key] for key in _TURN_KEYS[2:] if turn.get(key) is not None}
    if speaker in CALL_SPEAKERS:
        return message | {"role": "assistant"} | _calls(turn.get("value"), f"{at}.value", reader)
    text = reader.string(turn.get("value"), f"{at}.value")
    role = SPEAKERS[speaker]
    return message | {"role": role, "content": _answer(text, reader) if role == "tool" else text}


def _calls(value: object, at: str, reader: FieldReader) -> JsonObject:
    """Return content and calls of `{"name", "arguments"}`, one or a list; or markup, which is read
    later.

    Calls are returned as in the row; one place checks the calls of all shapes.
    """
    if isinstance(value, str) and value.lstrip().startswith("<tool_call>"):
        return {"content": value}
    parsed = reader.from_json_text(value, at)
    calls: list[Any] = parsed if isinstance(parsed, list) else [parsed]
    for call in calls:
        if not isinstance(call, dict) or not ("name" in call or "function" in call):
            reader.fail(
                f"value {shown(value)} is not a call",
                'use {"name": ..., "arguments": {...}}, or a list of such',
                kind="tool call",
                at=at,
            )
    return {"content": "", "tool_calls": calls}


def _answer(text: str, reader: FieldReader) -> str:
    """Return a tool's answer without tags around it: the format writes its own."""
    opening, closing = _ANSWER_TAGS
    bare = text.strip()
    if not (bare.startswith(opening) and bare.endswith(closing) and bare.count(opening) == 1):
        return text
    reader.notes["<tool_response> around a tool's answer is left to the chat format"] += 1
    return bare[len(opening) : -len(closing)].strip("\n")


SHAPE = Shape(
    name="sharegpt",
    title="ShareGPT: conversations (from, value)",
    keys=(*LIST_KEYS, *SYSTEM_KEYS, "tools"),
    matches=lambda row: any(row.get(key) is not None for key in LIST_KEYS),
    read=_read,
)
