"""Writing and reading tool declarations and tool calls as JSON text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.types import (
    CallLike,
    Message,
    OpenAIToolCall,
    ToolCall,
    ToolDeclaration,
    ToolSpec,
    UnparsedToolCall,
)
from tinker_cookbook.replies.json_calls import read_json_call, write_whole_reply
from tinker_cookbook.replies.json_source import element_texts, json_text, load_json, member_texts
from tinker_cookbook.replies.pieces import BadCall, ReadCall

__all__ = [
    "arguments_text",
    "as_tool_call",
    "bare_calls_as_text",
    "call_name_and_arguments",
    "declared_tools",
    "element_texts",
    "json_text",
    "member_texts",
    "openai_call",
    "parse_call_json",
    "tool_declaration",
]


def as_tool_call(call: ReadCall) -> ToolCall | UnparsedToolCall:
    """Return a call in the form that messages hold, given a call that was read from a reply."""
    if isinstance(call, BadCall):
        return UnparsedToolCall(raw_text=call.raw_text, error=call.error)
    body = ToolCall.FunctionBody(name=call.name, arguments=call.arguments)
    return ToolCall(id=call.call_id, function=body)


def tool_declaration(spec: ToolSpec | ToolDeclaration) -> ToolDeclaration:
    """Return the declaration in the shape in which chat templates and the OpenAI API take it."""
    if "function" in spec:
        return dict(spec)  # pyright: ignore[reportReturnType]
    return {"type": "function", "function": dict(spec)}  # pyright: ignore[reportReturnType]


def declared_tools(messages: Sequence[Message]) -> list[ToolSpec]:
    """Return the tools that the messages of a conversation declare."""
    return [tool for message in messages for tool in message.get("tools") or ()]


def openai_call(call: CallLike, *, as_text: bool) -> OpenAIToolCall:
    """Return a call as a dict in the shape of the OpenAI API.

    Args:
        call: as for `call_name_and_arguments`.
        as_text: give the arguments as JSON text, not as an object.
    """
    name, arguments = call_name_and_arguments(call)
    given = arguments if as_text else json.loads(arguments)
    call_id = call.id if isinstance(call, ToolCall) else call.get("id")
    record: OpenAIToolCall = {} if call_id is None else {"id": call_id}  # pyright: ignore
    record["type"] = "function"
    record["function"] = {"name": name, "arguments": given}
    return record


def call_name_and_arguments(call: CallLike) -> tuple[str, str]:
    """Return the name and the arguments as JSON text; arguments given as text are not changed.

    Args:
        call: a ToolCall, or a dict as in the OpenAI API (`arguments` a string or an object).

    Raises:
        RendererError: if the name is missing or the arguments are not a JSON object.
    """
    if isinstance(call, ToolCall):
        name, arguments = call.function.name, call.function.arguments
    else:
        body = call.get("function", call)
        fields: Mapping[str, object] = body if isinstance(body, Mapping) else {}
        name, arguments = fields.get("name"), fields.get("arguments", {})
    if not isinstance(name, str) or not name:
        raise RendererError(f"tool call name={name!r} is not a name; give a non-empty string.")
    return name, arguments_text(arguments, name)


def arguments_text(arguments: object, name: str) -> str:
    """Return arguments as JSON text; text that is a JSON object is not changed.

    Null and empty text, which some servers give a call without arguments, are an empty object.
    """
    if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
        return "{}"
    if isinstance(arguments, Mapping):
        return json_text(arguments)
    try:
        value = load_json(arguments) if isinstance(arguments, str) else None
    except ValueError:
        value = None
    if not isinstance(arguments, str) or not isinstance(value, dict):
        raise RendererError(
            f"arguments={arguments!r} of the call of {name!r} are not a JSON object; give an "
            "object or its JSON text. A call the model got wrong belongs in unparsed_tool_calls."
        )
    return arguments


def parse_call_json(
    body: str, raw_text: str, *, arguments_key: str = "arguments"
) -> ToolCall | UnparsedToolCall:
    """Parse `{"name": ..., "arguments": {...}}`; anything else is returned with the reason.

    Args:
        body: the JSON text.
        raw_text: body with its markers, kept if the call is invalid.
        arguments_key: the key of the arguments; Llama 3 writes `parameters`.

    Returns:
        A ToolCall whose `arguments` is the exact text of the reply, or an UnparsedToolCall.
    """
    return as_tool_call(read_json_call(body, raw_text, keys=(arguments_key,)))


def bare_calls_as_text(message: Message, tools: Sequence[ToolSpec], key: str) -> Message:
    """Turn calls without markers back into text if no tool was declared.

    Args:
        message: the parsed reply.
        tools: the declared tools.
        key: the format's name for the arguments.
    """
    calls = message.get("tool_calls")
    if tools or not calls or message["content"]:
        return message
    text = write_whole_reply([call_name_and_arguments(call) for call in calls], key)
    kept = {name: value for name, value in message.items() if name != "tool_calls"}
    return Message(**{**kept, "content": text})  # pyright: ignore[reportArgumentType]
