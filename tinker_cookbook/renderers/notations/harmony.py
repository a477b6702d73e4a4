"""Tool declarations as gpt-oss reads them: a TypeScript namespace.

The odd line breaks and indents within types are those of the template.
"""

from __future__ import annotations

from collections.abc import Sequence

from tinker_cookbook.renderers.tool_calls import json_text, tool_declaration
from tinker_cookbook.renderers.types import ToolSpec
from tinker_cookbook.replies.json_source import JsonSchema

__all__ = ["namespace_text"]

_LONGEST_ITEM = 50
_ARRAYS = {"string": "string[]", "number": "number[]", "integer": "number[]"}
_ARRAYS |= {"boolean": "boolean[]"}
_PLAIN = {"number": "number", "integer": "number", "boolean": "boolean"}


def namespace_text(tools: Sequence[ToolSpec]) -> str:
    """Return the declarations of all tools, in the namespace `functions`."""
    declared = "".join(_tool_text(tool_declaration(tool)["function"]) for tool in tools)
    return f"## functions\n\nnamespace functions {{\n\n{declared}}} // namespace functions"


def _tool_text(tool: ToolSpec) -> str:
    parameters = tool.get("parameters") or {}
    properties = parameters.get("properties") or {}
    required = parameters.get("required") or ()
    head = f"// {tool.get('description', '')}\ntype {tool['name']} = "
    if not properties:
        return head + "() => any;\n\n"
    lines = "".join(_parameter(name, spec, required) for name, spec in properties.items())
    return f"{head}(_: {{\n{lines}}}) => any;\n\n"


def _parameter(name: str, spec: JsonSchema, required: Sequence[str]) -> str:
    comment = f"// {spec['description']}\n" if spec.get("description") else ""
    mark = "" if name in required else "?"
    return f"{comment}{name}{mark}: {_type(spec)}{_default(spec)},\n"


def _default(spec: JsonSchema) -> str:
    if "default" not in spec:
        return ""
    if spec.get("enum"):
        return f", // default: {spec['default']}"
    if spec.get("oneOf"):
        return f"// default: {spec['default']}"
    return f", // default: {json_text(spec['default'])}"


def _type(spec: JsonSchema) -> str:
    kind = spec.get("type")
    if kind == "array":
        return _array(spec)
    if isinstance(kind, list | tuple) and kind:
        return " | ".join(kind)
    if spec.get("oneOf"):
        return _union(spec["oneOf"])
    if kind == "string":
        if spec.get("enum"):
            return '"' + '" | "'.join(map(str, spec["enum"])) + '"'
        return "string" + _null(spec)
    if kind == "object":
        return _object(spec)
    return _PLAIN.get(str(kind), "any")


def _null(spec: JsonSchema) -> str:
    return " | null" if spec.get("nullable") else ""


def _array(spec: JsonSchema) -> str:
    items = spec.get("items")
    if not items:
        return "any[]" + _null(spec)
    known = _ARRAYS.get(str(items.get("type")))
    if known is None:
        inner = _type(items)
        is_long = inner == "object | object" or len(inner) > _LONGEST_ITEM
        known = "any[]" if is_long else f"{inner}[]"
    return known + _null(spec)


def _union(variants: Sequence[JsonSchema]) -> str:
    texts = []
    for variant in variants:
        text = _type(variant)
        if variant.get("description"):
            text += f"// {variant['description']}"
        if "default" in variant:
            text += " " * 20 + f"// default: {json_text(variant['default'])}"
        texts.append(text)
    return " | \n".join(texts)


def _object(spec: JsonSchema) -> str:
    properties = spec.get("properties") or {}
    if not properties:
        return "object"
    required = spec.get("required") or ()
    members = (
        f"{name}{'' if name in required else '?'}: \n" + " " * 16 + _type(member)
        for name, member in properties.items()
    )
    return "{\n" + ", ".join(members) + "}"
