"""Reading answers: reasoning, tool calls, stops, characters of several tokens; in any pieces."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.assets import tokenizer_folder
from tinker_cookbook.local.openai_api.codec import StopCutter, TextCodec, TextStream
from tinker_cookbook.local.openai_api.reply import ReplyReader, split_reasoning

_CUTS = st.lists(
    st.sampled_from(
        [
            *("<tool_call>", "</tool_call>", "<think>", "</think>", "\n", " ", "a", '"', "{", "}"),
            *("[TOOL_CALLS]", "[ARGS]", '{"name": "f", "arguments": {', "}}", '"a": "', '"b"'),
            *("<function=f>\n", "<parameter=a>\n", "\n</parameter>\n", "</function>", "; "),
            *("<|python_tag|>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "f"),
        ]
    ),
    max_size=16,
).map("".join)


def read(text: str, *, size: int, thinking: bool = False, tools: tuple[str, ...] = ("f", "g")):
    """(reasoning, content, [(name, arguments)]) of a text that comes in pieces of some size."""
    reader = ReplyReader(starts_in_thinking=thinking, tool_names=tools)
    pieces = [
        piece for at in range(0, len(text), size) for piece in reader.push(text[at : at + size])
    ]
    pieces += reader.finish()
    joined = {"reasoning": "", "content": ""}
    calls = []
    for piece in pieces:
        if piece.kind == "tool_call":
            function = piece.call["function"]
            calls.append((function["name"], json.loads(function["arguments"])))
        else:
            joined[piece.kind] += piece.text
    return joined["reasoning"], joined["content"], calls


CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
CODER = (
    "<tool_call>\n<function=g>\n<parameter=path>\na\nb\n</parameter>\n<parameter=n>\n3\n"
    "</parameter>\n</function>\n</tool_call>"
)


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("text", "thinking", "want"),
    [
        ("plain <b>text</b>\n", False, ("", "plain <b>text</b>\n", [])),
        ("<think>\nwhy\n</think>\n\nso", False, ("why", "so", [])),
        ("why\n</think>\n\nso", True, ("why", "so", [])),
        ("never ends", True, ("never ends", "", [])),
        ("a < b, <thin", False, ("", "a < b, <thin", [])),
        (f"Look:\n{CALL}", False, ("", "Look:", [("f", {"x": 1})])),
        (f"Look:\n\n{CALL}\n{CALL}\nSo.", False, ("", "Look:\n\nSo.", [("f", {"x": 1})] * 2)),
        (f"{CALL}\nSo.", False, ("", "So.", [("f", {"x": 1})])),
        (f"{CALL}\n{CODER}", False, ("", "", [("f", {"x": 1}), ("g", {"path": "a\nb", "n": 3})])),
        (f"<think>t</think>{CALL}", False, ("t", "", [("f", {"x": 1})])),
        ("<tool_call>no json</tool_call>", False, ("", "<tool_call>no json</tool_call>", [])),
        ('{"name": "f", "parameters": {"x": 2}}', False, ("", "", [("f", {"x": 2})])),
        ('{"name": "other"}', False, ("", '{"name": "other"}', [])),
        ('[TOOL_CALLS]f[ARGS]{"x": 3}', False, ("", "", [("f", {"x": 3})])),
        ('[TOOL_CALLS][{"name": "f", "arguments": {}}]', False, ("", "", [("f", {})])),
    ],
)
def test_answers_are_taken_apart(text: str, thinking: bool, want: tuple, size: int) -> None:
    assert read(text, size=size, thinking=thinking) == want


def tagged(*lines: str) -> str:
    return "<tool_call>\n" + "".join(f"{line}\n" for line in lines) + "</tool_call>"


UNCLOSED = tagged("<function=f>", "<parameter=body>", '{"a": 1}', "</function>")
NESTED = "x </function> y\n</function>\n</tool_call>\nz"
BROKEN = '<tool_call>{"name": "f", "arguments": {"cmd": "echo }}</tool_call>'


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "want"),
    [
        ('<|python_tag|>{"name": "f", "parameters": {"a": 1}}', ("", "", [("f", {"a": 1})])),
        (
            '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
            ("", "", [("f", {"a": 1}), ("g", {})]),
        ),
        (
            tagged("<function=f>", "<parameter=a>", "1", "</parameter>", "</function>")[:-12]
            + "<function=g>\n</function>\n</tool_call>",
            ("", "", [("f", {"a": 1}), ("g", {})]),
        ),
        (UNCLOSED, ("", UNCLOSED, [])),
        (
            tagged("<function=f>", "<parameter=a>", NESTED, "</parameter>", "</function>"),
            ("", "", [("f", {"a": NESTED})]),
        ),
        (f"{UNCLOSED}\n{CALL}", ("", UNCLOSED, [("f", {"x": 1})])),
        (f"{UNCLOSED}\n{CODER}", ("", UNCLOSED, [("g", {"path": "a\nb", "n": 3})])),
        (
            '<tool_call>{"name": "f", "arguments": {"cmd": "echo </tool_call>"}}</tool_call>',
            ("", "", [("f", {"cmd": "echo </tool_call>"})]),
        ),
        (f"a\n{BROKEN}\n{CALL} b", ("", f"a\n{BROKEN} b", [("f", {"x": 1})])),
        (CALL.replace("1", "NaN"), ("", CALL.replace("1", "NaN"), [])),
        (CALL.replace('"f"', '"h"'), ("", CALL.replace('"f"', '"h"'), [])),
        (
            f"<tool_call>[{CALL[12:-13]}, {CALL[12:-13]}]</tool_call>",
            ("", "", [("f", {"x": 1}), ("f", {"x": 1})]),
        ),
        ('[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"x": "[TOOL_CALLS]"}[TOOL_CALLS]g[ARGS]{}',
            ("", "", [("f", {"x": "[TOOL_CALLS]"}), ("g", {})])),
        (
            "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value></tool_call></arg_value>\n</tool_call>",
            ("", "", [("f", {"a": "</tool_call>"})]),
        ),
        ('{"name": "f", "parameters": {}} so', ("", '{"name": "f", "parameters": {}} so', [])),
        (' \n<think>\nso</think>\n\n{"name": "g", "parameters": {}}', ("so", "", [("g", {})])),
        ("<|python_tag|>\n<think>so", ("", "<|python_tag|>\n<think>so", [])),
        ("Use <think> and </think>.", ("", "Use <think> and </think>.", [])),
        ("a\n\n<tool_call>", ("", "a\n\n<tool_call>", [])),
    ],
)  # fmt: skip
def test_calls_are_read_for_sure_or_stay_text(text: str, want: tuple, size: int) -> None:
    assert read(text, size=size) == want


SCHEMA = {"zip": {"type": "string"}, "n": {"type": "integer"}, "on": {"type": "boolean"}}
TOOL = {"function": {"name": "f", "parameters": {"type": "object", "properties": SCHEMA}}}


@pytest.mark.parametrize(
    "text",
    [
        tagged(
            *("<function=f>", "<parameter=zip>", "90210", "</parameter>", "<parameter=n>", "3"),
            *("</parameter>", "<parameter=on>", "True", "</parameter>", "</function>"),
        ),
        "<tool_call>f" + "".join(
            f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>"
            for key, value in (("zip", "90210"), ("n", "3"), ("on", "true"))
        ) + "</tool_call>",
    ],
)  # fmt: skip
def test_arguments_have_the_types_that_their_tool_declares(text: str) -> None:
    reader = ReplyReader(starts_in_thinking=False, tools=[TOOL])
    (piece,) = [*reader.push(text), *reader.finish()]
    arguments = json.loads(piece.call["function"]["arguments"])
    assert arguments == {"zip": "90210", "n": 3, "on": True}


def test_a_word_alone_is_a_call_of_a_declared_tool_only() -> None:
    reader = ReplyReader(starts_in_thinking=False, tools=[TOOL])
    pieces = [*reader.push("<tool_call>f</tool_call><tool_call>g</tool_call>"), *reader.finish()]
    assert [piece.kind for piece in pieces] == ["tool_call", "content"]


def test_arguments_in_json_are_kept_to_the_letter() -> None:
    reader = ReplyReader(starts_in_thinking=False, tools=[TOOL])
    source = '{"n":  1.50, "zip": 90210, "é": "\\u00fc"}'
    (piece,) = reader.push(f'<tool_call>{{"name": "f", "arguments": {source}}}</tool_call>')
    assert piece.call["function"]["arguments"] == source


def test_marks_that_are_tokens_are_told_from_letters() -> None:
    marks = ("<tool_call>", "</tool_call>")
    reader = ReplyReader(starts_in_thinking=False, tool_names=["f"], token_marks=marks)
    pieces = [*reader.push(CALL), *reader.mark(marks[0]), *reader.push(CALL[12:-13])]
    pieces += [*reader.mark(marks[1]), *reader.finish()]
    assert [piece.kind for piece in pieces] == ["content", "tool_call"]
    assert pieces[0].text == CALL


def test_without_tools_calls_stay_text() -> None:
    assert read(CALL, size=3, tools=()) == ("", CALL, [])


@given(st.text(alphabet="<>/think_tool_call{}\n ab", max_size=60), st.integers(1, 7))
def test_the_pieces_do_not_matter(text: str, size: int) -> None:
    assert read(text, size=size) == read(text, size=1000)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(_CUTS, st.integers(1, 9))
def test_the_pieces_of_markup_do_not_matter(text: str, size: int) -> None:
    want = read(text, size=1000)
    assert read(text, size=size) == want
    reasoning, content, calls = want
    if not calls:  # no letter is lost but for marks of reasoning and newlines
        said = Counter((reasoning + content).replace("\n", ""))
        lost = Counter(text.replace("\n", "")) - said
        assert not lost - Counter("<think></think> " + " " * len(text))


@given(st.text(alphabet="abc", max_size=40), st.integers(1, 5))
def test_a_stop_cuts_at_its_first_place(text: str, size: int) -> None:
    stops = ("ab", "ca")
    cutter = StopCutter(stops)
    shown = "".join(cutter.push(text[at : at + size]) for at in range(0, len(text), size))
    shown += cutter.finish()
    starts = [text.find(stop) for stop in stops if stop in text]
    assert shown == text[: min(starts, default=len(text))]
    assert (cutter.found is None) == (not starts)


def test_split_reasoning_of_a_message() -> None:
    assert split_reasoning("<think>\nwhy\n</think>\n\nso") == ("why", "so")
    assert split_reasoning("no </think> here") == (None, "no </think> here")


@pytest.mark.parametrize("family", ["qwen3", "smollm2"])
def test_text_comes_out_as_it_was(family: str) -> None:
    codec = TextCodec(Path(tokenizer_folder(family)))
    text = "Zwölf 🎈🎈 你好 boxers.\n\n  def f(x):\n"
    tokens = codec.encode_text(text)
    stream = TextStream(codec)
    assert "".join(map(stream.push, tokens)) + stream.finish() == text
    assert b"".join(bytes(codec.token_bytes(token)) for token in tokens) == text.encode()
    stream = TextStream(codec)
    half = next(n for n in range(len(tokens)) if "🎈" in codec.decode(tokens[:n]))
    cut = "".join(map(stream.push, tokens[: half - 1])) + stream.finish()
    assert "Zwölf" in cut, "a character that is never completed does not stop the text"
