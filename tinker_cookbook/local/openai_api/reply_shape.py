"""What a reply must look like: `response_format` and `tool_choice` of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.service.protocol.json_body import JsonObject, check_depth, show_value

__all__ = ["ReplyShape", "parameters_of", "read_response_format", "read_tools", "tool_name"]


@dataclass(frozen=True)
class ReplyShape:
    """Constraints on a reply; without any, the model decides."""

    schema: JsonObject | None = None
    """The reply is JSON of this schema; with optional tools, or else a call."""
    schema_field: str = ""
    """The field of the request that has the schema, for errors."""
    must_call: bool = False
    """Whether the reply must be a call of one of the tools."""

    def __bool__(self) -> bool:
        return self.schema is not None or self.must_call


def read_response_format(value: object) -> tuple[JsonObject | None, str]:
    """Return the schema of the reply and the field that has it; (None, "") for free text.

    Raises:
        UserError: the message names the field and the value.
    """
    where = "response_format"
    if value is None or value == {} or value == {"type": "text"}:
        return None, ""
    if not isinstance(value, dict):
        raise UserError(f"{where}={show_value(value)} is not accepted; expected an object")
    kind = value.get("type")
    if kind == "json_object":
        return {"type": "object"}, where
    if kind != "json_schema":
        raise UserError(
            f"{where}.type={str(kind)[:40]!r} is not supported here; use text, json_object or "
            "json_schema"
        )
    inner = value.get("json_schema")
    where = f"{where}.json_schema.schema"
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        raise UserError(f"{where}={show_value(schema)} is not accepted; expected an object")
    check_depth(schema, where)
    return schema, where


def read_tools(given: Sequence[object], choice: object) -> tuple[list[JsonObject], bool]:
    """Return the tools that may be called, and whether one of them must be.

    Raises:
        UserError: the message names the field and the value.
    """
    tools = [_check_tool(tool, f"tools[{at}]") for at, tool in enumerate(given)]
    if choice in ("auto", "none"):
        return ([] if choice == "none" else tools), False
    if choice == "required":
        names, must_call = None, True
    else:
        names, must_call = _names_of_choice(choice)
    if not tools:
        raise UserError(f"tool_choice={show_value(choice)} needs tools; declare at least one")
    if names is None:
        return tools, must_call
    unknown = [name for name in names if name not in map(tool_name, tools)]
    if unknown or not names:
        raise UserError(
            f"tool_choice={show_value(choice)} does not name a declared tool; use one of "
            f"{', '.join(map(tool_name, tools))}"
        )
    return [tool for tool in tools if tool_name(tool) in names], must_call


def tool_name(tool: Mapping[str, object]) -> str:
    """Return the name of a checked declaration."""
    return str(cast(JsonObject, tool["function"])["name"])


def parameters_of(tool: Mapping[str, object]) -> JsonObject:
    """Return the schema of a tool's arguments."""
    given = cast(JsonObject, tool["function"]).get("parameters")
    return cast(JsonObject, given) if isinstance(given, dict) and given else {"type": "object"}


def _names_of_choice(choice: object) -> tuple[list[str], bool]:
    """Return the tools that a choice names, and whether one of them must be called."""
    fields = choice if isinstance(choice, dict) else {}
    kind = fields.get("type")
    if kind == "function":
        return [_name_in(fields)], True
    if kind == "allowed_tools":
        inner = fields.get("allowed_tools", fields)
        inner = inner if isinstance(inner, dict) else {}
        tools = inner.get("tools")
        names = [_name_in(tool) for tool in tools] if isinstance(tools, list) else []
        return names, inner.get("mode") == "required"
    raise UserError(
        f"tool_choice={str(choice)[:80]} is not accepted; use 'auto', 'none', 'required' or "
        '{"type": "function", "function": {"name": ...}}'
    )


def _name_in(value: object) -> str:
    fields = value if isinstance(value, dict) else {}
    function = fields.get("function", fields)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def _check_tool(tool: object, where: str) -> JsonObject:
    function = tool.get("function") if isinstance(tool, dict) else None
    if (
        not isinstance(tool, dict)
        or not isinstance(function, dict)
        or not isinstance(function.get("name"), str)
    ):
        raise UserError(
            f"{where} is not a function declaration; expected "
            '{"type": "function", "function": {"name": ..., "parameters": {...}}}'
        )
    check_depth(function, f"{where}.function")
    return tool
