"""Tool calls in tags: `<function=NAME>` with one `<parameter=NAME>` for each argument.

    <function=get_weather>
    <parameter=city>
    Zürich
    </parameter>
    </function>

A value may contain anything, tags included. So it ends only where the format continues: at a
`</parameter>` followed by another parameter or the end of the function. If a tag is missing, there
are two possible readings, and the text is not read as a call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from tinker_cookbook.replies.json_source import json_text, load_json, object_text
from tinker_cookbook.replies.pieces import BadCall, Call, ReadCall

__all__ = ["PYTHON_WORDS", "json_source", "read_tag_calls", "tags_are_open"]

PYTHON_WORDS: Mapping[str, str] = {"true": "True", "false": "False", "null": "None"}
"""How Qwen3.5 and Nemotron 3 write these three values; later models write them as in JSON."""

_NOT_CLOSED = "a parameter is not closed"
_FUNCTION_START = re.compile(r"\s*<function=([^\n]*?)>\n")
_PARAMETER_START = re.compile(r"<parameter=((?:(?!</?(?:parameter|function))[^\n])*?)>\n")
_PARAMETER_END = re.compile(r"\n</parameter>\n(?=<parameter=|\s*</function>\s*(?:\Z|<function=))")
_FUNCTION_END = re.compile(r"\s*</function>\s*")
_LOOSE_FUNCTION_START = re.compile(r"\s*<function=([^>\n]+)>")
_LOOSE_PARAMETER_START = re.compile(r"\s*<parameter=([^>\n]+)>\n?")
_LOOSE_PARAMETER_END = re.compile(
    r"\n?</parameter>(?=\s*<parameter=|\s*</function>\s*(?:\Z|<function=))"
)
# Structure within a value: a parameter or a function before it was not closed.
_INNER_START = re.compile(r"^<parameter=[^>\n]+>$", re.MULTILINE)
_INNER_END = re.compile(r"^</parameter>$", re.MULTILINE)
_INNER_FUNCTION = re.compile(
    r"</function>\s*(?:</tool_call>\s*<tool_call>\s*)?<function=[^>\n]+>\n"
)


@dataclass(frozen=True)
class _Lines:
    """Where tags may be: on separate lines, or anywhere."""

    function: re.Pattern[str]
    parameter: re.Pattern[str]
    value_end: re.Pattern[str]


_STRICT = _Lines(_FUNCTION_START, _PARAMETER_START, _PARAMETER_END)
_LOOSE = _Lines(_LOOSE_FUNCTION_START, _LOOSE_PARAMETER_START, _LOOSE_PARAMETER_END)


class _TagError(ValueError):
    """What is wrong with a call."""


def read_tag_calls(
    body: str, raw_text: str, words: Mapping[str, str], *, is_strict: bool = True
) -> list[ReadCall]:
    """Read all calls of a block; anything that is not exactly calls comes back with the reason.

    Args:
        body: the text between the marks of the block.
        raw_text: the whole block.
        words: how truth values and null are written, if not as in JSON.
        is_strict: every tag must be on a separate line, so that the call renders to the same tokens
            again.
    """
    try:
        functions = _read(body, _STRICT if is_strict else _LOOSE)
    except _TagError as error:
        return [BadCall(raw_text, str(error))]
    return [
        Call(name, object_text([(k, json_source(v, words)) for k, v in pairs.items()]))
        for name, pairs in functions
    ]


def tags_are_open(body: str) -> bool:
    """Whether unfinished calls end inside a parameter, so that what follows belongs to it."""
    try:
        _read(body, _LOOSE)
    except _TagError as error:
        return str(error) == _NOT_CLOSED
    return False


def _read(body: str, lines: _Lines) -> list[tuple[str, dict[str, str]]]:
    """Return the name and the arguments' texts of each function."""
    functions: list[tuple[str, dict[str, str]]] = []
    position = 0
    while position < len(body) or not functions:
        start = lines.function.match(body, position)
        if start is None:
            raise _TagError("expected <function=NAME>, parameters and </function>")
        if not start[1].strip():
            raise _TagError("the function has no name")
        members, position = _read_members(body, start.end(), lines)
        functions.append((start[1] if lines is _STRICT else start[1].strip(), members))
    return functions


def _read_members(body: str, position: int, lines: _Lines) -> tuple[dict[str, str], int]:
    """Return the arguments that start at a position, and where the function ends."""
    members: dict[str, str] = {}
    while (start := lines.parameter.match(body, position)) is not None:
        end = lines.value_end.search(body, start.end())
        if end is None:
            raise _TagError(_NOT_CLOSED)
        key, value = start[1], body[start.end() : end.start()]
        if len(_INNER_START.findall(value)) > len(_INNER_END.findall(value)):
            raise _TagError(f"parameter {key!r} holds the start of another")
        if _INNER_FUNCTION.search(value):
            raise _TagError(f"parameter {key!r} holds another function")
        if key in members:
            raise _TagError(f"parameter {key!r} is given twice")
        members[key] = value
        position = end.end()
    function_end = _FUNCTION_END.match(body, position)
    if function_end is None:
        rest = body[position:].partition("</function>")[0].strip()
        raise _TagError(
            f"not a parameter: {rest[:80]!r}" if rest else "expected </function> at the end"
        )
    return members, function_end.end()


def json_source(value: str, words: Mapping[str, str]) -> str:
    """Return a value as JSON text: unchanged if it is JSON other than a string, else a string.

    Args:
        value: the text between its tags.
        words: as for `read_tag_calls`; if given, JSON's own words are strings.
    """
    for source, word in words.items():
        if value == word:
            return source
        if value == source:
            return json_text(value)  # the format writes another word for this value
    if value == value.strip():  # JSON allows space around a value; a string keeps its space
        try:
            parsed = load_json(value)
        except ValueError:
            parsed = ""
        if not isinstance(parsed, str):
            return value
    return json_text(value)
