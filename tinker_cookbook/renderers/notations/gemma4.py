"""Gemma 4's notation for tool declarations and calls: JSON with bare keys and marked texts.

    call:get_weather{city:<|"|>Zürich<|"|>,days:2}

Texts are between two `<|"|>` tokens; keys of arguments are bare and in alphabetical order. The
functions yield pieces: text, and None for each `<|"|>`.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tinker_cookbook.renderers.tool_calls import (
    call_name_and_arguments,
    element_texts,
    json_text,
    member_texts,
    tool_declaration,
)
from tinker_cookbook.renderers.types import CallLike, ToolCall, ToolSpec, UnparsedToolCall
from tinker_cookbook.replies.json_source import JsonSchema

__all__ = ["Piece", "call_pieces", "declaration_pieces", "parse_call", "result_pieces"]

Piece = str | None


# ---- writing ----


def call_pieces(call: CallLike) -> Iterator[Piece]:
    """Yield the pieces between the markers of a call; numbers are written as in its JSON text."""
    name, arguments = call_name_and_arguments(call)
    yield f"call:{name}"
    yield from _object(member_texts(arguments), quotes_keys=False)


def result_pieces(name: str, text: str) -> Iterator[Piece]:
    """Yield the pieces between the markers of a tool result."""
    yield f"response:{name}{{value:"
    yield from _quoted(text)
    yield "}"


def _value(source: str, *, quotes_keys: bool) -> Iterator[Piece]:
    """Yield a value given as JSON text."""
    if source.startswith('"'):
        yield from _quoted(json.loads(source))
    elif source.startswith("{"):
        yield from _object(member_texts(source), quotes_keys=quotes_keys)
    elif source.startswith("["):
        elements = element_texts(source)
        parts = (lambda e=element: _value(e, quotes_keys=quotes_keys) for element in elements)
        yield from _enclosed("[", parts, "]")
    else:
        yield source


def _object(members: Sequence[tuple[str, str]], *, quotes_keys: bool) -> Iterator[Piece]:
    def member(key: str, source: str) -> Iterator[Piece]:
        yield from _quoted(key) if quotes_keys else (key,)
        yield ":"
        yield from _value(source, quotes_keys=quotes_keys)

    parts = (lambda m=m: member(*m) for m in sorted(members, key=_by_key))
    yield from _enclosed("{", parts, "}")


def _by_key(member: tuple[str, object]) -> str:
    return member[0].lower()


def _quoted(text: str) -> tuple[Piece, ...]:
    return (None, text, None)


def _enclosed(
    before: str, parts: Iterator[Callable[[], Iterator[Piece]]], after: str
) -> Iterator[Piece]:
    yield before
    for number, part in enumerate(parts):
        if number:
            yield ","
        yield from part()
    yield after


# ---- declarations ----

_SCHEMA_KEYS = ("description", "type", "properties", "required", "nullable")


def declaration_pieces(spec: ToolSpec) -> Iterator[Piece]:
    """Yield the pieces between the markers of a declaration.

    The format writes descriptions, types, properties, required names, items, choices of a text, and
    whether a value may be null. It omits the rest of a schema.
    """
    tool = tool_declaration(spec)["function"]
    yield f"declaration:{tool['name']}{{description:"
    yield from _quoted(_shown(tool.get("description", "")))
    parameters = tool.get("parameters") or {}
    if parameters:
        yield ",parameters:{"
        if parameters.get("properties"):
            yield "properties:{"
            yield from _properties(parameters["properties"])
            yield "},"
        if parameters.get("required"):
            yield from _names("required", parameters["required"])
            yield ","
        if parameters.get("type"):
            yield "type:"
            yield from _quoted(_shown(parameters["type"]).upper())
            yield "}"
    yield "}"


def _properties(properties: JsonSchema, skipped: Sequence[str] = ()) -> Iterator[Piece]:
    """Yield the properties of an object, in alphabetical order."""
    members = [(key, value) for key, value in properties.items() if key not in skipped]
    for number, (key, value) in enumerate(sorted(members, key=_by_key)):
        yield f"{',' if number else ''}{key}:{{"
        schema = value if isinstance(value, Mapping) else {}
        kind = _shown(schema.get("type", "")).upper()
        for part in _schema_parts(schema, kind):
            yield from part
            yield ","
        yield "type:"
        yield from _quoted(kind)
        yield "}"


def _schema_parts(schema: JsonSchema, kind: str) -> Iterator[Iterator[Piece]]:
    """Yield the parts of a property before its type."""
    if schema.get("description"):
        yield iter(("description:", *_quoted(_shown(schema["description"]))))
    if kind == "STRING" and schema.get("enum"):
        yield _labelled("enum", _value(json_text(schema["enum"]), quotes_keys=True))
    items = schema.get("items")
    if kind == "ARRAY" and isinstance(items, Mapping) and items:
        yield _labelled("items", _items(items))
    if schema.get("nullable"):
        yield iter(("nullable:true",))
    if kind == "OBJECT":
        inner = schema.get("properties")
        found = _properties(inner) if isinstance(inner, Mapping) else None
        # Without properties, the format treats the schema's other keys as properties.
        yield _labelled("properties", _braced(found or _properties(schema, _SCHEMA_KEYS)))
        if schema.get("required"):
            yield _names("required", schema["required"])


def _items(items: JsonSchema) -> Iterator[Piece]:
    def member(key: str, value: Any) -> Iterator[Piece]:
        if key == "properties":
            inner = _properties(value) if isinstance(value, Mapping) else iter(())
            return _labelled(key, _braced(inner))
        if key == "required":
            return _names(key, value)
        if key == "type":
            value = value.upper() if isinstance(value, str) else [_shown(v).upper() for v in value]
        return _labelled(key, _value(json_text(value), quotes_keys=True))

    members = [(key, value) for key, value in items.items() if value is not None]
    parts = (lambda m=m: member(*m) for m in sorted(members, key=_by_key))
    return _enclosed("{", parts, "}")


def _labelled(key: str, pieces: Iterator[Piece]) -> Iterator[Piece]:
    yield f"{key}:"
    yield from pieces


def _braced(pieces: Iterator[Piece]) -> Iterator[Piece]:
    yield "{"
    yield from pieces
    yield "}"


def _names(key: str, names: Sequence[object]) -> Iterator[Piece]:
    parts = (lambda name=name: iter(_quoted(_shown(name))) for name in names)
    return _labelled(key, _enclosed("[", parts, "]"))


def _shown(value: object) -> str:
    return value if isinstance(value, str) else str(value)


# ---- reading ----


class _CallError(ValueError):
    """What is wrong with a call."""


def parse_call(parts: Sequence[str | int], raw_text: str) -> Sequence[ToolCall | UnparsedToolCall]:
    """Parse one call; anything that is not exactly one comes back with the reason.

    Args:
        parts: texts between the markers of the call; ids are `<|"|>` tokens.
        raw_text: the whole call.
    """
    reader = _Reader(parts)
    try:
        name, arguments = reader.call()
    except (_CallError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        return [UnparsedToolCall(raw_text=raw_text, error=reason)]
    return [ToolCall(function=ToolCall.FunctionBody(name=name, arguments=arguments))]


class _Reader:
    """Reads the notation into JSON text. A text ends at its `<|"|>` token, whatever it contains."""

    def __init__(self, parts: Sequence[str | int]) -> None:
        self._text = "".join(part if isinstance(part, str) else "\0" for part in parts)
        self._marks: list[int] = []
        self._position = 0
        length = 0
        for part in parts:
            if isinstance(part, str):
                length += len(part)
            else:
                self._marks.append(length)
                length += 1

    def call(self) -> tuple[str, str]:
        """Return name and arguments, if the whole text is one call."""
        start = self._text.find("{")
        before = self._text[: max(0, start)].strip()
        name = before.removeprefix("call:")
        if name == before or not name or (self._marks and self._marks[0] < start):
            raise _CallError("expected call:NAME{...}")
        self._position = start
        arguments = self._object()
        if self._text[self._position :].strip():
            raise _CallError("something follows the arguments")
        return name, arguments

    def _next_mark(self) -> int:
        """Return the place of the next `<|"|>`; the length of the text if there is none."""
        index = bisect.bisect_left(self._marks, self._position)
        return self._marks[index] if index < len(self._marks) else len(self._text)

    def _skip_space(self) -> None:
        while self._text[self._position : self._position + 1].isspace():
            self._position += 1

    def _takes(self, character: str) -> bool:
        """Skip this character if it comes next, and return whether it did."""
        self._skip_space()
        found = self._text.startswith(character, self._position)
        if found and self._next_mark() != self._position:
            self._position += 1
            return True
        return False

    def _value(self) -> str:
        self._skip_space()
        if self._next_mark() == self._position < len(self._text):
            return json_text(self._quoted())
        if self._text.startswith("{", self._position):
            return self._object()
        if self._takes("["):
            return "[" + ", ".join(self._separated("]", self._value)) + "]"
        return self._bare()

    def _object(self) -> str:
        """Return the object that starts here."""
        self._position += 1
        names: set[str] = set()

        def member() -> str:
            key = self._key()
            if key in names:
                raise _CallError(f"{key!r} is given twice")
            names.add(key)
            return f"{json_text(key)}: {self._value()}"

        return "{" + ", ".join(self._separated("}", member)) + "}"

    def _separated(self, end: str, read: Callable[[], str]) -> list[str]:
        found: list[str] = []
        while not self._takes(end):
            if found and not self._takes(","):
                raise _CallError(f"expected ',' or {end!r} {self._place()}")
            found.append(read())
        return found

    def _key(self) -> str:
        self._skip_space()
        if self._next_mark() == self._position < len(self._text):
            key = self._quoted()
            if not self._takes(":"):
                raise _CallError(f"expected ':' {self._place()}")
            return key
        colon = self._text.find(":", self._position, self._next_mark())
        if colon < 0:
            raise _CallError(f"expected a key and ':' {self._place()}")
        key, self._position = self._text[self._position : colon].strip(), colon + 1
        return key

    def _quoted(self) -> str:
        """Return the text between the `<|"|>` here and the next one."""
        self._position += 1
        end = self._next_mark()
        if end == len(self._text):
            raise _CallError("a text is not closed")
        text, self._position = self._text[self._position : end], end + 1
        return text

    def _bare(self) -> str:
        """Return the number, truth value or null here."""
        end, limit = self._position, self._next_mark()
        while end < limit and self._text[end] not in ",{}[]":
            end += 1
        source = self._text[self._position : end].strip()
        try:
            json.loads(source)
        except ValueError:
            raise _CallError(f"expected a value {self._place()}") from None
        if source.startswith('"'):
            raise _CallError(f'a text must be in <|"|>, not in quotes, {self._place()}')
        self._position = end
        return source

    def _place(self) -> str:
        return f"before {self._text[self._position : self._position + 40]!r}"
