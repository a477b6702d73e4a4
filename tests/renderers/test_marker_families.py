"""DeepSeek, gpt-oss, Kimi and Nemotron: variants, what differs from the templates, replies."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest

from tests.assets import load_tokenizer
from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers import Message, ToolCall, get_renderer
from tinker_cookbook.renderers.gpt_oss import GptOssRenderer
from tinker_cookbook.renderers.notations.harmony import namespace_text
from tinker_cookbook.renderers.notations.kimi import typescript_text

from . import checks
from .conversations import SEARCH, WEATHER, Case, fixed_cases
from .families import FAMILIES, VARIANTS
from .marker_families import MARKER_VARIANTS

QUESTION: Message = {"role": "user", "content": "q"}


def text_of(name: str, messages: list[Any], *, prompt: bool = False) -> str:
    renderer = FAMILIES[name].renderer
    rendering = renderer.render_prompt(messages) if prompt else renderer.render(messages)
    return renderer.encoder.decode(rendering.tokens())


def called(name: str, arguments: str = "{}", call_id: str | None = None, text: str = "") -> Message:
    body = ToolCall.FunctionBody(name=name, arguments=arguments)
    call = ToolCall(id=call_id, function=body)
    return {"role": "assistant", "content": text, "tool_calls": [call]}


def thought(reasoning: str, text: str) -> Message:
    return {
        "role": "assistant",
        "content": [{"type": "thinking", "thinking": reasoning}, {"type": "text", "text": text}],
    }


def parse(name: str, markup: str) -> tuple[Message, Any]:
    renderer = FAMILIES[name].renderer
    return renderer.parse_response(renderer.encoder.encode_markup(markup))


@pytest.mark.parametrize("name", [family.name for family in MARKER_VARIANTS])
def test_variants_equal_their_templates(name: str) -> None:
    family = VARIANTS[name]
    cases = [c for c in fixed_cases(family) if c.category not in ("unicode", "whitespace", "code")]
    for prompt in (False, True):
        problems = [p for c in cases if (p := checks.parity_problem(family, c, prompt=prompt))]
        assert problems == []
    unfaithful = [p for c in cases if (p := checks.consistency_problem(family, c))]
    assert unfaithful == []


# ---- DeepSeek ----


def test_deepseek_refuses_a_late_system_message() -> None:
    late: list[Message] = [QUESTION, {"role": "system", "content": "S"}]
    with pytest.raises(RendererError, match=r"messages\[1\]: a system message must come before"):
        FAMILIES["deepseekv3"].renderer.render(late)
    template = FAMILIES["deepseekv3"].tokenizer.apply_chat_template(late, tokenize=False)
    assert template.startswith("<｜begin▁of▁sentence｜>S")  # moved to the front


def test_deepseek_trains_the_last_reasoning_and_drops_it_later() -> None:
    talk = [QUESTION, thought("why", "A")]
    assert text_of("deepseekv3_thinking", talk).endswith(
        "<｜Assistant｜><think>why</think>A<｜end▁of▁sentence｜>"
    )
    assert "<｜Assistant｜></think>A<" in text_of("deepseekv3_thinking", [*talk, QUESTION])
    assert text_of("deepseek_r1", talk).endswith("<think>\nwhy\n</think>\n\nA<｜end▁of▁sentence｜>")


def test_deepseek_opens_and_closes_every_run_of_calls_and_results() -> None:
    run: list[Message] = [called("f"), {"role": "tool", "content": "1"}]
    text = text_of("deepseekv3_chat", [QUESTION, *run, *run], prompt=True)
    for marker in ("calls▁begin", "calls▁end", "outputs▁begin", "outputs▁end"):
        assert text.count(f"<｜tool▁{marker}｜>") == 2
    assert text.endswith("<｜tool▁outputs▁end｜>")


def test_v3_needs_no_think_tokens() -> None:
    tokenizer = load_tokenizer("deepseek_v3")
    assert tokenizer.convert_ids_to_tokens([128798, 128799]) == [
        "<｜place▁holder▁no▁798｜>",
        "<｜place▁holder▁no▁799｜>",
    ]
    reply = parse("deepseekv3_chat", "<think>4<｜end▁of▁sentence｜>")[0]
    assert reply == {"role": "assistant", "content": "<think>4"}
    later = get_renderer("deepseekv3_chat", load_tokenizer("deepseek_r1_0528"))
    assert later.render([QUESTION]) is not None  # a vocabulary with them does as well
    for name in ("deepseek_r1", "deepseek_r1_0528", "deepseekv3", "deepseekv3_thinking"):
        with pytest.raises(RendererError, match="has no token '<think>'"):
            get_renderer(name, tokenizer)


@pytest.mark.parametrize(("name", "gap"), [("deepseekv3_chat", "\n"), ("deepseek_r1_0528", "")])
def test_what_stands_between_two_results(name: str, gap: str) -> None:
    """V3's template has a line break there, R1-0528's has none; both are kept exactly."""
    calls: Any = called("f", '{"a": 1}')
    calls["tool_calls"] *= 2
    talk: list[Any] = [
        QUESTION,
        calls,
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "A"},
    ]
    text = text_of(name, talk)
    between = f"1<｜tool▁output▁end｜>{gap}<｜tool▁output▁begin｜>2<｜tool▁output▁end｜>"
    assert between in text
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call, call]}
    template = load_tokenizer(FAMILIES[name].tokenizer_name).chat_template
    written = (
        jinja2.Environment()
        .from_string(template)
        .render(messages=[QUESTION, asked, *talk[2:]], bos_token="<｜begin▁of▁sentence｜>")
    )
    if name == "deepseekv3_chat":
        assert text == written
    else:  # the renderer writes the last reply as it is sampled, with its reasoning
        assert text.replace("<think>\n\n</think>\n\n", "") == written


@pytest.mark.parametrize("name", ["deepseekv3_thinking", "deepseek_r1"])
def test_where_the_prompt_opens_no_thinking_nothing_is_sampled(name: str) -> None:
    talk: list[Message] = [QUESTION, called("f"), {"role": "tool", "content": "1"}]
    with pytest.raises(RendererError, match="does not open a think block"):
        FAMILIES[name].renderer.render_prompt(talk)
    answered: list[Message] = [*talk, {"role": "assistant", "content": "A"}]
    with pytest.raises(RendererError, match="does not open a think block"):
        FAMILIES[name].renderer.build_supervised_example(answered)
    assert FAMILIES[name].renderer.render_prompt([*answered, QUESTION]).length


def test_deepseek_calls_parse_and_broken_ones_come_back() -> None:
    opened = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"
    closed = "<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
    two = '{"a":  1}<｜tool▁call▁end｜><｜tool▁call▁begin｜>g<｜tool▁sep｜>{}'
    message, end = parse("deepseekv3", f"Wait.{opened}f<｜tool▁sep｜>{two}{closed}")
    assert (message["content"], end.is_stop_sequence) == ("Wait.", True)
    calls = message.get("tool_calls", [])
    assert [(c.function.name, c.function.arguments) for c in calls] == [
        ("f", '{"a":  1}'),
        ("g", "{}"),
    ]
    for body, reason in [
        ("f<｜tool▁sep｜>{", "not a JSON object"),
        ("f{}", "expected a name"),
        ("<｜tool▁sep｜>{}", "name is missing"),
    ]:
        (broken,) = parse("deepseekv3", f"{opened}{body}{closed}")[0].get("unparsed_tool_calls", [])
        assert broken.raw_text == f"<｜tool▁call▁begin｜>{body}<｜tool▁call▁end｜>"
        assert reason in broken.error


# ---- gpt-oss ----


def test_gpt_oss_date_and_effort() -> None:
    assert "Current date: 2025-08-05\n\nReasoning: medium" in text_of(
        "gpt_oss_medium_reasoning", [QUESTION]
    )
    tokenizer = FAMILIES["gpt_oss_no_sysprompt"].tokenizer
    other = GptOssRenderer(tokenizer, True, "high", current_date="2030-01-02")
    text = other.encoder.decode(other.render([QUESTION]).tokens())
    assert "Current date: 2030-01-02\n\nReasoning: high" in text
    with pytest.raises(RendererError, match="use one of low, medium, high"):
        GptOssRenderer(tokenizer, True, "extreme")


def test_gpt_oss_text_beside_a_call_is_a_preamble() -> None:
    name = "gpt_oss_no_sysprompt"
    text = text_of(name, [QUESTION, called("f", '{"a":1}', text="Let me see.")])
    assert text.endswith(
        "<|start|>assistant<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant "
        'to=functions.f<|channel|>commentary json<|message|>{"a":1}<|call|>'
    )
    theirs = FAMILIES[name].reference([QUESTION, called("f", text="Let me see.")], prompt=False)
    decoded = FAMILIES[name].renderer.encoder.decode(theirs)
    assert "<|channel|>analysis<|message|>Let me see.<|end|>" in decoded


def test_gpt_oss_empty_reasoning_counts_as_none() -> None:
    name = "gpt_oss_medium_reasoning"
    reply = thought("", "A")
    assert text_of(name, [QUESTION, reply]).endswith(
        "<|start|>assistant<|channel|>final<|message|>A<|return|>"
    )
    given = [dict(QUESTION), {"role": "assistant", "content": "A", "thinking": ""}]
    theirs = FAMILIES[name].tokenizer.apply_chat_template(given, tokenize=False)
    assert "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final" in theirs


def test_gpt_oss_later_system_messages_and_several_calls() -> None:
    name = "gpt_oss_no_sysprompt"
    text = text_of(name, [QUESTION, {"role": "system", "content": "S"}])
    assert text.endswith("<|start|>developer<|message|># Instructions\n\nS\n\n<|end|>")
    both: Any = called("f")
    both["tool_calls"] *= 2
    with pytest.raises(RendererError, match="ends the turn with each call"):
        FAMILIES[name].renderer.render([QUESTION, both])
    result: Message = {"role": "tool", "content": "1"}
    with pytest.raises(RendererError, match="needs a call before it"):
        FAMILIES[name].renderer.render([QUESTION, result])


@pytest.mark.parametrize(
    ("markup", "content", "num_calls", "end"),
    [
        ("<|channel|>final<|message|>yes<|return|>", "yes", 0, "stop_sequence"),
        ("<|channel|>final<|message|>yes<|endoftext|>", "yes", 0, "eos"),
        ("<|channel|>final<|message|>ye", "ye", 0, "malformed"),
        (
            "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
            "",
            1,
            None,
        ),
        (" to=functions.f<|channel|>commentary json<|message|>{}<|call|>", "", 1, None),
        ("<|channel|>commentary<|message|>I look.<|end|>", "I look.", 0, "malformed"),
        ("plain<|return|>", "plain", 0, "stop_sequence"),
        ("<|channel|>odd<|message|>x<|return|>", "<|channel|>odd<|message|>x", 0, None),
    ],
)
def test_shapes_of_a_gpt_oss_reply(
    markup: str, content: Any, num_calls: int, end: str | None
) -> None:
    message, termination = parse("gpt_oss_no_sysprompt", markup)
    assert message["content"] == content
    assert len(message.get("tool_calls", [])) == num_calls
    assert termination == (end or "stop_sequence")


@pytest.mark.parametrize(
    ("markup", "reason"),
    [
        (" to=functions.f<|channel|>commentary json<|message|>{<|call|>", "not a JSON object"),
        (" to=browser.open<|channel|>commentary<|message|>{}<|call|>", "is not functions.NAME"),
        (" to=functions.f<|channel|>commentary json<|message|>{}<|return|>", "does not end in"),
        (" to=functions.f<|channel|>commentary json<|message|>{", "unterminated"),
    ],
)
def test_malformed_gpt_oss_calls_come_back_and_render_again(markup: str, reason: str) -> None:
    name = "gpt_oss_no_sysprompt"
    message, _ = parse(name, markup)
    (call,) = message.get("unparsed_tool_calls", [])
    assert reason in call.error
    text = text_of(name, [QUESTION, message])
    assert text.endswith(
        "<|start|>assistant" + markup.split("<|return|>")[0].removesuffix("<|call|>") + "<|call|>"
    )


def test_harmony_declarations_equal_the_template() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "array", "items": {"type": "object", "properties": {"x": {}}}},
            "b": {"type": ["string", "null"], "default": None},
            "c": {"type": "string", "enum": ["x", "y"], "default": "x", "description": "Ü"},
            "d": {"oneOf": [{"type": "string", "description": "s"}, {"type": "number"}]},
            "e": {"type": "object", "properties": {"f": {"type": "boolean"}}, "required": ["f"]},
            "g": {"type": "string", "nullable": True},
            "h": {"type": "array", "items": {"type": "integer"}, "nullable": True},
            "i": {"type": "integer", "default": 3},
            "j": {"oneOf": [{"type": "object"}, {"type": "string"}]},
            "k": {},
        },
        "required": ["a"],
    }
    tool: Any = {"name": "t", "description": "Does.", "parameters": schema}
    family = FAMILIES["gpt_oss_no_sysprompt"]
    tokens = family.reference([QUESTION], prompt=False, tools=[tool, WEATHER])
    assert namespace_text([tool, WEATHER]) in family.renderer.encoder.decode(tokens)


# ---- Kimi ----


def test_kimi_ids_of_another_shape_are_replaced_in_call_and_result() -> None:
    talk: list[Message] = [
        QUESTION,
        called("f", call_id="call_abc"),
        {"role": "tool", "content": "1", "tool_call_id": "call_abc"},
        called("g", call_id="functions.g:7"),
        {"role": "tool", "content": "2", "tool_call_id": "functions.g:7"},
    ]
    text = text_of("kimi_k2", talk)
    assert text.count("functions.f:0") == text.count("functions.g:7") == 2
    assert "call_abc" not in text


def test_kimi_results_follow_a_line_break() -> None:
    template = load_tokenizer("kimi_k2").chat_template
    assert "tool_call_id }}\\n{{" in template  # a backslash and an n
    talk = [QUESTION, called("f"), {"role": "tool", "content": "1"}]
    assert "## Return of functions.f:0\n1<|im_end|>" in text_of("kimi_k2_instruct", talk)


def test_kimi_calls_parse_with_their_ids() -> None:
    opened = "<|tool_calls_section_begin|><|tool_call_begin|>"
    closed = "<|tool_call_end|><|tool_calls_section_end|><|im_end|>"
    middle = "<|tool_call_argument_begin|>"
    message, _ = parse("kimi_k25", f"why</think>A{opened}functions.f:3{middle}{{}}{closed}")
    (call,) = message.get("tool_calls", [])
    assert (call.id, call.function.name) == ("functions.f:3", "f")
    message, _ = parse("kimi_k25", f"why</think>A{opened}f{middle}{{}}{closed}")
    (broken,) = message.get("unparsed_tool_calls", [])
    assert "expected functions.NAME:N" in broken.error


def test_kimi_names_are_text() -> None:
    named: Message = {"role": "user", "content": "q", "name": "<|im_end|>Ann"}
    renderer = FAMILIES["kimi_k2"].renderer
    tokens = renderer.render([named]).tokens()
    assert "<|im_user|><|im_end|>Ann<|im_middle|>q" in renderer.encoder.decode(tokens)
    assert tokens.count(checks.stops(FAMILIES["kimi_k2"])[0]) == 2  # of the system block and q


def test_kimi_declarations_of_nested_types() -> None:
    schema = {
        "type": "object",
        "properties": {
            "z": {"type": "array", "items": {"type": "string", "description": "one"}},
            "a": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": "x"},
            "m": {"type": "object", "properties": {"k": {"enum": ["u", 1]}}, "required": ["k"]},
        },
        "required": ["z"],
        "additionalProperties": False,
    }
    tool: Any = {"name": "t", "description": "Line one\nline two", "parameters": schema}
    assert typescript_text([tool]) == (
        "# Tools\n\n## functions\nnamespace functions {\n// Line one\n// line two\n"
        "type t = (_: {\n  z: Array<\n    // one\n    string\n  >,\n"
        '  // Default: "x"\n  a?: string | null,\n  m?: {\n    k: "u" | 1\n  },\n'
        "  [k: string]: never\n}) => any;\n}\n"
    )


# ---- Nemotron ----


def test_nemotron_writes_the_block_that_its_prompt_opens() -> None:
    family = FAMILIES["nemotron3"]
    reply: Message = {"role": "assistant", "content": "A"}
    assert text_of("nemotron3", [QUESTION, reply]).endswith("<think>\n\n</think>\nA<|im_end|>\n")
    theirs = family.renderer.encoder.decode(
        family.tokenizer.apply_chat_template([QUESTION, reply], return_dict=False)
    )
    assert theirs.endswith("<think></think>A<|im_end|>\n")
    assert "<think></think>A" in text_of("nemotron3", [QUESTION, reply, QUESTION])


def test_nemotron_effort_stands_in_the_last_question() -> None:
    reply = thought("r", "A")
    text = text_of("nemotron3_low_thinking", [QUESTION, reply, QUESTION], prompt=True)
    assert text.count("{reasoning effort: low}") == 1
    assert text.endswith("q\n\n{reasoning effort: low}<|im_end|>\n<|im_start|>assistant\n<think>\n")


def test_nemotron_declares_whatever_a_schema_holds() -> None:
    tool: Any = {
        "name": "t",
        "description": " d ",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": ["string"], "enum": ["é"], "minLength": 2, "x": {"y": 1}}},
            "additionalProperties": False,
        },
        "strict": True,
    }
    family = FAMILIES["nemotron3"]
    case = Case("", [QUESTION], (tool, SEARCH))
    assert checks.parity_problem(family, case, prompt=True) is None
