"""Replies: any tokens parse, nothing raises, no text is lost, streaming gives the same result."""

# pyright: reportArgumentType=false

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinker_cookbook.renderers import (
    Message,
    ParseFailureKind,
    ParseTermination,
    StreamingMessageHeader,
    StreamingTextDelta,
    StreamingThinkingDelta,
    classify_parse_failure,
    format_content_as_string,
)
from tinker_cookbook.renderers.base import UNTERMINATED_TOOL_BLOCK_ERROR

from .families import FAMILIES, Family
from .kinship import distinct

FAMILY_NAMES = sorted(FAMILIES)
_SETTINGS = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def encode(family: Family, markup: str) -> list[int]:
    """Return the tokens of a reply whose markers are control tokens."""
    return family.renderer.encoder.encode_markup(markup)


def parse(family_name: str, markup: str) -> tuple[Message, ParseTermination]:
    family = FAMILIES[family_name]
    return family.renderer.parse_response(encode(family, markup))


THOUGHT = {"type": "thinking", "thinking": "because"}
ANSWER = {"type": "text", "text": "yes"}


@pytest.mark.parametrize(
    ("markup", "content", "termination"),
    [
        ("yes<|im_end|>", "yes", "stop_sequence"),
        ("yes", "yes", "malformed"),
        ("<|im_end|>", "", "stop_sequence"),
        ("", "", "malformed"),
        ("yes<|endoftext|>", "yes", "eos"),
        ("yes<|im_end|><|im_end|>", "yes", "stop_sequence"),
        ("<think>\n\n</think>\n\nyes<|im_end|>", "yes", "stop_sequence"),
        ("<think>\nbecause\n</think>\n\nyes<|im_end|>", [THOUGHT, ANSWER], "stop_sequence"),
        ("<think>because</think>yes<|im_end|>", [THOUGHT, ANSWER], "stop_sequence"),
        ("<think>\nbecause", [THOUGHT], "malformed"),
        ("<think>\nbecause<|im_end|>", [THOUGHT], "stop_sequence"),
        ("yes</think>", "yes</think>", "malformed"),
        ("yes<|im_start|>user", "yes<|im_start|>user", "malformed"),
        ("\n\nyes \n<|im_end|>", "\n\nyes \n", "stop_sequence"),
    ],
)
def test_shapes_of_a_qwen3_reply(markup: str, content: Any, termination: str) -> None:
    message, end = parse("qwen3", markup)
    assert message == {"role": "assistant", "content": content}
    assert end == termination
    assert end.is_clean == (termination != "malformed")
    assert end.is_stop_sequence == (termination == "stop_sequence")


def test_text_after_the_end_is_kept_apart() -> None:
    message, end = parse("qwen3", "yes<|im_end|>\n<|im_start|>user\nmore")
    assert end is ParseTermination.MALFORMED
    assert message["content"] == "yes"
    assert message.get("trailing_text") == "\n<|im_start|>user\nmore"


def test_an_opened_think_block_is_read_from_its_middle() -> None:
    message, _ = parse("qwen3_thinking_2507", "because\n</think>\n\nyes<|im_end|>")
    assert message["content"] == [THOUGHT, ANSWER]


def test_typed_markers_are_text() -> None:
    family = FAMILIES["qwen3"]
    typed = "<think>a</think> <tool_call>{}</tool_call> <|im_end|>"
    tokens = family.renderer.encoder.encode_batch([typed])[0]
    message, end = family.renderer.parse_response([*tokens, *encode(family, "<|im_end|>")])
    assert message["content"] == typed
    assert end is ParseTermination.STOP_SEQUENCE


@pytest.mark.parametrize("family_name", ["qwen2_5", "qwen3", "qwen3_instruct"])
def test_tool_calls(family_name: str) -> None:
    message, end = parse(
        family_name,
        'Wait.\n<tool_call>\n{"name": "f", "arguments": {"a":  1.50, "é": "ü\\u00fc"}}\n'
        '</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call><|im_end|>',
    )
    assert end is ParseTermination.STOP_SEQUENCE
    assert message["content"] == "Wait."
    calls = message.get("tool_calls", [])
    assert [call.function.name for call in calls] == ["f", "g"]
    assert calls[0].function.arguments == '{"a":  1.50, "é": "ü\\u00fc"}'  # unchanged


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"name": "f", "arguments": {"a": 1}', "not valid JSON"),
        ('{"name": "f", "arguments": "{}"}', "'arguments' is not a JSON object"),
        ('{"arguments": {}}', "'name' is missing"),
        ("[1]", "expected a JSON object, got list"),
        ('{"name": "f", "arguments": {}, "extra": 1}', "unknown keys ['extra']"),
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_malformed_calls_come_back_with_the_reason(body: str, reason: str) -> None:
    message, _ = parse("qwen3", f"a\n<tool_call>{body}</tool_call><|im_end|>")
    (call,) = message.get("unparsed_tool_calls", [])
    assert call.raw_text == f"<tool_call>{body}</tool_call>"
    assert reason in call.error
    assert "tool_calls" not in message
    failure = classify_parse_failure(message, ParseTermination.STOP_SEQUENCE)
    assert failure is not None
    assert failure[0] is ParseFailureKind.CONTENT


def test_an_unterminated_call_is_kept() -> None:
    message, end = parse("qwen3", 'a<tool_call>\n{"name": "f"')
    (call,) = message.get("unparsed_tool_calls", [])
    assert (call.raw_text, call.error) == (
        '<tool_call>\n{"name": "f"',
        UNTERMINATED_TOOL_BLOCK_ERROR,
    )
    failure = classify_parse_failure(message, end)
    assert failure is not None
    assert failure[0] is ParseFailureKind.STRUCTURAL


def test_an_unparsed_call_renders_back_to_its_tokens() -> None:
    family = FAMILIES["qwen3_instruct"]
    reply = encode(family, "a\n<tool_call>\n{broken\n</tool_call><|im_end|>")
    message, _ = family.renderer.parse_response(reply)
    messages: list[Message] = [{"role": "user", "content": "q"}, message]
    model_input, weights = family.renderer.build_supervised_example(messages)
    tokens = model_input.to_ints()
    assert [t for t, w in zip(tokens, weights, strict=True) if w] == reply


@pytest.mark.parametrize(
    ("text", "is_call"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', True),
        ('{"name": "f", "parameters": {"a": 1}', False),
        ('{"name": "Bob"}', False),
        ('{"name": "f", "parameters": {}} and more', False),
        ('Use {"name": "f", "parameters": {}}', False),
        ('{"n', False),
    ],
)
def test_llama_calls_are_replies_that_are_one_json_object(text: str, is_call: bool) -> None:
    message, _ = parse("llama3_1", f"{text}<|eot_id|>")
    assert bool(message.get("tool_calls")) == is_call
    assert message["content"] == ("" if is_call else text)
    assert parse("llama3", f"{text}<|eot_id|>")[0]["content"] == text  # 3.0 has no calls


_CALL = '{"name": "f", "parameters": {"a": 1}}'


@pytest.mark.parametrize(
    ("markup", "num_calls"),
    [
        (f"<|python_tag|>{_CALL}", 1),
        (f"{_CALL}; {_CALL}", 2),
        (_CALL.replace(", ", ",\n"), 0),
        (f"{_CALL};{_CALL}", 0),
        ("<|python_tag|>print(1)", 0),
        (f"Now.<|python_tag|>{_CALL}", 0),
        (_CALL.replace("1", "NaN"), 0),
    ],
)
def test_llama_replies_that_are_calls_alone(markup: str, num_calls: int) -> None:
    renderer = FAMILIES["llama3_1"].renderer
    reply = encode(FAMILIES["llama3_1"], f"{markup}<|eot_id|>")
    message, end = renderer.parse_response(reply)
    assert end is ParseTermination.STOP_SEQUENCE
    assert len(message.get("tool_calls", [])) == num_calls
    assert message["content"] == ("" if num_calls else markup)
    if "python_tag" not in markup:  # the call keeps nothing of it
        asked: list[Message] = [{"role": "user", "content": "q"}, message]
        tokens, weights = renderer.build_supervised_example(asked)
        pairs = zip(tokens.to_ints(), weights, strict=True)
        assert [token for token, weight in pairs if weight] == reply


@pytest.mark.parametrize("text", [_CALL, f"{_CALL}; {_CALL}"])
def test_json_is_no_call_where_no_tool_is_declared(text: str) -> None:
    renderer = FAMILIES["llama3_1"].renderer
    message, _ = renderer.parse_response(encode(FAMILIES["llama3_1"], f"{text}<|eot_id|>"))
    assert renderer.fit_tool_calls(message, []) == {"role": "assistant", "content": text}
    tool: Any = {"name": "f", "description": "", "parameters": {}}
    assert renderer.fit_tool_calls(message, [tool]) == message


def _block(*bodies: str) -> str:
    return "<tool_call>\n" + "\n".join(bodies) + "\n</tool_call>"


def _function(name: str, value: str) -> str:
    return f"<function={name}>\n<parameter=a>\n{value}\n</parameter>\n</function>"


@pytest.mark.parametrize("family_name", ["qwen3_5", "qwen3_6", "nemotron3", "nemotron3_ultra"])
def test_two_functions_in_a_block_are_two_calls(family_name: str) -> None:
    body = _block(_function("f", "1"), _function("g", "x"))
    message, _ = parse(family_name, f"</think>\n\n{body}\n<|im_end|>")
    calls = message.get("tool_calls", [])
    assert [call.function.name for call in calls] == ["f", "g"]
    assert [call.function.arguments for call in calls] == ['{"a": 1}', '{"a": "x"}']


@pytest.mark.parametrize("value", ["true", "null", "True", "None", "1.50", "[true]", " x", "NaN"])
@pytest.mark.parametrize("family_name", ["qwen3_5", "qwen3_6", "nemotron3", "nemotron3_ultra"])
def test_bare_values_are_written_again_by_the_same_tokens(family_name: str, value: str) -> None:
    renderer = FAMILIES[family_name].renderer
    gap = "" if family_name == "nemotron3_ultra" else "\n"
    is_nemotron = family_name.startswith("nemotron3")
    before, end = ("\n", "\n") if is_nemotron else ("\n\n", "")
    markup = f"why{gap}</think>{before}{_block(_function('f', value))}{end}<|im_end|>"
    reply = encode(FAMILIES[family_name], markup)
    message, _ = renderer.parse_response(reply)
    assert len(message.get("tool_calls", [])) == 1
    asked: list[Message] = [{"role": "user", "content": "q"}, message]
    tokens, weights = renderer.build_supervised_example(asked)
    pairs = zip(tokens.to_ints(), weights, strict=True)
    assert [token for token, weight in pairs if weight] == reply


@pytest.mark.parametrize("family_name", ["llama3", "llama3_1"])
def test_llama_ends(family_name: str) -> None:
    for marker, end in [("<|eot_id|>", "stop_sequence"), ("<|end_of_text|>", "eos")]:
        assert parse(family_name, f"x{marker}")[1] == end


# ---- any tokens ----


@st.composite
def replies(draw: st.DrawFn, family: Family) -> list[int]:
    """Draw tokens: random ids, text cut anywhere, and control tokens in any order."""
    encoder = family.renderer.encoder
    control = [*sorted(family.tokenizer.get_added_vocab().values())][:40]
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    pieces = st.one_of(
        st.sampled_from(control).map(lambda token: [token]),
        st.lists(st.integers(0, len(family.tokenizer) + 5), max_size=4),
        text.map(lambda t: encoder.encode_batch([t])[0]),
        st.sampled_from(
            ["\n", "\n\n", "日本", '{"name": "f", "arguments": {}}', '{"name": "f", ', "<think>"]
        ).map(lambda t: encoder.encode_batch([t])[0]),
        st.sampled_from(
            [
                "<think>\na\n</think>\n\n",
                '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
            ]
        ).map(encoder.encode_markup),
    )
    if family.reply:
        pieces = st.one_of(pieces, st.just(encoder.encode_markup(family.reply)))
    tokens = [token for piece in draw(st.lists(pieces, max_size=8)) for token in piece]
    return tokens[: draw(st.integers(0, len(tokens)))]


def everything(family: Family, message: Message) -> str:
    """Return all text of a parsed message without valid calls."""
    unparsed = [call.raw_text for call in message.get("unparsed_tool_calls", [])]
    content = format_content_as_string(message["content"], separator="")
    return "".join([content, *unparsed, message.get("trailing_text", "")])


def stream(family: Family, cuts: Sequence[Sequence[int]]) -> tuple[list[Any], Message, Any]:
    parser = family.renderer.response_parser()
    deltas = [delta for cut in cuts for delta in parser.feed(cut)]
    deltas += parser.finish()
    return deltas, *parser.result()


def added_up(deltas: list[Any]) -> list[tuple[str, str]]:
    """Return (kind, text) of each content part, from the deltas alone."""
    parts: list[list[str]] = []
    for delta in deltas:
        is_text = isinstance(delta, StreamingTextDelta)
        if delta.content_index == len(parts):
            parts.append(["text" if is_text else "thinking", ""])
        assert delta.content_index == len(parts) - 1
        parts[-1][1] += delta.text if is_text else delta.thinking
    return [(kind, text) for kind, text in parts]


def parts_of(message: Message) -> list[tuple[str, str]]:
    content: Any = message["content"]
    if isinstance(content, str):
        return [("text", content)] if content else []
    return [(part["type"], part[part["type"]]) for part in content]


@pytest.mark.parametrize("family_name", distinct(FAMILY_NAMES))
@_SETTINGS
@given(data=st.data())
def test_any_tokens_parse_and_stream_alike_and_keep_their_text(
    family_name: str, data: st.DataObject
) -> None:
    family = FAMILIES[family_name]
    tokens = data.draw(replies(family))
    message, termination = family.renderer.parse_response(tokens)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=6)))
    bounds = [0, *cuts, len(tokens)]
    bites = [tokens[a:b] for a, b in pairwise(bounds)]
    for split in (bites, [[token] for token in tokens]):
        deltas, streamed, end = stream(family, split)
        assert (streamed, end) == (message, termination)
        assert added_up(deltas) == parts_of(message)
    if not message.get("tool_calls"):  # a valid call keeps only its name and arguments
        missing = typed_characters(family, tokens) - Counter(everything(family, message))
        missing -= Counter(family.header_words * len(tokens))
        assert not missing


def typed_characters(family: Family, tokens: list[int]) -> Counter[str]:
    """Count the characters between control tokens; newlines may belong to the format."""
    encoder = family.renderer.encoder
    runs = groupby(tokens, key=encoder.is_control)
    text = "".join(encoder.decode(list(run)) for is_control, run in runs if not is_control)
    return Counter(text.replace("\n", ""))


@pytest.mark.parametrize("family_name", FAMILY_NAMES)
def test_a_reply_cut_at_every_token(family_name: str) -> None:
    family = FAMILIES[family_name]
    markup = "Hi 日本 👩‍👧<|im_end|>"
    if family.reply:
        markup = family.reply
    elif family.trims:
        markup = '{"name": "f", "parameters": {"a": "日"}}<|eot_id|>'
    elif family.has_tools:
        markup = (
            "<think>\nwell 日本\n</think>\n\nHi 👩‍👧\n<tool_call>\n"
            '{"name": "f", "arguments": {"a": "日"}}\n</tool_call><|im_end|>'
        )
    tokens = encode(family, markup)
    for length in range(len(tokens) + 1):
        message, end = family.renderer.parse_response(tokens[:length])
        deltas, streamed, streamed_end = stream(family, [[t] for t in tokens[:length]])
        assert (streamed, streamed_end) == (message, end)
        assert added_up(deltas) == parts_of(message)
        assert end.is_clean == (length == len(tokens))


def test_streaming_starts_with_a_header_and_ends_with_the_message() -> None:
    family = FAMILIES["qwen3"]
    tokens = encode(family, "<think>\nwhy\n</think>\n\nyes<|im_end|>")
    items = list(family.renderer.parse_response_streaming(tokens))
    assert items[0] == StreamingMessageHeader(role="assistant")
    assert items[-1] == family.renderer.parse_response(tokens)[0]
    assert StreamingThinkingDelta("why", 0) in items
    assert StreamingTextDelta("yes", 1) in items
