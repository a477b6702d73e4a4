"""Tool calls of models whose vocabulary has no tokens for the markers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tinker_cookbook.renderers import Message, Renderer, ToolCall, get_renderer
from tinker_cookbook.tokenizer_utils import get_tokenizer

CALL = '<tool_call>\n{"name": "price", "arguments": {"item": "a<b"}}\n</tool_call>'


@pytest.fixture(scope="module")
def renderer(tiny_model_folder: Path) -> Renderer:
    renderer = get_renderer("qwen2_5", get_tokenizer(str(tiny_model_folder)))
    assert renderer.encoder.control_id("<tool_call>") is None
    return renderer


def parse(renderer: Renderer, text: str, *, ended: bool = True) -> Message:
    tokens = renderer.tokenizer.encode(text, add_special_tokens=False)
    if ended:
        tokens = [*tokens, int(renderer.get_stop_sequences()[0])]
    message, _ = renderer.parse_response(tokens)
    for seed in range(5):  # in any bites, the same
        rng, rest, parser = random.Random(seed), list(tokens), renderer.response_parser()
        while rest:
            size = rng.randint(1, 6)
            list(parser.feed(rest[:size]))
            rest = rest[size:]
        list(parser.finish())
        assert parser.result()[0] == message
    return message


def names(message: Message) -> list[str]:
    return [call.function.name for call in message.get("tool_calls", [])]


def test_calls_are_found_in_text(renderer: Renderer):
    message = parse(renderer, f"Let me see.\n{CALL}\n{CALL}")
    assert (message["content"], names(message)) == ("Let me see.", ["price", "price"])
    call = message["tool_calls"][0]  # pyright: ignore[reportTypedDictNotRequiredAccess]
    assert json.loads(call.function.arguments) == {"item": "a<b"}


@pytest.mark.parametrize("text", ["1 < 2", "a <tool", "<tool_cal>", "</tool_call>", "<<tool_call"])
def test_other_text_stays_text(renderer: Renderer, text: str):
    assert parse(renderer, text) == {"role": "assistant", "content": text}


def test_broken_calls_come_back_with_the_reason(renderer: Renderer):
    (open_call,) = parse(renderer, CALL[:-5])["unparsed_tool_calls"]  # pyright: ignore
    assert open_call.raw_text == CALL[:-5]
    assert "error" in open_call.model_fields_set
    (no_json,) = parse(renderer, "<tool_call>price</tool_call>")["unparsed_tool_calls"]  # pyright: ignore
    assert "not valid JSON" in str(no_json.error)


@pytest.mark.parametrize("command", ["echo </tool_call>", "<tool_call>", "</tool_call>\n{"])
def test_a_marker_within_a_string_belongs_to_it(renderer: Renderer, command: str):
    source = json.dumps({"cmd": command})
    call = f'<tool_call>\n{{"name": "run", "arguments": {source}}}\n</tool_call>'
    message = parse(renderer, f"Now.\n{call}\n{CALL}")
    assert (message["content"], names(message)) == ("Now.", ["run", "price"])
    assert message["tool_calls"][0].function.arguments == source  # pyright: ignore


def test_a_string_that_is_never_closed_swallows_nothing(renderer: Renderer):
    broken = '<tool_call>{"name": "run", "arguments": {"cmd": "echo}}</tool_call>'
    message = parse(renderer, f"{broken}\n{CALL}")
    assert names(message) == ["price"]
    (unparsed,) = message["unparsed_tool_calls"]  # pyright: ignore
    assert unparsed.raw_text == broken


def test_what_is_written_is_read(renderer: Renderer):
    body = ToolCall.FunctionBody(name="price", arguments='{"item": "apple"}')
    said: Message = {"role": "assistant", "content": "", "tool_calls": [ToolCall(function=body)]}
    asked: list[Message] = [{"role": "user", "content": "How much?"}]
    prompt = renderer.build_generation_prompt(asked).to_ints()
    whole = renderer.build_supervised_example([*asked, said])[0].to_ints()
    assert whole[: len(prompt)] == prompt
    end = whole.index(int(renderer.get_stop_sequences()[0]), len(prompt)) + 1
    assert renderer.parse_response(whole[len(prompt) : end])[0] == said
