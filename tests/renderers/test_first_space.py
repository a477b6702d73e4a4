"""Vocabularies that write a space before a text, and where: Llama 2's, and others of the kind."""

from __future__ import annotations

import json
import shutil
from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.assets import is_built, load_tokenizer, tokenizer_folder
from tinker_cookbook.renderers import Message, Renderer, Utf8TokenDecoder, get_renderer
from tinker_cookbook.renderers.encoding.first_space import FirstSpace

pytestmark = pytest.mark.skipif(
    not (is_built("llama2") or shutil.which("npm")), reason="its tokenizer comes with npm"
)

REPLIES = ["Blue is a color.", " Blue", "\nBlue\n\nis", "é 日本 \U0001f642", "1 2  3", "</x>", ""]
# A marker of plain text before each message, as Zephyr and TinyLlama have them.
PLAIN_MARKERS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Text alone between the tokens that begin and end a turn, as Llama 2 and Mistral have it.
INST = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
# A control token right before each text.
CONTROL_MARKERS = PLAIN_MARKERS.replace("eos_token + '\n'", "'<|end|>'").replace("|>\n", "|>")
TEMPLATES = {"plain": PLAIN_MARKERS, "inst": INST, "control": CONTROL_MARKERS}

_SENTENCE_PIECE = {"type": "Metaspace", "replacement": "▁", "split": False}
CHANGES: dict[str, dict[str, Any]] = {
    "prepended": {},
    "always": {"normalizer": None, "pre_tokenizer": _SENTENCE_PIECE | {"prepend_scheme": "always"}},
    "first": {"normalizer": None, "pre_tokenizer": _SENTENCE_PIECE | {"prepend_scheme": "first"}},
    "never": {"normalizer": None, "pre_tokenizer": _SENTENCE_PIECE | {"prepend_scheme": "never"}},
}
SPACES = {"prepended": "always", "always": "always", "first": "first", "never": "never"}


@cache
def tokenizer_of(change: str, template: str) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    config = json.loads((tokenizer_folder("llama2") / "tokenizer.json").read_text("utf-8"))
    config |= CHANGES[change]
    if template == "control":
        names = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        config["added_tokens"] += [
            {"id": 32_000 + number, "content": name, "special": True, **flags}
            for number, name in enumerate(names)
        ]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(config)), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def talk(reply: str, question: str = "Sky?") -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def trained(renderer: Renderer, messages: list[Message]) -> tuple[list[int], list[int]]:
    """Return all tokens, and those of the trained reply."""
    model_input, weights = renderer.build_supervised_example(messages)
    tokens = model_input.to_ints()
    return tokens, np.asarray(tokens)[weights > 0].tolist()


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize("change", sorted(CHANGES))
def test_tokens_of_the_template(change: str, template: str) -> None:
    tokenizer = tokenizer_of(change, template)
    renderer = get_renderer("hf_template", tokenizer)
    assert renderer.encoder.first_space == FirstSpace(SPACES[change])
    for reply in REPLIES:
        for question in ("Sky?", " Sky", ""):
            messages = talk(reply, question)
            prompt = tokenizer.apply_chat_template(
                messages[:1], add_generation_prompt=True, return_dict=False
            )
            assert renderer.build_generation_prompt(messages[:1]).to_ints() == prompt
            whole = tokenizer.apply_chat_template(messages, return_dict=False)
            tokens, sampled = trained(renderer, messages)
            assert tokens == whole, (reply, tokenizer.convert_ids_to_tokens(tokens))
            assert tokens[: len(prompt)] == prompt
            assert tokens[len(prompt) : len(prompt) + len(sampled)] == sampled


@pytest.mark.parametrize("template", ["plain", "control"])
@pytest.mark.parametrize("change", sorted(CHANGES))
def test_replies_parse_back(change: str, template: str) -> None:
    renderer = get_renderer("hf_template", tokenizer_of(change, template))
    for reply in REPLIES:
        _, sampled = trained(renderer, talk(reply))
        # This one writes no second space, so both texts are the same tokens.
        is_merged = (change, template) == ("always", "control")
        expected = reply.removeprefix(" ") if is_merged else reply
        assert renderer.parse_response(sampled)[0]["content"] == expected
        pieces = [*renderer.parse_response_streaming(sampled)]
        assert pieces[-1] == renderer.parse_response(sampled)[0]


def test_plain_turns_of_a_base_model() -> None:
    tokenizer = tokenizer_of("prepended", "plain")
    renderer = get_renderer("role_colon", tokenizer)
    tokens, sampled = trained(renderer, talk("Blue is"))
    whole = "User: Sky?\n\nAssistant: Blue is\n\nUser:"
    assert tokens == tokenizer.encode(whole)
    assert tokenizer.convert_ids_to_tokens(sampled)[:2] == ["▁Blue", "▁is"]
    assert renderer.parse_response(sampled)[0]["content"] == "Blue is"


def test_markers_that_a_vocabulary_was_given() -> None:
    """A reply after `<|im_start|>assistant` and a line break starts inside a text."""
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_file(str(tokenizer_folder("llama2") / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(f"<|im_{name}|>") for name in ("start", "end")])
    renderer = get_renderer("chatml", backend)  # pyright: ignore[reportArgumentType]
    tokens, sampled = trained(renderer, talk("Blue is"))
    written = "<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\nBlue is<|im_end|>\n"
    assert tokens == backend.encode(written, add_special_tokens=False).ids
    assert renderer.parse_response(sampled)[0]["content"] == "Blue is"


def test_a_byte_level_vocabulary_that_adds_a_space() -> None:
    from tokenizers import Tokenizer

    config = json.loads(load_tokenizer("smollm2").backend_tokenizer.to_str())
    for step in config["pre_tokenizer"]["pretokenizers"]:
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = True
    backend = Tokenizer.from_str(json.dumps(config))
    renderer = get_renderer("chatml", backend)  # pyright: ignore[reportArgumentType]
    assert renderer.encoder.first_space is FirstSpace.AFTER_CONTROL
    tokens, _ = trained(renderer, talk("Blue is"))
    written = "<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\nBlue is<|im_end|>\n"
    assert tokens == backend.encode(written, add_special_tokens=False).ids


def test_a_decoder_of_its_own_starts_a_text() -> None:
    tokenizer = load_tokenizer("llama2")
    tokens = tokenizer.encode("Blue is", add_special_tokens=False)
    decoder = Utf8TokenDecoder(tokenizer)
    assert "".join(decoder.decode_text([token]) for token in tokens) == "Blue is"
