"""Messages and tools of the OpenAI chat API, read and written."""

from __future__ import annotations

from typing import Any

import pytest

from tinker_cookbook.exceptions import DataFormatError
from tinker_cookbook.renderers.types import ToolCall
from tinker_cookbook.third_party.openai_compat import (
    openai_messages_to_tinker,
    openai_tools_to_tinker,
    tinker_messages_to_openai,
    tool_specs_to_openai_tools,
)

CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "", "reasoning_content": "Call it.", "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "call_1", "name": "f"},
]
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "Add one.", "parameters": {"type": "object"}},
}


def test_a_conversation_comes_back_as_it_was():
    messages = openai_messages_to_tinker(CONVERSATION)
    body = ToolCall.FunctionBody(name="f", arguments='{"x": 1}')
    assert messages[2].get("tool_calls") == [ToolCall(id="call_1", function=body)]
    assert tinker_messages_to_openai(messages)["messages"] == CONVERSATION


def test_tools_come_back_and_are_found_in_messages():
    specs = openai_tools_to_tinker([TOOL])
    assert specs == [TOOL["function"]]
    assert tool_specs_to_openai_tools(specs) == [TOOL]
    declared = tinker_messages_to_openai([{"role": "system", "content": "", "tools": specs}])
    assert declared.get("tools") == [TOOL]
    assert "tools" not in tinker_messages_to_openai([{"role": "user", "content": "x"}])


def test_other_spellings_are_read():
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    messages = openai_messages_to_tinker(
        [
            {"role": "developer", "content": parts},
            {"role": "user", "content": [parts[0], image]},
            {"role": "assistant", "content": None},
        ]
    )
    assert messages[0] == {"role": "system", "content": "ab"}
    assert messages[1]["content"] == [
        {"type": "text", "text": "a"},
        {"type": "image", "image": "data:image/png;base64,AA=="},
    ]
    assert messages[2] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("hello", r"messages\[0\]='?hello"),
        ({"role": "king", "content": ""}, r"messages\[0\].role='king'"),
        ({"role": "user", "content": 5}, r"messages\[0\].content=5"),
        ({"role": "user", "content": [{"type": "video"}]}, r"content\[0\].type='video'"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, r"tool_calls\[0\]"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]},
            r"tool_calls\[0\]: arguments=",
        ),
    ],
)
def test_what_cannot_be_read_is_named(message, said: str):
    with pytest.raises(DataFormatError, match=said):
        openai_messages_to_tinker([message])


def test_a_tool_without_a_name_is_refused():
    with pytest.raises(DataFormatError, match=r"tools\[0\] is not a function declaration"):
        openai_tools_to_tinker([{"type": "function", "function": {}}])
