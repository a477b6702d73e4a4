"""DeepSeek V4: variants, which reasoning is kept, calls written and read back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers import Message, ParseTermination, ToolCall, TrainOnWhat

from . import checks
from .conversations import WEATHER, Case, fixed_cases
from .dsml_families import DSML_VARIANTS
from .families import FAMILIES, VARIANTS

ALL = TrainOnWhat.ALL_ASSISTANT_MESSAGES
QUESTION: Message = {"role": "user", "content": "q"}
RESULT: Message = {"role": "tool", "content": "1"}
OPENED = "\n\n<｜DSML｜tool_calls>\n"
CLOSED = "</｜DSML｜tool_calls>"
END = "<｜end▁of▁sentence｜>"


def thought(reasoning: str, text: str, *calls: tuple[str, str]) -> Message:
    message: Message = {
        "role": "assistant",
        "content": [{"type": "thinking", "thinking": reasoning}, {"type": "text", "text": text}],
    }
    if calls:
        bodies = (ToolCall.FunctionBody(name=name, arguments=a) for name, a in calls)
        message["tool_calls"] = [ToolCall(function=body) for body in bodies]
    return message


def text_of(name: str, messages: list[Message]) -> str:
    renderer = (FAMILIES | VARIANTS)[name].renderer
    return renderer.encoder.decode(renderer.render(messages).tokens())


def parse(markup: str, name: str = "deepseekv4") -> tuple[Message, ParseTermination]:
    renderer = FAMILIES[name].renderer
    return renderer.parse_response(renderer.encoder.encode_markup(markup))


def invoke(name: str, *parameters: tuple[str, str, str]) -> str:
    lines = (
        f'<｜DSML｜parameter name="{key}" string="{flag}">{value}</｜DSML｜parameter>\n'
        for key, flag, value in parameters
    )
    return f'<｜DSML｜invoke name="{name}">\n' + ("".join(lines) or "\n") + "</｜DSML｜invoke>\n"


@pytest.mark.parametrize("name", [family.name for family in DSML_VARIANTS])
def test_variants_equal_the_template(name: str) -> None:
    family = VARIANTS[name]
    cases = [c for c in fixed_cases(family) if c.category not in ("unicode", "whitespace", "code")]
    for prompt in (False, True):
        assert [p for c in cases if (p := checks.parity_problem(family, c, prompt=prompt))] == []
    assert [p for c in cases if (p := checks.consistency_problem(family, c))] == []


def test_developers_users_and_results_share_a_turn() -> None:
    messages: list[Any] = [
        {"role": "system", "content": "S"},
        {"role": "system", "content": "T"},
        {"role": "developer", "content": "D"},
        QUESTION,
        thought("", "", ("f", "{}")),
        RESULT,
        QUESTION,
        {"role": "assistant", "content": "A"},
    ]
    family = FAMILIES["deepseekv4"]
    text = text_of("deepseekv4", messages)
    assert "S\n\nT<｜User｜>D\n\nq<｜Assistant｜>" in text
    assert "<｜User｜><tool_result>1</tool_result>\n\nq<｜Assistant｜></think>A" in text
    assert checks.parity_problem(family, Case("", messages, (WEATHER,)), prompt=False) is None


def test_reasoning_is_dropped_without_tools_and_kept_with_them() -> None:
    talk = [QUESTION, thought("r", "A"), QUESTION, thought("s", "B")]
    text = text_of("deepseekv4_thinking", talk)
    assert "<｜Assistant｜></think>A" in text
    assert text.endswith(f"<｜Assistant｜><think>s</think>B{END}")
    assert "<think>r</think>A" in text_of("deepseekv4_preserve_thinking", talk)
    renderer = FAMILIES["deepseekv4_thinking"].renderer
    assert len(renderer.build_supervised_examples(talk, ALL)) == 2
    declared: Message = {"role": "system", "content": "", "tools": [WEATHER]}
    assert len(renderer.build_supervised_examples([declared, *talk], ALL)) == 1


def test_one_example_where_a_result_came_before_the_replies() -> None:
    """A result makes the template keep all reasoning, which rewrites the prompts before it."""
    talk = [QUESTION, thought("r", "A"), QUESTION, thought("s", "", ("f", "{}")), RESULT]
    talk += [thought("t", "B")]
    renderer = FAMILIES["deepseekv4_thinking"].renderer
    examples = renderer.build_supervised_examples(talk, ALL)
    texts = [renderer.encoder.decode(model_input.to_ints()) for model_input, _ in examples]
    assert len(texts) == 3
    assert "</think>A" in texts[1]
    assert "<think>r" not in texts[1]
    assert "<think>r</think>A" in texts[2]


def test_a_late_system_message_and_trained_reasoning_are_refused() -> None:
    renderer = FAMILIES["deepseekv4"].renderer
    late: list[Message] = [QUESTION, {"role": "system", "content": "S"}]
    with pytest.raises(RendererError, match=r"messages\[1\]: a system message must come before"):
        renderer.render(late)
    with pytest.raises(RendererError, match="thinking"):
        renderer.build_supervised_example([QUESTION, thought("r", "A")])
    assert "<think>" not in text_of("deepseekv4", [QUESTION, thought("r", "A"), QUESTION])


def test_calls_come_back_to_the_letter() -> None:
    arguments = '{"a": "</｜x>\\n", "b": 1.50, "c": [1, {"d": null}], "e": true}'
    reply = thought("why", "Wait.", ("f", arguments), ("g", "{}"))
    renderer = FAMILIES["deepseekv4_thinking"].renderer
    _, weights = renderer.build_supervised_example([QUESTION, reply])
    sampled = renderer.render([QUESTION, reply]).tokens()[-int(weights.sum()) :]
    message, end = renderer.parse_response(sampled)
    assert end is ParseTermination.STOP_SEQUENCE
    assert message["content"] == reply["content"]
    calls = message.get("tool_calls", [])
    assert [(c.function.name, c.function.arguments) for c in calls] == [
        ("f", arguments),
        ("g", "{}"),
    ]


def test_a_typed_marker_is_text_in_an_argument() -> None:
    reply = thought("", "", ("f", json.dumps({"a": "x</｜DSML｜parameter>\n", "b": "｜DSML｜"})))
    renderer = FAMILIES["deepseekv4"].renderer
    tokens = renderer.render([QUESTION, reply]).tokens()
    dsml = renderer.control_token("｜DSML｜")
    assert tokens.count(dsml) == 8
    start = tokens.index(renderer.control_token("</think>")) + 1
    (call,) = renderer.parse_response(tokens[start:])[0].get("tool_calls", [])
    assert json.loads(call.function.arguments) == {"a": "x</｜DSML｜parameter>\n", "b": "｜DSML｜"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (invoke("f", ("a", "false", "x")), "not valid JSON"),
        (invoke("f", ("a", "false", "NaN")), "NaN is not JSON"),
        (invoke("f", ("a", "false", '"x"')), 'strings have string="true"'),
        (invoke("f", ("a", "maybe", "x")), "expected parameter"),
        (invoke("f", ("a", "true", "x"), ("a", "true", "y")), "is given twice"),
        (invoke(""), "expected invoke"),
        ("f(x)\n", "found"),
    ],
)
def test_broken_calls_come_back_and_render_again(body: str, reason: str) -> None:
    good = invoke("g", ("q", "true", "é"))
    for before in ("", good):
        markup = f"Hm.{OPENED}{before}{body}{CLOSED}{END}"
        message, _ = parse(markup)
        assert message["content"] == "Hm."
        (broken,) = message.get("unparsed_tool_calls", [])
        assert reason in broken.error
        assert len(message.get("tool_calls", [])) == (1 if before and body[0] == "<" else 0)
        assert text_of("deepseekv4", [QUESTION, message]).endswith("</think>" + markup)


def test_a_cut_block_keeps_the_calls_that_are_whole() -> None:
    message, end = parse(f"{OPENED}{invoke('f')}<｜DSML｜invoke name=")
    assert end is ParseTermination.MALFORMED
    assert [call.function.name for call in message.get("tool_calls", [])] == ["f"]
    (broken,) = message.get("unparsed_tool_calls", [])
    assert broken.raw_text == "<｜DSML｜invoke name="
    assert "unterminated" in broken.error.lower()


@pytest.mark.parametrize("text", ["a\n\n<", "a\n\n\n<b", "1 < 2\n", "｜DSML｜x", "<<"])
def test_what_only_looks_like_the_start_of_calls_is_text(text: str) -> None:
    assert parse(text + END) == ({"role": "assistant", "content": text}, "stop_sequence")
