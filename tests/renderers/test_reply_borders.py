"""A trained reply starts with a separate token, whatever precedes it.

Most conversations have a user's turn and a marker before each reply. Here replies follow system
text, each other or nothing, with texts that a tokenizer would merge across the border.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.assets import load_tokenizer
from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers import Message, Renderer, TrainOnWhat, get_renderer

from .families import FAMILIES

ALL = TrainOnWhat.ALL_ASSISTANT_MESSAGES
# The words before a reply, and the reply: Qwen's, Llama's and DeepSeek's vocabularies merge them.
TEXTS = [("Say hi.", "hi"), ("Say", "ing"), ("x\n", "\ny"), ("", " b")]
ROLES = ["sa", "a", "saa", "sau", "saua", "ssa", "aa", "aua", "uaa", "ta", "uta"]
_NAMES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def talks(before: str, reply: str) -> list[list[Message]]:
    found: Any = [
        [{"role": _NAMES[r], "content": reply if r == "a" else before} for r in roles]
        for roles in ROLES
    ]
    return found


def prompts_trained_after(renderer: Renderer, messages: list[Message]) -> list[list[int]]:
    """Return the text before the first trained token of each example."""
    found = []
    for model_input, weights in renderer.build_supervised_examples(messages, ALL):
        found.append(model_input.to_ints()[: int(np.flatnonzero(weights)[0])])
    return found


def assert_trained_after_their_prompts(renderer: Renderer, least: int) -> None:
    num_compared = 0
    for before, reply in TEXTS:
        for messages in talks(before, reply):
            first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
            try:
                trained_after = prompts_trained_after(renderer, messages)
                prompt = renderer.build_generation_prompt(messages[:first]).to_ints()
            except RendererError:
                continue  # a conversation that the format cannot write
            assert trained_after[0] == prompt, messages
            num_compared += 1
    assert num_compared >= least


@pytest.mark.parametrize("family_name", sorted(FAMILIES))
def test_replies_that_follow_no_user(family_name: str) -> None:
    # V3.1 thinks after a user's turn alone, so elsewhere nothing is trained.
    least = 0 if family_name == "deepseekv3_thinking" else 12
    assert_trained_after_their_prompts(FAMILIES[family_name].renderer, least)


@cache
def by_template(tokenizer_name: str) -> Renderer:
    return get_renderer("hf_template", load_tokenizer(tokenizer_name))


@pytest.mark.parametrize("name", ["deepseek_v3_1", "deepseek_r1_0528", "qwen3", "llama3_1"])
def test_the_same_by_their_templates(name: str) -> None:
    assert_trained_after_their_prompts(by_template(name), 12)


def test_the_same_without_control_tokens() -> None:
    renderer = get_renderer("role_colon", load_tokenizer("qwen3"))
    assert_trained_after_their_prompts(renderer, 12)


def test_a_reply_right_after_system_text_keeps_its_first_letter() -> None:
    """DeepSeek V3.1 writes nothing between the two, and its vocabulary has a token `.h`."""
    renderer = FAMILIES["deepseekv3"].renderer
    messages: list[Message] = [
        {"role": "system", "content": "Say hi."},
        {"role": "assistant", "content": "hi"},
    ]
    model_input, weights = renderer.build_supervised_example(messages)
    pieces = [renderer.encoder.decode([token]) for token in model_input.to_ints()]
    assert pieces[1:] == ["Say", " hi", ".", "hi", "<｜end▁of▁sentence｜>"]
    assert weights.tolist() == [0, 0, 0, 0, 1, 1]
    merged = renderer.tokenizer.encode("Say hi.hi", add_special_tokens=False)
    assert [renderer.encoder.decode([token]) for token in merged] == ["Say", " hi", ".h", "i"]
