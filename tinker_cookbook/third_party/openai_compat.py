"""Messages and tools of the OpenAI chat API, converted to those of the renderers and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from tinker_cookbook.exceptions import DataFormatError
from tinker_cookbook.renderers.content import split_reasoning
from tinker_cookbook.renderers.tool_calls import (
    call_name_and_arguments,
    openai_call,
    tool_declaration,
)
from tinker_cookbook.renderers.types import (
    Content,
    ContentPart,
    ImagePart,
    Message,
    TextPart,
    ToolCall,
    ToolSpec,
)

__all__ = [
    "OpenAIChatInput",
    "openai_messages_to_tinker",
    "openai_tools_to_tinker",
    "tinker_messages_to_openai",
    "tool_specs_to_openai_tools",
]

_ROLES = {"developer": "system", "function": "tool"}
"""Roles that are read as another role."""
_KNOWN_ROLES = ("system", "user", "assistant", "tool")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of content parts that are text -> the key of the text."""
_REASONING = ("reasoning_content", "reasoning", "thinking")


class OpenAIChatInput(TypedDict):
    """A conversation as the OpenAI chat API takes it."""

    messages: list[dict[str, Any]]
    tools: NotRequired[list[dict[str, Any]]]


def openai_messages_to_tinker(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return the messages for a renderer.

    Raises:
        DataFormatError: a message cannot be read; the text names it.
    """
    return [_read_message(message, f"messages[{at}]") for at, message in enumerate(messages)]


def tinker_messages_to_openai(messages: Sequence[Message]) -> OpenAIChatInput:
    """Return the messages and the tools that they declare, as the OpenAI chat API takes them."""
    result = OpenAIChatInput(messages=[_write_message(message) for message in messages])
    tools = [tool for message in messages for tool in message.get("tools") or ()]
    if tools:
        result["tools"] = tool_specs_to_openai_tools(tools)
    return result


def openai_tools_to_tinker(tools: Sequence[Mapping[str, Any]]) -> list[ToolSpec]:
    """Return the tool declarations for a renderer.

    Raises:
        DataFormatError: a declaration is not a function with a name.
    """
    return [_read_tool(tool, f"tools[{at}]") for at, tool in enumerate(tools)]


def tool_specs_to_openai_tools(tools: Sequence[ToolSpec]) -> list[dict[str, Any]]:
    """Return the tool declarations as the OpenAI chat API takes them."""
    return [dict(tool_declaration(tool)) for tool in tools]


def _read_message(given: object, where: str) -> Message:
    if not isinstance(given, Mapping):
        raise DataFormatError(f"{where}={str(given)[:80]} is not an object; give role and content.")
    role = given.get("role")
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if role not in _KNOWN_ROLES:
        known = ", ".join((*_KNOWN_ROLES, *_ROLES))
        raise DataFormatError(f"{where}.role={role!r} is unknown; use one of {known}.")
    message = Message(role=role, content=_read_content(given.get("content"), f"{where}.content"))
    for name in ("name", "tool_call_id"):
        if isinstance(given.get(name), str):
            message[name] = given[name]
    reasoning = next((given[key] for key in _REASONING if given.get(key)), None)
    if isinstance(reasoning, str) and role == "assistant":
        message["reasoning_content"] = reasoning
    calls = given.get("tool_calls")
    if calls:
        if not isinstance(calls, list):
            raise DataFormatError(f"{where}.tool_calls is not a list; give a list of calls.")
        message["tool_calls"] = [
            _read_call(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(calls)
        ]
    return message


def _read_content(content: object, where: str) -> Content:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataFormatError(f"{where}={str(content)[:80]} is not a text or a list of parts.")
    parts = [_read_part(part, f"{where}[{at}]") for at, part in enumerate(content)]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    return "".join(texts) if len(texts) == len(parts) else parts


def _read_part(part: object, where: str) -> ContentPart:
    fields: Mapping[str, object] = part if isinstance(part, Mapping) else {}
    kind = str(fields.get("type"))
    text = fields.get(_TEXT_PARTS.get(kind, ""))
    if isinstance(text, str):
        return TextPart(type="text", text=text)
    image = fields.get("image_url")
    url = image.get("url") if isinstance(image, Mapping) else image
    if kind in ("image_url", "input_image") and isinstance(url, str):
        return ImagePart(type="image", image=url)
    raise DataFormatError(f"{where}.type={kind[:40]!r} is not supported; use text or image_url.")


def _read_call(call: object, where: str) -> ToolCall:
    if not isinstance(call, Mapping):
        raise DataFormatError(f"{where} is not an object; give a function call.")
    try:
        name, arguments = call_name_and_arguments(call)
    except ValueError as error:
        raise DataFormatError(f"{where}: {error}") from error
    call_id = call.get("id")
    body = ToolCall.FunctionBody(name=name, arguments=arguments)
    return ToolCall(id=call_id if isinstance(call_id, str) else None, function=body)


def _read_tool(tool: object, where: str) -> ToolSpec:
    fields: Mapping[str, object] = tool if isinstance(tool, Mapping) else {}
    function = fields.get("function", fields)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataFormatError(
            f"{where} is not a function declaration; give "
            '{"type": "function", "function": {"name": ..., "parameters": {...}}}.'
        )
    return ToolSpec(
        name=function["name"],
        description=function.get("description") or "",
        parameters=function.get("parameters") or {"type": "object", "properties": {}},
    )


def _write_message(message: Message) -> dict[str, Any]:
    reasoning, text = split_reasoning(message)
    shown: dict[str, Any] = {"role": message["role"], "content": text}
    if reasoning:
        shown["reasoning_content"] = reasoning
    calls = message.get("tool_calls")
    if calls:
        shown["tool_calls"] = [openai_call(call, as_text=True) for call in calls]
    identity = {"tool_call_id": message.get("tool_call_id"), "name": message.get("name")}
    return shown | {key: value for key, value in identity.items() if value is not None}
