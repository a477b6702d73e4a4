"""Details of Gemma 4, each pinned."""

# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers import Message, ParseTermination, ToolCall

from . import checks
from .conversations import Case, fixed_cases
from .families import FAMILIES, VARIANTS

pytestmark = pytest.mark.skipif("gemma4" not in FAMILIES, reason="its tokenizer comes with npm")
QUESTION: Message = {"role": "user", "content": "q"}


def text_of(name: str, messages: Sequence[Any], *, prompt: bool = False) -> str:
    renderer = FAMILIES[name].renderer
    rendering = renderer.render_prompt(messages) if prompt else renderer.render(messages)
    return renderer.encoder.decode(rendering.tokens())


def called(name: str, arguments: str = "{}", text: str = "", call_id: str | None = None) -> Message:
    body = ToolCall.FunctionBody(name=name, arguments=arguments)
    return {
        "role": "assistant",
        "content": text,
        "tool_calls": [ToolCall(id=call_id, function=body)],
    }


def result(text: str, **fields: Any) -> Message:
    message: Any = {"role": "tool", "content": text, **fields}
    return message


def parse(name: str, markup: str) -> tuple[Message, ParseTermination]:
    renderer = FAMILIES[name].renderer
    return renderer.parse_response(renderer.encoder.encode_markup(markup))


@pytest.mark.parametrize("prompt", [False, True])
def test_preserving_equals_the_template(prompt: bool) -> None:
    family = VARIANTS["gemma4_preserve_thinking"]
    cases = fixed_cases(family)
    assert len(cases) > 100
    for case in cases:
        assert checks.parity_problem(family, case, prompt=prompt) is None
        assert checks.consistency_problem(family, case) is None


def test_text_beside_a_call_stands_before_it_as_it_is_sampled() -> None:
    talk = [QUESTION, called("f", text="Let me look."), result("1")]
    assert (
        'model\nLet me look.<|tool_call>call:f{}<tool_call|><|tool_response>response:f{value:<|"|>1'
        in text_of("gemma4", talk)
    )
    family = FAMILIES["gemma4"]
    theirs = family.renderer.encoder.decode(family.reference(talk, prompt=False))
    assert theirs.count('<|"|>}<tool_response|>Let me look.<turn|>') == 1


def test_two_replies_in_a_row_are_two_turns() -> None:
    talk: list[Message] = [QUESTION, *({"role": "assistant", "content": t} for t in "AB")]
    assert text_of("gemma4", talk).endswith("model\nA<turn|>\n<|turn>model\nB<turn|>\n")
    family = FAMILIES["gemma4"]
    theirs = family.renderer.encoder.decode(family.reference(talk, prompt=False))
    assert theirs.endswith("<|turn>model\nAB<turn|>\n")


def test_a_reply_to_a_result_closes_the_channel_that_its_prompt_opens() -> None:
    asked = [QUESTION, called("f"), result("1")]
    answer: Message = {"role": "assistant", "content": "A"}
    prompt = text_of("gemma4_thinking", asked, prompt=True)
    assert prompt.endswith("<tool_response|><|channel>thought\n")
    assert text_of("gemma4_thinking", [*asked, answer]) == prompt + "<channel|>A<turn|>\n"
    later = text_of("gemma4_thinking", [*asked, answer, QUESTION])
    assert "<tool_response|>A<turn|>\n<|turn>user" in later  # as any old reasoning is dropped
    assert text_of("gemma4", asked, prompt=True).endswith("<tool_response|>")


@pytest.mark.parametrize(
    ("markup", "thinking", "text"),
    [
        ("why\n<channel|>A<turn|>", "why", "A"),  # the prompt had opened the channel
        ("<channel|>A<turn|>", "", "A"),
        ("<|channel>thought\nwhy\n<channel|>A<turn|>", "why", "A"),
        ("<|channel>thought\n<channel|>A<turn|>", "", "A"),
        ("<|channel>thought<channel|>A<turn|>", "", "A"),
        ("<|channel>though<channel|>A<turn|>", "though", "A"),
        ("thought<turn|>", "", "thought"),
        ("A<turn|>", "", "A"),
    ],
)
def test_whether_a_reply_starts_in_the_channel(markup: str, thinking: str, text: str) -> None:
    message, termination = parse("gemma4_thinking", markup)
    parts: list[Any] = [{"type": "thinking", "thinking": thinking}] if thinking else []
    parts += [{"type": "text", "text": text}]
    assert message["content"] == (parts if thinking else text)
    assert termination is ParseTermination.STOP_SEQUENCE


def test_results_take_their_names_by_id_name_or_place() -> None:
    calls = [*called("f", call_id="a")["tool_calls"], *called("g", call_id="b")["tool_calls"]]
    asked: list[Any] = [QUESTION, {"role": "assistant", "content": "", "tool_calls": calls}]
    answers = [
        ([result("1"), result("2")], ["f", "g"]),
        ([result("1", tool_call_id="b"), result("2", tool_call_id="a")], ["g", "f"]),
        ([result("1", name="h"), result("2", tool_call_id="zz"), result("3")], ["h", "unknown"]),
    ]
    for results, names in answers:
        text = text_of("gemma4", [*asked, *results])
        found = [part.partition("{")[0] for part in text.split("<|tool_response>response:")[1:]]
        assert found[: len(names)] == names
    with pytest.raises(RendererError, match=r"messages\[1\]: a tool's result follows the reply"):
        text_of("gemma4", [QUESTION, result("1")])


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('call:f{a:<|"|>{x:1},<|"|>,b:-1.50e3}', '{"a": "{x:1},", "b": -1.50e3}'),
        ('call:f{ a : [ true , null,{b:<|"|><|"|>}] }', '{"a": [true, null, {"b": ""}]}'),
        ('call:f{<|"|>a:b<|"|>:1}', '{"a:b": 1}'),
        ("call:f{}", "{}"),
    ],
)
def test_calls_are_read_to_the_letter(body: str, arguments: str) -> None:
    message, termination = parse("gemma4", f"<|tool_call>{body}<tool_call|><|tool_response>")
    (call,) = message.get("tool_calls", [])
    assert (call.function.name, call.function.arguments) == ("f", arguments)
    assert termination is ParseTermination.STOP_SEQUENCE


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("f{}", "expected call:NAME"),
        ("call:{}", "expected call:NAME"),
        ("call:f", "expected call:NAME"),
        ("call:f{a:Zürich}", "expected a value before 'Zürich}'"),
        ('call:f{a:"Zürich"}', 'must be in <|"|>, not in quotes'),
        ('call:f{a:<|"|>open}', "a text is not closed"),
        ("call:f{a:1", "expected ',' or '}'"),
        ("call:f{a}", "expected a key and ':'"),
        ("call:f{a:1,a:2}", "'a' is given twice"),
        ("call:f{} more", "something follows"),
        ("call:f{a:[1}", "expected ',' or ']'"),
        ("call:f" + "{a:" * 5000, "recursion"),
    ],
)
def test_malformed_calls_come_back_with_the_reason(body: str, reason: str) -> None:
    message, _ = parse("gemma4", f"<|tool_call>{body}<tool_call|><|tool_response>")
    (call,) = message.get("unparsed_tool_calls", [])
    assert reason in call.error
    assert call.raw_text == f"<|tool_call>{body}<tool_call|>"
    assert not message.get("tool_calls")


def test_declarations_of_any_schema_equal_the_template() -> None:
    schema: Any = {
        "type": "object",
        "properties": {
            "Z": {"type": "string", "enum": ["x", "é"], "nullable": True, "description": "d"},
            "a": {"type": "array", "items": {"type": "string", "description": "one", "x": None}},
            "b": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"k": {"type": "integer"}},
                    "required": ["k"],
                    "additionalProperties": {"y": [1, True, 2.5, {"q": "r"}]},
                },
            },
            "c": {"type": "object", "properties": {"d": {"type": "number"}}, "required": ["d"]},
            "e": {"type": "object", "minProperties": {"type": "string"}, "extra": 3, "more": "x"},
            "f": {"type": ["string", "null"]},
            "g": {"type": "array", "items": {"type": ["string", "null"]}},
            "h": {},
            "i": {"type": "array", "items": {}},
            "j": {"type": "object", "properties": {}},
        },
        "required": ["a", "Z"],
    }
    for parameters in (schema, {}, {"type": "object"}, {"properties": {"a": {"type": "string"}}}):
        tool: Any = {"name": "t", "description": " Does. ", "parameters": parameters}
        case = Case("", [QUESTION], (tool, tool))
        assert checks.parity_problem(FAMILIES["gemma4"], case, prompt=True) is None


def test_without_thinking_reasoning_is_dropped_and_not_trained() -> None:
    renderer = FAMILIES["gemma4"].renderer
    thought: Any = {
        "role": "assistant",
        "content": [{"type": "thinking", "thinking": "r"}, {"type": "text", "text": "A"}],
    }
    assert text_of("gemma4", [QUESTION, thought]).endswith("<|turn>model\nA<turn|>\n")
    with pytest.raises(RendererError, match=r"messages\[1\]: a reply with thinking cannot"):
        renderer.build_supervised_example([QUESTION, thought])
    text = text_of("gemma4_thinking", [QUESTION, thought])
    assert text.startswith("<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nq<turn|>")
    assert text.endswith("<|turn>model\n<|channel>thought\nr\n<channel|>A<turn|>\n")
