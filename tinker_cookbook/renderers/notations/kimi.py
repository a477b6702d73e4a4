"""Tool declarations as Kimi K2.5 reads them: TypeScript types with comments.

The models' tokenizers include a program that writes them. This module writes the same text for JSON
schemas of scalars, enumerations, unions, arrays, objects and references to `$defs`. Required
members come first; each group is sorted by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.tool_calls import json_text, tool_declaration
from tinker_cookbook.renderers.types import ToolSpec
from tinker_cookbook.replies.json_source import JsonSchema

__all__ = ["typescript_text"]

_STEP = "  "
_LIMITS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
_IN_UNION = {"integer": "number", "object": "{}", "array": "Array<any>"}


def typescript_text(tools: Sequence[ToolSpec]) -> str:
    """Return the declarations of all tools."""
    functions = "\n".join(_function(tool_declaration(tool)["function"]) for tool in tools)
    return f"# Tools\n\n## functions\nnamespace functions {{\n{functions}\n}}\n"


def _function(function: ToolSpec) -> str:
    parameters = function.get("parameters") or {}
    lines = []
    for name, schema in (parameters.get("$defs") or {}).items():
        if schema.get("description"):
            lines.append(_comment(schema["description"], ""))
        lines.append(f"interface {name} {_type(schema, '')}")
    if function.get("description"):
        lines.append(_comment(function["description"], ""))
    lines.append(f"type {function['name']} = (_: {_object(parameters, '')}) => any;")
    return "\n".join(lines)


def _comment(text: str, indent: str) -> str:
    return "\n".join(f"{indent}// {line}" if line else "" for line in text.split("\n"))


def _notes(schema: JsonSchema | bool, indent: str) -> Iterator[str]:
    """Yield the comment lines above a type: its description, then its limits."""
    if not isinstance(schema, Mapping):
        return
    if schema.get("description"):
        yield _comment(schema["description"], indent)
    has_own_type = not {"$ref", "anyOf", "enum"} & set(schema)
    kind = schema.get("type") if has_own_type else None
    keys = _LIMITS.get(kind, ()) if isinstance(kind, str) else ()
    limits = ", ".join(f"{key}: {schema[key]}" for key in keys if key in schema)
    if limits:
        yield f"{indent}// {limits}"


def _type(schema: JsonSchema | bool, indent: str) -> str:
    if isinstance(schema, bool) or not schema:
        return "null" if schema is False else "any"
    if "$ref" in schema:
        if not schema["$ref"].startswith("#/$defs/"):
            raise RendererError(f"$ref={schema['$ref']!r} is not supported; refer to #/$defs/NAME.")
        return schema["$ref"].split("/")[-1]
    if "anyOf" in schema:
        return " | ".join(_type(one, indent) for one in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(f'"{v}"' if isinstance(v, str) else str(v) for v in schema["enum"])
    kind = schema.get("type")
    if isinstance(kind, list):
        return " | ".join(str(_IN_UNION.get(one, one)) for one in kind)
    if kind == "object":
        return _object(schema, indent)
    if kind == "array":
        return _array(schema, indent)
    if not kind:
        raise RendererError(f"schema={schema!r} has no type; give one, or anyOf, enum or $ref.")
    return "number" if kind == "integer" else kind


def _array(schema: JsonSchema, indent: str) -> str:
    items = schema.get("items") or {}
    inner = indent + _STEP
    notes = list(_notes(items, inner))
    if not notes:
        return f"Array<{_type(items, indent)}>"
    return "\n".join(["Array<", *notes, inner + _type(items, inner), f"{indent}>"])


def _object(schema: JsonSchema, indent: str) -> str:
    inner = indent + _STEP
    properties = schema.get("properties") or {}
    required = schema.get("required") or ()
    ordered = sorted(properties, key=lambda name: (name not in required, name))
    members = [_member(name, properties[name], name in required, inner) for name in ordered]
    others = schema.get("additionalProperties")
    if others is not None:
        kind = "never" if others is False else _type(others, inner)
        members.append(f"{inner}[k: string]: {kind}")
    if not members:
        return "{}"
    return "{\n" + ",\n".join(members) + f"\n{indent}}}"


def _member(name: str, schema: JsonSchema | bool, is_required: bool, indent: str) -> str:
    lines = list(_notes(schema, indent))
    default = schema.get("default") if isinstance(schema, Mapping) else None
    if default is not None:
        is_number = isinstance(default, int | float)
        lines.append(f"{indent}// Default: {repr(default) if is_number else json_text(default)}")
    mark = "" if is_required else "?"
    return "\n".join([*lines, f"{indent}{name}{mark}: {_type(schema, indent)}"])
