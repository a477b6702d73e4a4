"""Replies of a required shape: JSON of a schema and forced calls, with the real library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.assets import tokenizer_folder
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.openai_api.call_notation import (
    PLAIN_NOTATION,
    CallNotation,
    find_notation,
    grammar_of,
)
from tinker_cookbook.local.openai_api.codec import TextCodec
from tinker_cookbook.local.openai_api.reply import ReplyReader
from tinker_cookbook.local.openai_api.reply_shape import ReplyShape
from tinker_cookbook.local.openai_api.structured import json_term

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["a", "b"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["name", "kind", "size"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}


@pytest.fixture
def codec(tiny_model_folder: Path) -> TextCodec:
    return TextCodec(tiny_model_folder, 320)


def draw(codec: TextCodec, grammar: str, seed: int, **options: Any) -> str:
    """Draw random allowed tokens until the end token is drawn, and return the text."""
    pytest.importorskip("llguidance")
    end = 2
    make = codec.grammars.compile(
        grammar, end_ids=[end], field="f", **({"free_until": None} | options)
    )
    rule, random = make(), np.random.default_rng(seed)
    size = codec.tokenizer.get_vocab_size(with_added_tokens=True)
    tokens: list[int] = []
    for _ in range(2000):
        logits = random.normal(size=size).astype(np.float32)
        logits[end] += 1
        rule.change(logits)
        token = int(logits.argmax())
        if token == end:
            return codec.decode(tokens)
        tokens.append(token)
        rule.add(token)
    raise AssertionError("no end")


@pytest.mark.parametrize("seed", range(5))
def test_random_tokens_of_a_grammar_are_json_of_its_schema(codec: TextCodec, seed: int):
    value = json.loads(draw(codec, f"start: {json_term(SCHEMA)}", seed))
    assert list(value) == ["name", "kind", "size"]
    assert len(value["name"]) <= 8
    assert value["kind"] in ("a", "b")
    assert value["size"] in range(10)


def test_a_forced_call_is_read_as_a_call(codec: TextCodec):
    for notation in (
        PLAIN_NOTATION,
        CallNotation('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"),
    ):
        grammar = grammar_of(ReplyShape(must_call=True), [TOOL], notation, codec.control_ids)
        text = draw(codec, grammar, 3)
        reader = ReplyReader(starts_in_thinking=False, tools=[TOOL])
        pieces = [*reader.push(text), *reader.finish()]
        [call] = [piece.call["function"] for piece in pieces]
        assert call["name"] == "look_up"
        assert json.loads(call["arguments"])["kind"] in ("a", "b")


def test_json_or_a_call(codec: TextCodec):
    marked = CallNotation("<call>", " ", "</call>")
    grammar = grammar_of(ReplyShape(schema=SCHEMA), [TOOL], marked, {})
    starts = {draw(codec, grammar, seed)[0] for seed in range(12)}
    assert starts == {"{", "<"}
    with pytest.raises(UserError, match="no marks for calls"):
        grammar_of(ReplyShape(schema=SCHEMA), [TOOL], PLAIN_NOTATION, {})


def test_reasoning_is_free_until_its_end(codec: TextCodec):
    pytest.importorskip("llguidance")
    make = codec.grammars.compile(
        f"start: {json_term(SCHEMA)}", end_ids=[2], free_until=30, field="f"
    )
    rule, logits = make(), np.zeros(320, np.float32)
    for token in (7, 2, 30):
        rule.change(logits)
        assert np.isfinite(logits).all()
        rule.add(token)
    rule.change(logits)
    assert 0 < np.isfinite(logits).sum() < 10


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "object", "contains": {"type": "string"}}, "contains"),
        ({"type": "nothing"}, "nothing"),
        ({"$ref": "http://example.com/schema"}, "schema"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(codec: TextCodec, schema: dict, said: str):
    pytest.importorskip("llguidance")
    with pytest.raises(UserError, match=r"^response_format.* cannot be enforced") as caught:
        codec.grammars.compile(
            f"start: {json_term(schema)}", end_ids=[2], free_until=None, field="response_format"
        )
    assert said in str(caught.value)


def test_without_the_library_the_error_names_the_extra(codec: TextCodec, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UserError, match=r"tinker-cookbook\[structured\]"):
        codec.grammars.compile("start: /a/", end_ids=[2], free_until=None, field="response_format")


@pytest.mark.parametrize(
    ("family", "before", "between"),
    [
        ("qwen3", '<tool_call>\n{"name": "', '", "arguments": '),
        ("gpt_oss", "functions.", "json<|message|>"),
        ("qwen3_5", PLAIN_NOTATION.before, PLAIN_NOTATION.between),  # arguments as tags
    ],
)
def test_the_notation_of_a_template_is_found(family: str, before: str, between: str):
    codec = TextCodec(Path(tokenizer_folder(family)))
    assert codec.tool_template is not None
    found = find_notation(codec, codec.tool_template)
    assert found.before.endswith(before)
    assert found.between.endswith(between)


def test_a_notation_leaves_out_what_is_written_elsewhere():
    notation = CallNotation("<think>\n</think>\n<call>", " ", "</call><end>")
    assert notation.fit(after_thinking=False, end_names=[]) == notation
    fitted = notation.fit(after_thinking=True, end_names=["<end>", "<other>"])
    assert fitted == CallNotation("\n<call>", " ", "</call>")


def test_a_template_without_tools_gets_the_plain_notation(codec: TextCodec):
    assert codec.template is not None
    assert find_notation(codec, codec.template) == PLAIN_NOTATION


@pytest.mark.slow
def test_a_thousand_samples_are_all_valid(local_service):
    """The model is random, so it would write anything that it may."""
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    with openai.OpenAI(
        base_url=f"{local_service.base_url}/oai/api/v1", api_key=local_service.api_key, timeout=600
    ) as client:
        texts: list[str] = []
        for seed in range(10):
            reply: Any = client.chat.completions.create(
                model=local_service.model,
                messages=[{"role": "user", "content": "Hello"}],
                response_format=form,  # pyright: ignore[reportArgumentType]
                max_tokens=200,
                n=100,
                seed=seed,
            )
            assert {choice.finish_reason for choice in reply.choices} == {"stop"}
            texts += [choice.message.content for choice in reply.choices]
    assert len(set(texts)) > 900
    for text in texts:
        value = json.loads(text)
        assert list(value) == ["name", "kind", "size"]
        assert isinstance(value["name"], str)
        assert len(value["name"]) <= 8
        assert value["kind"] in ("a", "b")
        assert value["size"] in range(10)
