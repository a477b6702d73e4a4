"""Ollama's Modelfile: its template writes the renderer's prompts, and its stops end replies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.assets import load_tokenizer
from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers import Message, Renderer, get_renderer
from tinker_cookbook.weights.ollama import ChatPieces, adds_bos, learn_pieces, render_modelfile

FAMILIES = {
    "smollm2": "smollm2",
    "qwen3": "qwen3",
    "qwen3_disable_thinking": "qwen3",
    "llama3_1": "llama3_1",
    "gemma3": "gemma3",
    "mistral_small": "mistral_small",
    "role_colon": "smollm2",
}


def load(name: str, tokenizer: str) -> Renderer:
    return get_renderer(name, load_tokenizer(tokenizer))


def conversations() -> Iterator[list[Message]]:
    def user(text: str) -> Message:
        return Message(role="user", content=text)

    def reply(text: str) -> Message:
        return Message(role="assistant", content=text)

    system = Message(role="system", content="You are a pirate.\nAnswer in rhymes.")
    yield [user("hi")]
    yield [system, user("Who are you?")]
    yield [user("{{ .System }} and {% if %}"), reply('"yes"'), user("no")]
    yield [system, user("1"), reply("2"), user("3"), reply("4"), user("日本語 🙂")]


class GoTemplate:
    """Executes the part of Go's text/template that the exported templates use."""

    _TOKEN = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)

    def __init__(self, text: str) -> None:
        self._parts = self._TOKEN.split(text)  # text, action, text, action, ..., text
        self._position = 0
        self._body, end = self._parse()
        assert end is None

    def _parse(self) -> tuple[list[Any], str | None]:
        """Return the nodes up to an action that ends them, and that action."""
        nodes: list[Any] = []
        while self._position < len(self._parts):
            part, is_action = self._parts[self._position], self._position % 2
            self._position += 1
            if not is_action:
                nodes.append(("text", part))
            elif part in ("end", "else") or part.startswith("else if "):
                return nodes, part
            elif part.startswith("if "):
                nodes.append(self._parse_if(part.removeprefix("if ")))
            elif part == "range $i, $_ := .Messages":
                nodes.append(("range", self._parse()[0]))
            else:
                nodes.append(("action", part))
        return nodes, None

    def _parse_if(self, condition: str) -> tuple[str, str, list[Any], list[Any]]:
        then, end = self._parse()
        if end == "end":
            return "if", condition, then, []
        if end == "else":
            return "if", condition, then, self._parse()[0]
        assert end is not None
        return "if", condition, then, [self._parse_if(end.removeprefix("else if "))]

    def render(self, messages: list[Message]) -> str:
        system = "\n\n".join(str(m["content"]) for m in messages if m["role"] == "system")
        self._messages, self._system = messages, system
        return "".join(self._execute(self._body, None))

    def _execute(self, nodes: list[Any], index: int | None) -> Iterator[str]:
        for kind, *node in nodes:
            if kind == "text":
                yield node[0]
            elif kind == "range":
                for number in range(len(self._messages)):
                    yield from self._execute(node[0], number)
            elif kind == "if":
                condition, then, otherwise = node
                yield from self._execute(
                    then if self._is_true(condition, index) else otherwise, index
                )
            else:
                yield self._value(node[0], index)

    def _is_true(self, condition: str, index: int | None) -> bool:
        if condition == ".System":
            return bool(self._system)
        assert index is not None
        if condition == "not (and $.System (eq $i 1))":
            return not (self._system and index == 1)
        if condition == "$last":
            return index == len(self._messages) - 1
        role = re.fullmatch(r'eq \.Role "(\w+)"', condition)
        assert role, condition
        return self._messages[index]["role"] == role[1]

    def _value(self, action: str, index: int | None) -> str:
        if action == ".System":
            return self._system
        if action == '"{{"':
            return "{{"
        assert index is not None
        if action.startswith("$last :="):
            return ""
        assert action == ".Content", action
        return str(self._messages[index]["content"])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_template_writes_the_renderers_prompts(name: str):
    renderer = load(name, FAMILIES[name])
    has_bos = bool(renderer.bos_ids)
    template = GoTemplate(learn_pieces(renderer, adds_bos=has_bos).go_template())
    for messages in conversations():
        tokens = renderer.render_prompt(messages).tokens()
        tokens = tokens[len(renderer.bos_ids) :]
        assert template.render(messages) == renderer.encoder.decode(tokens)


def test_an_unfinished_reply_is_continued():
    renderer = load("smollm2", "smollm2")
    template = GoTemplate(learn_pieces(renderer, adds_bos=False).go_template())
    messages = [Message(role="user", content="hi"), Message(role="assistant", content="Well,")]
    prompt = renderer.render_prompt(messages[:1], prefill="Well,")
    assert template.render(messages) == renderer.encoder.decode(prompt.tokens())


def test_braces_of_a_format_stay_text():
    pieces = ChatPieces("", "", "", "{{x}} ", "", "", "", "")
    rendered = GoTemplate(pieces.go_template()).render([Message(role="user", content="hi")])
    assert rendered == "{{x}} hi"


@pytest.mark.parametrize(
    ("name", "tokenizer", "reason"),
    [
        ("mistral_nemo", "mistral_nemo", "it writes"),
        ("qwen3_5_preserve_thinking", "qwen3_5", "the tokens of its prompts are not those"),
    ],
)
def test_formats_that_a_template_cannot_express_are_refused(name, tokenizer, reason):
    renderer = load(name, tokenizer)
    with pytest.raises(RendererError, match=f"{name} cannot be written as an Ollama.*{reason}"):
        learn_pieces(renderer, adds_bos=bool(renderer.bos_ids))


def test_a_begin_token_that_the_format_lacks_is_refused():
    with pytest.raises(RendererError, match="adds a begin-of-sequence token"):
        learn_pieces(load("smollm2", "smollm2"), adds_bos=True)


def test_the_modelfile_has_stops_and_unfiltered_sampling():
    text = render_modelfile(load("role_colon", "smollm2"), "a.gguf", context=2048, adds_bos=False)
    lines = text.splitlines()
    assert lines[0] == "FROM ./a.gguf"
    assert 'PARAMETER stop "\\n\\nUser:"' in lines
    assert {"PARAMETER num_ctx 2048", "PARAMETER temperature 1", "PARAMETER top_k 0"} <= {*lines}
    text = render_modelfile(load("llama3_1", "llama3_1"), "b.gguf", context=131072, adds_bos=True)
    assert 'PARAMETER stop "<|eot_id|>"' in text
    assert "PARAMETER num_ctx 8192" in text
    assert "<|begin_of_text|>" not in text


def test_what_llama_cpp_adds_is_read_from_the_file():
    assert adds_bos({"tokenizer.ggml.model": "llama"})
    assert adds_bos({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe"})
    assert not adds_bos({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"})
    assert not adds_bos({"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_bos_token": False})
