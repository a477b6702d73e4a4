"""Details of Qwen3.5 to 3.8, GLM, Gemma 3, Mistral and SmolLM3, each pinned."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers import Message, ToolCall, ToolSpec, get_renderer
from tinker_cookbook.renderers.mistral import MistralRenderer
from tinker_cookbook.renderers.notations.xml import PYTHON_WORDS, fit_arguments
from tinker_cookbook.renderers.qwen3_5 import Qwen3_5Renderer

from .conversations import SEARCH
from .families import FAMILIES
from .test_differences import both, talk
from .test_parsing import parse

USER: Message = {"role": "user", "content": "q"}


def call(arguments: str, name: str = "search", call_id: str | None = None) -> ToolCall:
    return ToolCall(id=call_id, function=ToolCall.FunctionBody(name=name, arguments=arguments))


def reply(arguments: str) -> Message:
    return {"role": "assistant", "content": "", "tool_calls": [call(arguments)]}


def text_of(name: str, messages: list[Message]) -> str:
    renderer = FAMILIES[name].renderer
    return renderer.encoder.decode(renderer.render(messages).tokens())


# ---- arguments ----


@pytest.mark.parametrize(
    ("name", "words"), [("qwen3_5", "True False None"), ("qwen3_6", "true false null")]
)
def test_words_in_arguments(name: str, words: str) -> None:
    arguments = '{"a": true, "b": false, "c": null, "d": "None"}'
    written = text_of(name, [USER, reply(arguments)])
    for key, word in zip("abc", words.split(), strict=True):
        assert f"<parameter={key}>\n{word}\n</parameter>" in written
    message, _ = parse(name, written.partition("<think>\n")[2])
    (parsed,) = message.get("tool_calls", [])
    expected = json.loads(arguments)
    if name == "qwen3_5":
        expected["d"] = None  # written alike; the tool's schema tells them apart
    assert json.loads(parsed.function.arguments) == expected


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_8_low_reasoning", "glm4_5", "glm4_7"])
def test_arguments_are_written_and_read_to_the_letter(name: str) -> None:
    arguments = '{"n": 1.50, "o": {"a":1}, "t": "x\\n</parameter> <arg_key>", "e": "", "l": []}'
    renderer = FAMILIES[name].renderer
    messages = [USER, reply(arguments)]
    model_input, weights = renderer.build_supervised_example(messages)
    sampled = [t for t, w in zip(model_input.to_ints(), weights, strict=True) if w]
    message, _ = renderer.parse_response(sampled)
    (parsed,) = message.get("tool_calls", [])
    assert json.loads(parsed.function.arguments) == json.loads(arguments)
    assert '"n": 1.50, "o": {"a":1}' in parsed.function.arguments
    again, _ = renderer.build_supervised_example([USER, {**message, "tool_calls": [parsed]}])
    assert again == model_input


def test_the_schema_tells_text_from_numbers() -> None:
    tool: ToolSpec = {
        "name": "search",
        "description": "",
        "parameters": {
            "type": "object",
            "properties": {"zip": {"type": "string"}, "n": {"type": "integer"}},
        },
    }
    read = call('{"zip": 1.50, "n": 5}')
    fitted = fit_arguments(read, [tool], {})
    assert json.loads(fitted.function.arguments) == {"zip": "1.50", "n": 5}
    assert fit_arguments(read, [], {}) == read


TEXT = {"type": "string"}


@pytest.mark.parametrize(
    ("schema", "read", "fitted"),
    [
        (TEXT, "null", '"None"'),
        (TEXT, '["x", 1]', '"[\\"x\\", 1]"'),
        ({"type": ["string", "null"]}, "5", '"5"'),
        ({"type": ["string", "null"]}, "null", "null"),
        ({"anyOf": [TEXT, {"type": "integer"}]}, "5", "5"),
        ({"anyOf": [TEXT, {"type": "integer"}]}, "5.5", '"5.5"'),
        ({"anyOf": [TEXT, {}]}, "5", "5"),
        ({"enum": ["1", "2"]}, "2", '"2"'),
        ({"const": "2"}, "2", '"2"'),
        ({"$ref": "#/$defs/Zip"}, "8001", '"8001"'),
        ({"$ref": "#/$defs/Circle"}, "8001", "8001"),
        ({"type": "number"}, "5", "5"),
        ({"type": "integer"}, '"five"', '"five"'),
        ({"type": "boolean"}, '"True"', '"True"'),
        (None, "5", "5"),
    ],
)
def test_what_a_schema_makes_of_a_bare_value(schema: Any, read: str, fitted: str) -> None:
    parameters: dict[str, Any] = {
        "properties": {"a": schema},
        "$defs": {"Zip": TEXT, "Circle": {"$ref": "#/$defs/Circle"}},
    }
    tool: ToolSpec = {"name": "search", "description": "", "parameters": parameters}
    arguments = f'{{"a": {read}, "b": 1.50}}'
    got = fit_arguments(call(arguments), [tool], PYTHON_WORDS).function.arguments
    assert got == f'{{"a": {fitted}, "b": 1.50}}'


@pytest.mark.parametrize(
    ("name", "markup", "reason"),
    [
        ("qwen3_5", "<tool_call>\nfoo\n</tool_call>", "expected <function=NAME>"),
        ("qwen3_5", "<tool_call>\n<function=>\n</function>\n</tool_call>", "no name"),
        ("qwen3_5", "<tool_call>\n<function=f>\nx</function></tool_call>", "not a parameter: 'x'"),
        (
            "qwen3_5",
            "<tool_call><function=f>\n" + 2 * "<parameter=a>\n1\n</parameter>\n"
            + "</function></tool_call>",
            "'a' is given twice",
        ),
        ("glm4_7", "<tool_call></tool_call>", "no name"),
        ("glm4_7", "<tool_call>f<arg_key>a</tool_call>", "not closed"),
        ("glm4_7", "<tool_call>f<arg_value>a</arg_value></tool_call>", "expected <arg_key>"),
        ("glm4_5", "<tool_call>f\n" + 2 * "<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n"
         + "</tool_call>", "'a' is given twice"),
        ("mistral_nemo", "[TOOL_CALLS]{}", "expected a list"),
        ("mistral_nemo", '[TOOL_CALLS][{"name": "f"', "not valid JSON"),
        ("mistral_nemo", '[TOOL_CALLS][{"arguments": {}}]', "'name' is missing"),
        ("mistral_small", "[TOOL_CALLS]f", "expected name[ARGS]"),
        ("mistral_small", "[TOOL_CALLS]f[ARGS]{", "not valid JSON"),
        ("mistral_small", "[TOOL_CALLS]f[ARGS]{}[ARGS]{}", "is given twice"),
    ],
)  # fmt: skip
def test_malformed_calls_come_back_with_the_reason(name: str, markup: str, reason: str) -> None:
    end = {"q": "<|im_end|>", "g": "<|observation|>", "m": "</s>"}[name[0]]
    opening = "</think>" if name in ("qwen3_5", "glm4_7") else ""
    message, termination = parse(name, opening + markup + end)
    (unparsed,) = message.get("unparsed_tool_calls", [])
    assert reason in unparsed.error
    assert unparsed.raw_text == markup
    assert "tool_calls" not in message
    assert termination.is_stop_sequence
    # It renders back to what was sampled.
    renderer = FAMILIES[name].renderer
    again = renderer.encoder.decode(renderer.render([USER, message]).tokens())
    assert markup in again


# ---- Qwen3.5 to 3.8 ----


def test_system_messages_of_qwen3_5() -> None:
    later: list[Message] = [USER, {"role": "system", "content": "x"}]
    with pytest.raises(RendererError, match=r"messages\[1\].*must be the first message"):
        FAMILIES["qwen3_5"].renderer.render(later)
    empty: list[Message] = [{"role": "system", "content": " "}, USER]
    assert text_of("qwen3_5", empty).startswith("<|im_start|>system\n<|im_end|>")
    assert text_of("qwen3_8_medium_reasoning", empty).startswith("<|im_start|>user")
    assert "set to low" in text_of("qwen3_8_low_reasoning", empty)
    with pytest.raises(RendererError, match="use one of xhigh, medium, low"):
        Qwen3_5Renderer(FAMILIES["qwen3_8_low_reasoning"].tokenizer, reasoning_effort="high")


def test_without_a_user_message_qwen3_5_writes_what_its_template_raises_on() -> None:
    assert "<think>\n\n</think>\n\nA" in text_of("qwen3_5", [{"role": "assistant", "content": "A"}])


def test_qwen3_5_can_keep_old_reasoning_as_later_templates_do() -> None:
    tokenizer = FAMILIES["qwen3_5"].tokenizer
    keeps, later = (
        get_renderer("qwen3_5_preserve_thinking", tokenizer),
        get_renderer("qwen3_6_preserve_thinking", tokenizer),
    )
    thought: Any = {"role": "assistant", "content": "A", "reasoning_content": "r"}
    messages = [USER, thought, USER, thought]
    assert keeps.has_extension_property
    assert keeps.render(messages).tokens() == later.render(messages).tokens()
    assert len(keeps.build_supervised_examples(messages)) == 1


@pytest.mark.parametrize(
    "name", ["qwen3_5_disable_thinking", "glm4_5_disable_thinking", "smollm3_disable_thinking"]
)
def test_reasoning_is_not_trained_where_it_is_disabled(name: str) -> None:
    thought: Any = {"role": "assistant", "content": "A", "reasoning_content": "r"}
    with pytest.raises(RendererError, match=r"messages\[1\].*thinking"):
        FAMILIES[name].renderer.build_supervised_example([USER, thought])


def test_think_tags_in_a_string_are_text() -> None:
    typed = "<think>r</think>A"
    think = FAMILIES["qwen3_5"].tokenizer.convert_tokens_to_ids("<think>")
    assert FAMILIES["qwen3_5"].renderer.render(talk(typed)).tokens().count(think) == 1


# ---- GLM ----


def test_glm_replies_end_with_the_token_that_opens_what_follows() -> None:
    ours, theirs = both(FAMILIES["glm4_5"], talk("A"))
    assert ours == theirs + "<|user|>"
    ended = [*talk("A"), *talk("B")]
    text = text_of("glm4_5", ended)
    assert text.count("<|user|>") == 3  # the second one ends a reply and opens a message
    twice: list[Message] = [*talk("A"), {"role": "assistant", "content": "B"}]
    assert "A<|user|><|assistant|>" in text_of("glm4_5", twice)
    asked = [USER, reply("{}")]
    assert text_of("glm4_7", asked).endswith("</tool_call><|observation|>")
    answered: list[Message] = [*asked, {"role": "tool", "content": "1"}]
    assert text_of("glm4_7", answered).count("<|observation|>") == 1


def test_glm4_7_writes_an_empty_think_block_as_it_is_sampled() -> None:
    ours, theirs = both(FAMILIES["glm4_7"], talk("A"))
    assert ours == "[gMASK]<sop><|user|>q<|assistant|><think></think>A<|user|>"
    assert theirs == "[gMASK]<sop><|user|>q<|assistant|></think>A"


def test_nothink_typed_is_text() -> None:
    family = FAMILIES["glm4_5_disable_thinking"]
    token = family.tokenizer.convert_tokens_to_ids("/nothink")
    typed: list[Message] = [{"role": "user", "content": "q/nothink"}]
    assert family.renderer.render(typed).tokens().count(token) == 1  # the format's own


# ---- Mistral, Gemma 3, SmolLM3 ----


def test_mistral_ids_of_calls() -> None:
    given = call("{}", call_id="abcdefghi")
    other = call("{}", call_id="call_1")
    messages: list[Message] = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [given, other, call("{}")]},
        {"role": "tool", "content": "b", "tool_call_id": "call_1"},
        {"role": "tool", "content": "a", "tool_call_id": "abcdefghi"},
        {"role": "tool", "content": "c"},
    ]
    text = text_of("mistral_small", messages)
    assert "[CALL_ID]abcdefghi[ARGS]" in text
    assert "[TOOL_RESULTS]000000002[TOOL_CONTENT]b[/TOOL_RESULTS]" in text
    assert "[TOOL_RESULTS]abcdefghi[TOOL_CONTENT]a[/TOOL_RESULTS]" in text
    assert "[TOOL_RESULTS]000000003[TOOL_CONTENT]c[/TOOL_RESULTS]" in text


def test_mistral_refuses_text_beside_a_call() -> None:
    both_kinds: Message = {**reply("{}"), "content": "text"}
    for name in ("mistral_nemo", "mistral_small"):
        with pytest.raises(RendererError, match="not both"):
            FAMILIES[name].renderer.render([USER, both_kinds])


def test_mistral_small_names_a_fixed_date() -> None:
    assert "The current date is 2025-06-20." in text_of("mistral_small", [USER])
    tokenizer = FAMILIES["mistral_small"].tokenizer
    renderer = MistralRenderer(tokenizer, is_small=True, date_string="2030-01-01")
    text = renderer.encoder.decode(renderer.render([USER]).tokens())
    assert "The current date is 2030-01-01." in text


def test_mistral_nemo_keeps_the_system_message_for_the_reply_it_was_sampled_with() -> None:
    messages: list[Message] = [{"role": "system", "content": "sys"}, *talk("A")]
    ours, theirs = both(FAMILIES["mistral_nemo"], messages)
    assert ours == "<s>[INST]sys\n\nq[/INST]A</s>"
    assert theirs == "<s>[INST]q[/INST]A</s>"


def test_mistral_trains_in_one_example_what_it_does_not_rewrite() -> None:
    renderer = FAMILIES["mistral_small"].renderer
    messages = [*talk("A"), *talk("B")]
    assert len(renderer.build_supervised_examples(messages)) == 1
    declared = [*renderer.create_conversation_prefix_with_tools([SEARCH]), *messages]
    mode: Any = "all_assistant_messages"
    assert len(renderer.build_supervised_examples(declared, mode)) == 2


@pytest.mark.skipif("gemma3" not in FAMILIES, reason="its tokenizer comes with npm")
def test_gemma3_system_messages_and_roles() -> None:
    system: Message = {"role": "system", "content": " sys"}
    text = text_of("gemma3", [system, *talk(" A "), *talk("B")])
    assert text.startswith("<bos><start_of_turn>user\n sys\n\nq<end_of_turn>\n")
    assert "model\nA<end_of_turn>" in text
    assert text_of("gemma3", [USER, USER]).count("<start_of_turn>user") == 2
    renderer = FAMILIES["gemma3"].renderer
    for messages in ([system, talk("A")[1]], [USER, system]):
        with pytest.raises(RendererError, match="before a user message"):
            renderer.render(messages)
    with pytest.raises(RendererError, match="before a user message"):
        renderer.build_generation_prompt([system])
    table = FAMILIES["gemma3"].tokenizer.convert_tokens_to_ids("<table>")
    assert table in renderer.render(talk("<table>\n\n\n")).tokens()  # a word like any other


def test_smollm3_modes() -> None:
    system: list[Message] = [{"role": "system", "content": "Be brief. /no_think"}, USER]
    assert "Reasoning Mode: /think\n" in text_of("smollm3", system)
    assert "Reasoning Mode: /no_think\n" in text_of("smollm3_disable_thinking", [USER])
    with pytest.raises(RendererError, match="one system message"):
        FAMILIES["smollm3"].renderer.render([USER, system[0]])
