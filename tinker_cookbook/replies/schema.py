"""Giving arguments the types that a tool declares, for formats that write them without types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tinker_cookbook.replies.json_source import (
    JsonSchema,
    json_text,
    load_json,
    member_texts,
    object_text,
)

__all__ = ["fit_arguments", "parameters_of", "read_texts"]

_MAX_REFERENCES = 8
_TYPE_BY_START = {
    '"': "string",
    "{": "object",
    "[": "array",
    "t": "boolean",
    "f": "boolean",
    "n": "null",
}
_JSON_WORDS = {'"true"': "true", '"false"': "false", '"null"': "null"}
_DEFINITIONS = ("$defs", "definitions")


def parameters_of(tools: Sequence[JsonSchema], name: str) -> JsonSchema:
    """Return the schema of a tool's arguments; empty if there is none."""
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and function.get("name") == name:
            parameters = function.get("parameters")
            return parameters if isinstance(parameters, Mapping) else {}
    return {}


def fit_arguments(arguments: str, parameters: JsonSchema, words: Mapping[str, str]) -> str:
    """Return arguments with a string wherever the schema takes a string and not the value read.

    A zip code that was read as a number becomes exactly the text that was written. Arguments that
    are not declared, or may have either type, are not changed.

    Args:
        arguments: a JSON object as text.
        parameters: the schema that the tool declares for it.
        words: how truth values and null were written, if not as in JSON.
    """

    def fit(source: str, types: set[str] | None) -> str:
        if types is None or types & _types_of(source) or "string" not in types:
            return source
        return json_text(words.get(source, source))

    return _each_member(arguments, parameters, fit)


def read_texts(arguments: str, parameters: JsonSchema, words: Mapping[str, str]) -> str:
    """Return arguments with the value that a string spells, wherever the schema does not take a
    string.

    Where no type is declared, JSON's words for truth values and null count. Only for calls that do
    not have to render to the same tokens again.

    Args:
        arguments: a JSON object as text.
        parameters: the schema that the tool declares for it.
        words: other ways to write truth values and null, in addition to JSON's.
    """

    def read(source: str, types: set[str] | None) -> str:
        word = _JSON_WORDS.get(source)
        if word is not None and (types is None or types & _types_of(word)):
            return word
        if types is None or types & _types_of(source) or not source.startswith('"'):
            return source
        return _read_as(source, types, words)

    return _each_member(arguments, parameters, read)


def _each_member(
    arguments: str, parameters: JsonSchema, change: Callable[[str, set[str] | None], str]
) -> str:
    """Return arguments changed by a function of each one's JSON text and declared types."""
    properties = parameters.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    return object_text(
        [
            (key, change(source, _json_types(properties.get(key), parameters)))
            for key, source in member_texts(arguments)
        ]
    )


def _read_as(source: str, types: set[str], words: Mapping[str, str]) -> str:
    """Return the JSON text of the value that a string spells, if it has one of the types."""
    text = load_json(source).strip()
    inner = next((json_word for json_word, word in words.items() if word == text), text)
    try:
        load_json(inner)
    except ValueError:
        return source
    return inner if types & _types_of(inner) else source


def _types_of(source: str) -> set[str]:
    """Return the JSON schema types that a value in JSON text has."""
    if source[0] in _TYPE_BY_START:
        return {_TYPE_BY_START[source[0]]}
    return {"number", "integer"} if float(source).is_integer() else {"number"}


def _json_types(schema: object, root: JsonSchema, depth: int = 0) -> set[str] | None:
    """Return the types that a schema takes, None if it does not say.

    Args:
        schema: schema of one argument.
        root: the tool's whole schema, for references into its definitions.
        depth: references followed so far; a circle of references ends without types.
    """
    if not isinstance(schema, Mapping) or depth > _MAX_REFERENCES:
        return None
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        return set().union(*(_types_of(json_text(value)) for value in values))
    reference = schema.get("$ref")
    if isinstance(reference, str):
        return _json_types(_definition(reference, root), root, depth + 1)
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            choices = [_json_types(choice, root, depth + 1) for choice in schema[key]]
            return set().union(*(c or () for c in choices)) if all(choices) else None
    if isinstance(schema.get("allOf"), list):
        parts = [_json_types(part, root, depth + 1) for part in schema["allOf"]]
        known = [part for part in parts if part]
        return set.intersection(*known) if known else None
    kind = schema.get("type")
    if not isinstance(kind, str | list):
        return None
    kinds = [kind] if isinstance(kind, str) else kind
    types = {one for one in kinds if isinstance(one, str)}
    return types | {"null"} if schema.get("nullable") is True else types


def _definition(reference: str, root: JsonSchema) -> object:
    """Return the schema that a reference to the tool's definitions names."""
    place, _, name = reference.removeprefix("#/").partition("/")
    definitions = root.get(place) if place in _DEFINITIONS else None
    return definitions.get(name) if isinstance(definitions, Mapping) else None
