"""Reasoning and calls written in the text of a reply become parts; mentions of tags stay text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tinker_cookbook.renderers import Message
from tinker_cookbook.renderers.markup import remaining_markup, structure_reply_markup

from .families import FAMILIES

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def reply(content: Any, **more: Any) -> Message:
    fields: Any = {"role": "assistant", "content": content, **more}
    return fields


def thought(text: str, *rest: str) -> list[dict[str, str]]:
    return [{"type": "thinking", "thinking": text}, *({"type": "text", "text": t} for t in rest)]


@pytest.mark.parametrize(
    ("content", "structured"),
    [
        ("<think>\nadd\n</think>\n\n4", thought("add", "4")),
        ("\n<think>add</think>4", thought("add", "4")),
        ("<think> add </think> 4", thought("add", "4")),
        ("<think>\n\n</think>\n\n4", "4"),
        (
            "<think>\n\n  - one\n  - two\n\n</think>\n\n    code",
            thought("  - one\n  - two", "    code"),
        ),
        ("<think>a</think>\n<think>b</think>\n4", thought("a\n\nb", "4")),
        ("<think>add</think>", thought("add")),
        ("add\n</think>\n\n4", thought("add", "4")),
        ("<think>`</think>` ends it</think>4", thought("`</think>` ends it", "4")),
        ("<think>```\nx = 1</think>\n\n```\nx\n```", thought("```\nx = 1", "```\nx\n```")),
        ("<think>a</think>use `<think>`", thought("a", "use `<think>`")),
        (
            "Sure.\n<think>\nadd\n</think>\n4",
            [{"type": "text", "text": "Sure.\n"}, *thought("add", "4")],
        ),
    ],
)
def test_reasoning_becomes_a_part(content: str, structured: Any):
    message, count = structure_reply_markup(reply(content))
    assert message == reply(structured)
    assert count == content.count("</think>") - content.count("`</think>`")


@pytest.mark.parametrize(
    "content",
    [
        "plain",
        "",
        "<think>\nadd",
        "Write <think> before you answer.",
        "Write <think>so</think> and then the answer.",
        "Use `<think>` and `</think>`.",
        "```\n<think>\nadd\n</think>\n4\n```",
        "~~~xml\n<think>\nadd\n</think>",
        "The tag </think> ends it.",
        f"Write it so:\n```\n{CALL}\n```",
        f"`{CALL[:11]}` begins a call.",
        f"{CALL}\nThat was a call.",
        CALL[:-5],
        "<tool_call>f</tool_call>",
        "<tool_call>\n{'name': 'f', 'arguments': {}}\n</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call> and',
    ],
)
def test_what_only_mentions_tags_stays_text(content: str):
    message = reply(content)
    assert structure_reply_markup(message) == (message, 0)


def test_only_replies_are_read():
    message: Message = {"role": "user", "content": "<think>a</think>b"}
    assert structure_reply_markup(message) == (message, 0)
    empty: Any = {"role": "assistant", "content": None, "tool_calls": []}
    assert structure_reply_markup(empty) == (empty, 0)


def calls_of(message: Message) -> list[tuple[str, Any]]:
    calls = message.get("tool_calls", [])
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


def test_calls_at_the_end_become_tool_calls():
    message, count = structure_reply_markup(
        reply(f"<think>why</think>\nLet me see.\n{CALL}\n{CALL}")
    )
    assert count == 3
    assert message["content"] == thought("why", "Let me see.")
    assert calls_of(message) == [("f", {"a": 1}), ("f", {"a": 1})]
    message, count = structure_reply_markup(reply(CALL))
    assert (message["content"], calls_of(message), count) == ("", [("f", {"a": 1})], 1)


def test_calls_in_tags_and_calls_that_hold_the_markers():
    body = "<function=f>\n<parameter=a>\n1\n</parameter>\n"
    body += "<parameter=b>\nx\ny\n</parameter>\n</function>"
    message, _ = structure_reply_markup(reply(f"<tool_call>\n{body}\n</tool_call>"))
    assert calls_of(message) == [("f", {"a": 1, "b": "x\ny"})]
    held = {"cmd": "echo </tool_call> ``` <tool_call> </think>"}
    written = json.dumps({"name": "run", "arguments": held})
    message, count = structure_reply_markup(reply(f"Now.\n<tool_call>{written}</tool_call>"))
    assert (message["content"], calls_of(message), count) == ("Now.", [("run", held)], 1)


def test_calls_in_other_notations():
    text = '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]'
    message, count = structure_reply_markup(reply(text))
    assert (message["content"], calls_of(message), count) == ("", [("f", {"a": 1}), ("g", {})], 2)
    pairs = "<tool_call>f\n<arg_key>zip</arg_key>\n<arg_value>8001</arg_value>\n</tool_call>"
    tool: Any = {"name": "f", "parameters": {"properties": {"zip": {"type": "string"}}}}
    assert calls_of(structure_reply_markup(reply(pairs))[0]) == [("f", {"zip": 8001})]
    assert calls_of(structure_reply_markup(reply(pairs), [tool])[0]) == [("f", {"zip": "8001"})]


def test_what_is_written_twice_is_taken_out_of_the_text():
    message, count = structure_reply_markup(reply("<think>add</think>4", reasoning_content="add"))
    assert (message, count) == (reply("4", reasoning_content="add"), 1)
    other = reply("<think>add</think>4", reasoning_content="subtract")
    assert structure_reply_markup(other) == (other, 0)
    given = [{"function": {"name": "f", "arguments": '{"a":1}'}}]
    message, count = structure_reply_markup(reply(f"Now.\n{CALL}", tool_calls=given))
    assert (message, count) == (reply("Now.", tool_calls=given), 1)
    other = reply(CALL, tool_calls=[{"function": {"name": "g", "arguments": "{}"}}])
    assert structure_reply_markup(other) == (other, 0)


def test_reasoning_that_is_a_part_already_is_taken_out_of_the_text():
    part = {"type": "thinking", "thinking": "add"}
    text = {"type": "text", "text": "<think>add</think>4"}
    message, count = structure_reply_markup(reply([part, text]))
    assert (message["content"], count) == ([part, {"type": "text", "text": "4"}], 1)


@pytest.mark.parametrize(
    "content",
    [
        "<THINK>\nadd\n</THINK>\n\n4",
        '<think type="plan">\nadd\n</think>\n\n4',
        "<Think >add</Think >4",
        "add\n</THINK>\n4",
    ],
)
def test_tags_in_capitals_or_with_attributes_are_tags(content: str):
    message, count = structure_reply_markup(reply(content))
    parts = [{"type": "thinking", "thinking": "add"}, {"type": "text", "text": "4"}]
    assert (message["content"], count) == (parts, 1)


@pytest.mark.parametrize("arguments", ['"{\\"a\\": 1}"', "null", '""'])
def test_arguments_may_be_json_text_or_none(arguments: str):
    text = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
    message, count = structure_reply_markup(reply(f"{text}\n{CALL}"))
    assert count == 2
    assert calls_of(message)[0] == ("f", {"a": 1} if "a" in arguments else {})


def test_parts_are_read_as_texts_are():
    image = {"type": "image", "image": "a.png"}
    parts = [{"type": "text", "text": "<think>a</think>b"}, image, {"type": "text", "text": CALL}]
    message, count = structure_reply_markup(reply(parts))
    assert (message["content"], count) == ([*thought("a", "b"), image], 2)
    assert calls_of(message) == [("f", {"a": 1})]


def test_markup_that_remains_is_found():
    assert remaining_markup(reply("<think>\nadd")) == ["<think>"]
    assert remaining_markup(reply("Use `<think>`.")) == []
    assert remaining_markup(reply([{"type": "text", "text": CALL[:-5]}])) == ["<tool_call>"]
    assert remaining_markup(reply(None)) == []


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5"])
def test_structured_reasoning_is_trained_as_the_format_writes_it(name: str):
    renderer = FAMILIES[name].renderer
    message, _ = structure_reply_markup(reply("<think>\nadd\n</think>\n\n4"))
    conversation: list[Message] = [{"role": "user", "content": "2+2?"}, message]
    tokens = renderer.build_supervised_example(conversation)[0].to_ints()
    think, end = (renderer.encoder.control_id(tag) for tag in ("<think>", "</think>"))
    newline, add, gap, four = renderer.encoder.encode_batch(["\n", "add", "\n\n", "4"])
    expected = [think, *newline, *add, *newline, end, *gap, *four]
    start = tokens.index(int(think or 0))
    assert tokens[start : start + len(expected)] == expected
    if name == "qwen3":
        assert expected == [151667, 198, 718, 198, 151668, 271, 19]
