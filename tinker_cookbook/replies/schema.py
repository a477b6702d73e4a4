"""The types that a tool declares, given to the arguments of formats that write them without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tinker_cookbook.replies.json_source import json_text, load_json, member_texts, object_text

__all__ = ["fit_arguments", "parameters_of"]

_MAX_REFERENCES = 8
_TYPE_BY_START = {
    '"': "string",
    "{": "object",
    "[": "array",
    "t": "boolean",
    "f": "boolean",
    "n": "null",
}


def parameters_of(tools: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """Return the schema of a tool's arguments; empty if it is not declared, or has none."""
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and function.get("name") == name:
            parameters = function.get("parameters")
            return parameters if isinstance(parameters, Mapping) else {}
    return {}


def fit_arguments(
    arguments: str,
    parameters: Mapping[str, Any],
    words: Mapping[str, str],
    *,
    reads_texts: bool = False,
) -> str:
    """Return arguments with a text wherever the schema takes a text and not what was read.

    A zip code read as a number becomes the text again, to the letter. Arguments that are not
    declared, or may be of either type, stay as they are.

    Args:
        arguments: a JSON object as text.
        parameters: the schema that the tool declares for it.
        words: how the format writes truth values and null, where not as in JSON.
        reads_texts: also the other way round: a text that is JSON, or one of the words, of the
            type declared becomes that value. Only where it need not be written again by the same
            tokens.
    """
    properties = parameters.get("properties")
    if not isinstance(properties, Mapping) or not properties:
        return arguments
    members = []
    for key, source in member_texts(arguments):
        types = _json_types(properties.get(key), parameters)
        if types is not None and not types & _types_of(source):
            if "string" in types:
                source = json_text(words.get(source, source))
            elif reads_texts and source.startswith('"'):
                source = _read_as(source, types, words)
        members.append((key, source))
    return object_text(members)


def _read_as(source: str, types: set[str], words: Mapping[str, str]) -> str:
    """Return the JSON text of a value that a text spells out, if it has one of the types."""
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


def _json_types(schema: Any, root: Mapping[str, Any], depth: int = 0) -> set[str] | None:
    """Return the types that a schema takes, None if it does not say.

    Args:
        schema: of one argument.
        root: the tool's whole schema, for references into its `$defs`.
        depth: references followed so far; a circle of them says nothing.
    """
    if not isinstance(schema, Mapping) or depth > _MAX_REFERENCES:
        return None
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        return set().union(*(_types_of(json_text(value)) for value in values))
    reference = schema.get("$ref")
    if isinstance(reference, str):
        definitions = root.get("$defs")
        found = definitions if isinstance(definitions, Mapping) else {}
        return _json_types(found.get(reference.removeprefix("#/$defs/")), root, depth + 1)
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            choices = [_json_types(choice, root, depth + 1) for choice in schema[key]]
            return set().union(*(c or () for c in choices)) if all(choices) else None
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    return {one for one in kind if isinstance(one, str)} if isinstance(kind, list) else None
