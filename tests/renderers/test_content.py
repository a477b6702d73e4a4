"""Helpers on message content and tool calls."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tinker_cookbook import renderers
from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers import Message, ToolCall, UnparsedToolCall, base
from tinker_cookbook.renderers.tool_calls import call_name_and_arguments, parse_call_json

from .families import FAMILIES
from .kinship import distinct

PARTS: Any = [
    {"type": "thinking", "thinking": "hm"},
    {"type": "text", "text": "a"},
    {"type": "image", "image": object()},
    {"type": "text", "text": "b"},
]


def test_reading_content() -> None:
    message: Message = {"role": "user", "content": PARTS}
    assert renderers.get_text_content(message) == "ab"
    assert renderers.get_text_content({"role": "user", "content": "x"}) == "x"
    assert renderers.ensure_text("x") == "x"
    assert renderers.ensure_text([{"type": "text", "text": "x"}]) == "x"
    with pytest.raises(RendererError, match="not text"):
        renderers.ensure_text(PARTS)
    assert base.ensure_list("x") == [{"type": "text", "text": "x"}]
    assert base.ensure_list(PARTS) is PARTS
    assert renderers.format_content_as_string(PARTS, "|") == "<think>hm</think>|a|<image>|b"
    assert base.has_thinking(PARTS)
    assert base.has_thinking("<think>")
    assert not base.has_thinking("plain")
    assert base.remove_thinking(PARTS) == PARTS[1:]


def test_jsonable_messages() -> None:
    call = ToolCall(function=ToolCall.FunctionBody(name="f", arguments="{}"))
    message: Message = {"role": "assistant", "content": PARTS, "tool_calls": [call]}
    record = base.message_to_jsonable(message)
    assert json.loads(json.dumps(record)) == record
    assert record["content"][2] == {"type": "image", "image": None}
    assert record["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert base.content_to_jsonable("x") == "x"


def test_blocks_in_text() -> None:
    text = 'x<think>hm</think>a<tool_call>{"name": "f", "arguments": {"q": 1}}</tool_call>b'
    parsed = renderers.parse_content_blocks(text)
    assert parsed is not None
    parts, calls = parsed
    assert parts == [
        {"type": "text", "text": "x"},
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "a"},
        {"type": "text", "text": "b"},
    ]
    assert isinstance(calls[0], ToolCall)
    assert calls[0].function.arguments == '{"q": 1}'
    broken = renderers.parse_content_blocks("<tool_call>no</tool_call>")
    assert broken is not None
    assert broken[1] == [
        UnparsedToolCall(
            raw_text="<tool_call>no</tool_call>",
            error="not valid JSON: Expecting value: line 1 column 1 (char 0)",
        )
    ]
    assert renderers.parse_content_blocks("<think>open") is None
    assert base.parse_think_blocks("<think>a</think>b") == [
        {"type": "thinking", "thinking": "a"},
        {"type": "text", "text": "b"},
    ]
    assert base.parse_think_blocks("plain") is None


def test_open_tool_blocks() -> None:
    found = base.detect_unterminated_tool_block("a<t>b</t><t>c", "<t>", "</t>")
    assert found == UnparsedToolCall(raw_text="<t>c", error=base.UNTERMINATED_TOOL_BLOCK_ERROR)
    assert base.detect_unterminated_tool_block("a<t>b</t>", "<t>", "</t>") is None


def test_call_arguments() -> None:
    call: Any = {"function": {"name": "f", "arguments": {"é": [1, None]}}}
    assert call_name_and_arguments(call) == ("f", '{"é": [1, null]}')
    assert call_name_and_arguments({"name": "f"}) == ("f", "{}")
    for nothing in (None, "null", "", " null\n"):
        assert call_name_and_arguments({"name": "f", "arguments": nothing}) == ("f", "{}")
    for arguments in ("[1]", "{", 3, '{"a": NaN}'):
        with pytest.raises(RendererError, match="not a JSON object"):
            call_name_and_arguments({"name": "f", "arguments": arguments})
    with pytest.raises(RendererError, match="not a name"):
        call_name_and_arguments({"arguments": {}})


@pytest.mark.parametrize(
    "arguments",
    ['{"a":1}', '{ "a" : [ {"b": "}, \\"arguments\\": 3"} ] }', "{}", '{"a": 1e999, "a": 2}'],
)
def test_argument_text_is_kept_to_the_letter(arguments: str) -> None:
    for body in (
        f'{{"name": "f", "arguments": {arguments}}}',
        f' {{"arguments" :{arguments} , "id": "7", "name":"f"}} ',
    ):
        call = parse_call_json(body, body)
        assert isinstance(call, ToolCall)
        assert call.function.arguments == arguments
        assert call.id == ("7" if "id" in body else None)


def test_tool_calls_are_immutable_and_strict() -> None:
    call = ToolCall(function=ToolCall.FunctionBody(name="f", arguments="{}"))
    with pytest.raises(ValueError, match="frozen"):
        call.id = "x"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="Extra inputs"):
        ToolCall(function=call.function, extra=1)  # pyright: ignore[reportCallIssue]


ADDED = "check_renderer_name find_image_renderer_names get_renderer_names load_renderer".split()
"""What the cookbook does not have."""


def test_public_names() -> None:
    expected = (
        "AudioPart ContentPart ImagePart Message ParseFailureKind ParseTermination Role TextPart "
        "ThinkingPart ToolCall ToolSpec UnparsedToolCall MessageDelta StreamingMessageHeader "
        "StreamingTextDelta StreamingThinkingDelta Utf8TokenDecoder RenderContext Renderer "
        "TrainOnWhat classify_parse_failure ensure_text format_content_as_string get_text_content "
        "parse_content_blocks register_renderer unregister_renderer get_registered_renderer_names "
        "is_renderer_registered get_renderer"
    )
    assert set(renderers.__all__) == {*expected.split(), *ADDED}
    assert all(hasattr(renderers, name) for name in renderers.__all__)


@pytest.mark.parametrize("family_name", distinct([n for n in FAMILIES if FAMILIES[n].has_tools]))
def test_openai_calls_are_what_the_models_template_takes(family_name: str) -> None:
    family = FAMILIES[family_name]
    body = ToolCall.FunctionBody(name="f", arguments='{"city": "Zürich", "days": 2}')
    calls = [ToolCall(id="000000001", function=body)]
    record = family.renderer.to_openai_message(
        {"role": "assistant", "content": "", "tool_calls": calls}
    )
    text = family.tokenizer.apply_chat_template(
        [{"role": "user", "content": "How warm?"}, record],
        tokenize=False,
        **family.template_options,
    )
    assert "Zürich" in text
    assert '\\"city' not in text, "quoted twice"


def test_openai_messages() -> None:
    body = ToolCall.FunctionBody(name="f", arguments='{"a": 1}')
    message: Any = {
        "role": "assistant",
        "content": PARTS[:2],
        "tool_calls": [ToolCall(id="7", function=body)],
    }
    assert FAMILIES["qwen3"].renderer.to_openai_message(message) == {
        "role": "assistant",
        "content": "a",
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": "7", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
        ],
    }
