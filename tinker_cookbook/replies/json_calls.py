"""Tool calls in JSON: one object, a list of objects, or a whole reply that consists of calls."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tinker_cookbook.replies.json_source import (
    JsonObject,
    element_texts,
    json_text,
    load_json,
    member_texts,
    read_value,
)
from tinker_cookbook.replies.pieces import BadCall, Call, ReadCall

__all__ = [
    "build_call",
    "read_json_call",
    "read_json_calls",
    "read_whole_reply",
    "write_whole_reply",
]


def build_call(name: str, arguments: str, raw_text: str, *, call_id: str | None = None) -> ReadCall:
    """Return the call with its arguments unchanged, or the raw text with the reason."""
    if not name:
        return BadCall(raw_text, "the name is missing")
    try:
        is_object = isinstance(load_json(arguments), dict)
    except ValueError:
        is_object = False
    if not is_object:
        return BadCall(raw_text, "the arguments are not a JSON object")
    return Call(name, arguments, call_id)


def read_json_call(
    body: str, raw_text: str, *, keys: Sequence[str] = ("arguments",), may_hold_more: bool = False
) -> ReadCall:
    """Read `{"name": ..., "arguments": {...}}`; anything else is returned with the reason.

    Args:
        body: the JSON text.
        raw_text: body with its marks, kept if the call cannot be read.
        keys: possible names of the arguments' member; Llama 3 writes `parameters`.
        may_hold_more: whether to ignore other members (Llama 3.2 adds a type), and to accept
            arguments given as JSON text or null.

    Returns:
        A call whose arguments are the exact text of the reply.
    """
    try:
        value = load_json(body)
    except ValueError as error:
        return BadCall(raw_text, f"not valid JSON: {error}")
    if not isinstance(value, dict):
        return BadCall(raw_text, f"expected a JSON object, got {type(value).__name__}")
    key = next((key for key in keys if key in value), keys[0])
    unwrapped = _unwrapped(value.get(key, {})) if may_hold_more else None
    if unwrapped is not None:
        value[key] = {}
    problem = _problem(value, key, may_hold_more=may_hold_more)
    if problem:
        return BadCall(raw_text, problem)
    if unwrapped is None:
        unwrapped = dict(member_texts(body))[key] if key in value else "{}"
    return Call(value["name"], unwrapped, value.get("id"))


def _unwrapped(arguments: object) -> str | None:
    """Return arguments that are JSON text, or nothing, as the text of an object; else None."""
    if arguments is None:
        return "{}"
    if not isinstance(arguments, str):
        return None
    if not arguments.strip():
        return "{}"
    try:
        return arguments if isinstance(load_json(arguments), dict) else None
    except ValueError:
        return None


def _problem(call: JsonObject, key: str, *, may_hold_more: bool) -> str | None:
    if not isinstance(call.get("name"), str) or not call["name"]:
        return "'name' is missing or not a string"
    if not isinstance(call.get(key, {}), dict):
        return f"{key!r} is not a JSON object"
    if not isinstance(call.get("id", ""), str):
        return "'id' is not a string"
    unknown = sorted(set(call) - {"name", key, "id"})
    return f"unknown keys {unknown}" if unknown and not may_hold_more else None


def read_json_calls(
    body: str, raw_text: str, *, keys: Sequence[str] = ("arguments",), may_hold_more: bool = False
) -> Sequence[ReadCall]:
    """Read one call or a list of calls. If one is wrong, return all of them as one bad call."""
    texts = [body]
    if body.lstrip().startswith("["):
        try:
            load_json(body)
        except ValueError as error:
            return [BadCall(raw_text, f"not valid JSON: {error}")]
        texts = element_texts(body)
    calls = [
        read_json_call(text, raw_text, keys=keys, may_hold_more=may_hold_more) for text in texts
    ]
    if not calls:
        return [BadCall(raw_text, "expected a list of calls")]
    return next(([call] for call in calls if isinstance(call, BadCall)), calls)


def read_whole_reply(
    text: str,
    *,
    keys: Sequence[str] = ("parameters",),
    may_hold_more: bool = False,
    is_exact: bool = False,
) -> list[Call] | None:
    """Read a reply that consists of calls, as Llama 3 writes them: several are joined by `; `.

    Each call must have arguments, because an answer in JSON may have a name. Return None for
    anything else.

    Args:
        text: the whole reply.
        keys: possible names of the arguments' member.
        may_hold_more: as in `read_json_call`.
        is_exact: accept only what `write_whole_reply` writes, so that the message renders to the
            same tokens again.
    """
    texts = _joined_values(text)
    if not texts:
        return None
    calls = [read_json_call(one, one, keys=keys, may_hold_more=may_hold_more) for one in texts]
    found = [call for call in calls if isinstance(call, Call)]
    has_arguments = all(any(key in load_json(one) for key in keys) for one in texts if found)
    if len(found) < len(calls) or not has_arguments:
        return None
    if is_exact and write_whole_reply([(c.name, c.arguments) for c in found], keys[0]) != text:
        return None
    return found


def write_whole_reply(calls: Sequence[tuple[str, str]], key: str) -> str:
    """Return a reply that consists of calls, given their names and arguments as JSON text."""
    return "; ".join(f'{{"name": {json_text(name)}, "{key}": {args}}}' for name, args in calls)


def _joined_values(text: str) -> list[str]:
    """Return the JSON objects of a text that consists of them, separated by semicolons; else []."""
    found: list[str] = []
    separator = _SPACE.match(text)
    while separator is not None and separator.end() < len(text):
        start = separator.end()
        try:
            value, end = read_value(text, start)
        except ValueError:
            return []
        if not isinstance(value, dict):
            return []
        found.append(text[start:end])
        separator = _SEPARATOR.match(text, end)
    return found if separator is not None else []


_SPACE = re.compile(r"\s*")
_SEPARATOR = re.compile(r"\s*;\s*|\s*\Z")
