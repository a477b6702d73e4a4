"""Exact JSON: strict loading, and the source text of the members of an object or a list."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn, TypeAlias

__all__ = [
    "JsonObject",
    "JsonSchema",
    "element_texts",
    "ends_in_string",
    "json_text",
    "load_json",
    "member_texts",
    "object_text",
    "read_value",
]

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object that came from outside: its members are checked where they are used."""
JsonSchema: TypeAlias = Mapping[str, Any]
"""A JSON schema, or a tool declaration with one."""

_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')
_OPEN_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*\\?\Z')


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def json_text(value: object, *, indent: int | None = None) -> str:
    """Return JSON as chat templates write it: unicode unescaped, keys in given order."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def load_json(text: str) -> Any:
    """Return the value of strict JSON.

    Raises:
        ValueError: it is not JSON, or holds NaN or Infinity, or nests too deep.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it nests too deep") from error


def read_value(text: str, position: int) -> tuple[Any, int]:
    """Return the JSON value that starts at a position, and where it ends.

    Raises:
        ValueError: as `load_json`.
    """
    try:
        return _DECODER.raw_decode(text, position)
    except RecursionError as error:
        raise ValueError("it nests too deep") from error


def object_text(members: list[tuple[str, str]]) -> str:
    """Return a JSON object, given the names of its members and their values' JSON text."""
    return "{" + ", ".join(f"{json_text(name)}: {source}" for name, source in members) + "}"


def member_texts(text: str) -> list[tuple[str, str]]:
    """Return the name and the source text of each member of a valid JSON object.

    If a name occurs twice, the last value counts, at the place of the first, as in `json.loads`.
    """
    found: dict[str, str] = {}
    position = _skip_space(text, _skip_space(text, 0) + 1)
    while text[position] != "}":
        name, position = _DECODER.raw_decode(text, position)
        start = _skip_space(text, _skip_space(text, position) + 1)
        _, position = _DECODER.raw_decode(text, start)
        found[name] = text[start:position]
        position = _skip_space(text, position)
        if text[position] == ",":
            position = _skip_space(text, position + 1)
    return list(found.items())


def element_texts(text: str) -> list[str]:
    """Return the source text of each element of a valid JSON list."""
    found: list[str] = []
    position = _skip_space(text, _skip_space(text, 0) + 1)
    while text[position] != "]":
        _, end = _DECODER.raw_decode(text, position)
        found.append(text[position:end])
        position = _skip_space(text, end)
        if text[position] == ",":
            position = _skip_space(text, position + 1)
    return found


def ends_in_string(text: str) -> bool:
    """Whether unfinished JSON ends inside a string, so that what follows still belongs to it.

    A JSON string cannot contain a line break, so an open quote does not affect later lines.
    """
    position = 0
    while (start := text.find('"', position)) >= 0:
        closed = _STRING.match(text, start)
        if closed is None:
            return _OPEN_STRING.match(text, start) is not None
        position = closed.end()
    return False


def _skip_space(text: str, position: int) -> int:
    while text[position] in " \t\r\n":
        position += 1
    return position
