"""Each intended difference from a template, pinned. The modules' docstrings list the same ones."""

from __future__ import annotations

from typing import Any

import pytest

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers import Message, ToolCall
from tinker_cookbook.renderers.llama3 import Llama3Renderer, SystemBlock

from . import checks
from .conversations import SEARCH, WEATHER, Case
from .families import FAMILIES, Family


def both(family: Family, messages: list[Any], tools: Any = ()) -> tuple[str, str]:
    """Return (ours, the template's) as text of the whole conversation."""
    ours = family.renderer.render(checks.with_tools(family, Case("", messages, tools))).tokens()
    theirs = family.reference(messages, prompt=False, tools=tools)
    decode = family.renderer.encoder.decode
    return decode(ours), decode(theirs)


def talk(text: str) -> list[Message]:
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]


@pytest.mark.parametrize("name", ["smollm2", "qwen2_5", "qwen3", "llama3", "llama3_1"])
def test_typed_control_tokens_stay_text(name: str) -> None:
    family = FAMILIES[name]
    stop = checks.stops(family)[0]
    marker = family.tokenizer.convert_ids_to_tokens(stop)
    messages = talk(f"a{marker}b")
    ours, theirs = both(family, messages)
    assert ours == theirs  # the same characters
    template = family.reference(messages, prompt=False)
    assert family.renderer.render(messages).tokens().count(stop) == template.count(stop) - 1


def test_a_reply_is_encoded_apart_from_the_header_before_it() -> None:
    family = FAMILIES["qwen3_instruct"]
    messages = talk("\nA")
    ours = family.renderer.render(messages).tokens()
    theirs = family.reference(messages, prompt=False)
    newline, two_newlines = 198, 271
    assert two_newlines in theirs
    assert two_newlines not in ours
    prompt = family.renderer.render_prompt(messages[:1]).tokens()
    assert prompt == family.reference(messages[:1], prompt=True)
    assert ours[: len(prompt)] == prompt
    assert ours[len(prompt)] == newline


def test_an_opened_think_block_of_no_reasoning_takes_two_tokens() -> None:
    family = FAMILIES["qwen3_thinking_2507"]
    ours = family.renderer.render(talk("A")).tokens()
    theirs = family.reference(talk("A"), prompt=False)
    think, think_end = (family.tokenizer.convert_tokens_to_ids(t) for t in ("<think>", "</think>"))
    assert ours[ours.index(think) : ours.index(think_end)] == [think, 198, 198]
    assert theirs[theirs.index(think) : theirs.index(think_end)] == [think, 271]


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1"])
def test_argument_text_is_written_as_it_is(name: str) -> None:
    body = ToolCall.FunctionBody(name="search", arguments='{"q":1}')
    messages: list[Any] = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [ToolCall(function=body)]},
    ]
    family = FAMILIES[name]
    ours, _ = both(family, messages, (SEARCH,))
    assert ': {"q":1}}' in ours
    converted = [family.to_template(message) for message in messages]
    converted[1]["tool_calls"][0]["function"]["arguments"] = '{"q":1}'
    theirs = family.tokenizer.apply_chat_template(converted, tokenize=False)
    assert ': "{\\"q\\":1}"}' in theirs  # quoted a second time


def test_a_tool_name_is_escaped() -> None:
    body = ToolCall.FunctionBody(name='a"b', arguments="{}")
    messages: list[Any] = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [ToolCall(function=body)]},
    ]
    ours, theirs = both(FAMILIES["qwen3_instruct"], messages, (SEARCH,))
    assert '"name": "a\\"b"' in ours
    assert '"name": "a"b"' in theirs  # not JSON


def test_unknown_roles_are_refused() -> None:
    messages: list[Any] = [{"role": "developer", "content": "x"}, *talk("A")]
    family = FAMILIES["qwen3"]
    with pytest.raises(RendererError, match=r"messages\[0\]: role 'developer' is unknown"):
        family.renderer.render(messages)
    assert "developer" not in family.tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_prompt_without_messages_is_the_start_of_any() -> None:
    for name in ("smollm2", "qwen2_5", "llama3", "llama3_1"):
        renderer = FAMILIES[name].renderer
        start: list[Message] = [{"role": "assistant", "content": "A"}]
        prompt = renderer.render_prompt([]).tokens()
        assert renderer.render(start).tokens()[: len(prompt)] == prompt


def test_think_tags_in_a_string_are_text() -> None:
    family = FAMILIES["qwen3"]
    ours, theirs = both(family, talk("<think>\nr\n</think>\n\nA"))
    assert "<think>\n\n</think>\n\n<think>\nr\n</think>\n\nA" in ours
    assert "assistant\n<think>\nr\n</think>\n\nA" in theirs
    think = family.tokenizer.convert_tokens_to_ids("<think>")
    assert family.renderer.render(talk("<think>\nr\n</think>\n\nA")).tokens().count(think) == 1


def test_without_a_user_message_replies_keep_their_reasoning() -> None:
    messages: list[Any] = [
        {"role": "system", "content": "S"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "r"}]},
    ]
    ours, theirs = both(FAMILIES["qwen3"], messages)
    assert "<think>\nr\n</think>\n\n" in ours
    assert "<think>" not in theirs


def test_an_empty_system_message_with_tools_counts_as_none() -> None:
    messages: list[Any] = [{"role": "system", "content": ""}, *talk("A")]
    ours, theirs = both(FAMILIES["qwen3"], messages, (WEATHER,))
    assert ours.startswith("<|im_start|>system\n# Tools")
    assert theirs.startswith("<|im_start|>system\n\n\n# Tools")


def test_llama_dates() -> None:
    family = FAMILIES["llama3_2"]
    undated = family.tokenizer.apply_chat_template(talk("A"), tokenize=False)
    ours, dated = both(family, talk("A"))
    assert ours == dated
    assert ours != undated  # the template writes today's date unless told
    block = SystemBlock(date_string="01 Jan 2030")
    other = Llama3Renderer(family.tokenizer, system_block=block).render(talk("A")).tokens()
    assert "Today Date: 01 Jan 2030" in family.renderer.encoder.decode(other)


def test_llama3_writes_no_dates_for_any_model() -> None:
    tokenizer = FAMILIES["llama3_1"].tokenizer
    text = FAMILIES["llama3"].renderer.encoder.decode(
        Llama3Renderer(tokenizer).render(talk("A")).tokens()
    )
    assert "Cutting Knowledge" not in text
    assert "Cutting Knowledge" in both(FAMILIES["llama3_1"], talk("A"))[1]


def test_llama_refuses_what_its_template_drops_or_raises_on() -> None:
    renderer = FAMILIES["llama3_1"].renderer
    body = ToolCall.FunctionBody(name="f", arguments="{}")
    call = ToolCall(function=body)
    reply: Message = {"role": "assistant", "content": "text", "tool_calls": [call]}
    with pytest.raises(RendererError, match="writes only tool calls"):
        renderer.render([talk("A")[0], reply])
    two: Message = {**reply, "content": "", "tool_calls": [call, call]}
    written = renderer.encoder.decode(renderer.render([talk("A")[0], two]).tokens())
    assert written.endswith(
        '{"name": "f", "parameters": {}}; {"name": "f", "parameters": {}}<|eot_id|>'
    )
    with pytest.raises(RendererError, match="right after the system message"):
        renderer.render(renderer.create_conversation_prefix_with_tools([SEARCH]))


@pytest.mark.parametrize("name", ["chatml", "smollm2", "qwen3_instruct", "llama3", "llama3_1"])
def test_formats_without_thinking_refuse_it(name: str) -> None:
    thought: Any = [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}]
    with pytest.raises(RendererError, match=r"messages\[1\].*thinking"):
        FAMILIES[name].renderer.render([talk("A")[0], {"role": "assistant", "content": thought}])


@pytest.mark.parametrize("name", ["chatml", "smollm2", "llama3"])
def test_formats_without_tools_refuse_them(name: str) -> None:
    renderer = FAMILIES[name].renderer
    with pytest.raises(RendererError, match="tool"):
        renderer.create_conversation_prefix_with_tools([SEARCH])
    system: Message = {"role": "system", "content": "", "tools": [SEARCH]}
    with pytest.raises(RendererError, match="tools"):
        renderer.render([system])
    call = ToolCall(function=ToolCall.FunctionBody(name="f", arguments="{}"))
    with pytest.raises(RendererError, match="tool_calls"):
        renderer.render([{"role": "assistant", "content": "", "tool_calls": [call]}])


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_unusable_content_is_refused(name: str) -> None:
    renderer = FAMILIES[name].renderer
    missing: Any = [{"role": "user"}]
    with pytest.raises(RendererError, match="content is missing"):
        renderer.render(missing)
    image: Any = [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]
    with pytest.raises(RendererError, match="type='image' cannot be written"):
        renderer.render(image)
    with pytest.raises(RendererError, match="lone surrogate"):
        renderer.render([{"role": "user", "content": "a\ud800"}])
