"""Tool calls as Qwen3.5 writes them: `<function=NAME>` with one `<parameter=NAME>` per argument.

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Zürich
    </parameter>
    </function>
    </tool_call>

A value does not say its type: text is written bare, everything else as JSON. A value is read as
JSON if it is a JSON number, truth value, null, list or object, else as text. Text that looks like
such a value is therefore read as one; `Renderer.fit_tool_calls` corrects it by the schema of the
tool.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from tinker_cookbook.renderers.tool_calls import (
    as_tool_call,
    call_name_and_arguments,
    member_texts,
)
from tinker_cookbook.renderers.types import CallLike, Message, ToolCall, ToolSpec, UnparsedToolCall
from tinker_cookbook.replies import schema
from tinker_cookbook.replies.tag_calls import PYTHON_WORDS, json_source, read_tag_calls

__all__ = [
    "PYTHON_WORDS",
    "fit_arguments",
    "fit_calls",
    "json_source",
    "parse_xml_call",
    "value_text",
    "xml_call_text",
]


def xml_call_text(call: CallLike, words: Mapping[str, str]) -> str:
    """Return the text of one call, from `<function=` to `</function>`.

    Args:
        call: the call; values in its arguments that are not strings are written as in their JSON
            text.
        words: how truth values and null are written, if not as in JSON.
    """
    name, arguments = call_name_and_arguments(call)
    written = "".join(
        f"<parameter={key}>\n{value_text(value, words)}\n</parameter>\n"
        for key, value in member_texts(arguments)
    )
    return f"<function={name}>\n{written}</function>"


def value_text(source: str, words: Mapping[str, str]) -> str:
    """Return how an argument is written, given its JSON text: strings bare, other values
    unchanged."""
    if source.startswith('"'):
        return json.loads(source)
    return words.get(source, source)


def parse_xml_call(
    parts: Sequence[str | int], raw_text: str, words: Mapping[str, str]
) -> Sequence[ToolCall | UnparsedToolCall]:
    """Parse the calls of a block; anything else is returned with the reason.

    Args:
        parts: the text between the markers of the block; usually one call.
        raw_text: the whole block.
        words: how truth values and null are written, if not as in JSON.
    """
    body = "".join(map(str, parts))
    return [as_tool_call(call) for call in read_tag_calls(body, raw_text, words)]


def fit_calls(message: Message, tools: Sequence[ToolSpec], words: Mapping[str, str]) -> Message:
    """Return a parsed reply with each call's arguments as `fit_arguments` gives them."""
    calls = message.get("tool_calls")
    if not calls or not tools:
        return message
    return {**message, "tool_calls": [fit_arguments(call, tools, words) for call in calls]}


def fit_arguments(call: ToolCall, tools: Sequence[ToolSpec], words: Mapping[str, str]) -> ToolCall:
    """Return the call with a string wherever the tool's schema takes a string and not the value
    read.

    For formats that write text bare: a zip code read as a number becomes exactly the text that was
    written, so the call still renders to the sampled tokens. Calls of unknown tools, and arguments
    that are not declared or may have either type, are not changed.

    Args:
        call: as `parse_xml_call` gave it.
        tools: declarations; one of them may declare this call's tool.
        words: the same as when the call was parsed.
    """
    parameters = schema.parameters_of(tools, call.function.name)
    arguments = schema.fit_arguments(call.function.arguments, parameters, words)
    body = ToolCall.FunctionBody(name=call.function.name, arguments=arguments)
    return call.model_copy(update={"function": body})
