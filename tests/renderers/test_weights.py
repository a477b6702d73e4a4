"""Which tokens are trained, in every mode."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers import Message, TrainOnWhat
from tinker_cookbook.renderers.base import Example
from tinker_cookbook.renderers.layout import SegmentKind

from .conversations import SEARCH
from .families import FAMILIES

FAMILY_NAMES = sorted(FAMILIES)

TALK: list[Message] = [
    {"role": "system", "content": "sys"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second"},
]


def trained_text(name: str, messages: list[Message], mode: TrainOnWhat) -> str:
    """Return what has weight 1, runs separated by a bar."""
    renderer = FAMILIES[name].renderer
    model_input, weights = renderer.build_supervised_example(messages, mode)
    tokens = model_input.to_ints()
    assert weights.dtype == np.float32
    assert weights.shape == (len(tokens),)
    assert set(weights.tolist()) <= {0.0, 1.0}
    edges = np.flatnonzero(np.diff(np.concatenate([[0], weights, [0]])))
    runs = zip(edges[::2], edges[1::2], strict=True)
    return "|".join(renderer.encoder.decode(tokens[a:b]) for a, b in runs)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (TrainOnWhat.LAST_ASSISTANT_MESSAGE, "second<|im_end|>"),
        (TrainOnWhat.LAST_ASSISTANT_TURN, "second<|im_end|>"),
        (TrainOnWhat.ALL_ASSISTANT_MESSAGES, "first<|im_end|>|second<|im_end|>"),
        (
            TrainOnWhat.ALL_MESSAGES,
            "sys<|im_end|>|one<|im_end|>|first<|im_end|>|two<|im_end|>|second<|im_end|>",
        ),
        (TrainOnWhat.ALL_USER_AND_SYSTEM_MESSAGES, "sys<|im_end|>|one<|im_end|>|two<|im_end|>"),
        (
            TrainOnWhat.ALL_TOKENS,
            "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TALK),
        ),
    ],
)
def test_modes_in_chatml(mode: TrainOnWhat, expected: str) -> None:
    assert trained_text("chatml", TALK, mode) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3", "<think>\n\n</think>\n\nsecond<|im_end|>"),
        ("qwen3_disable_thinking", "second<|im_end|>"),
        ("qwen3_instruct", "second<|im_end|>"),
        ("qwen3_thinking_2507", "\n</think>\n\nsecond<|im_end|>"),
        ("llama3", "second<|eot_id|>"),
        ("llama3_1", "second<|eot_id|>"),
    ],
)
def test_nothing_that_the_prompt_supplies_is_trained(name: str, expected: str) -> None:
    assert trained_text(name, TALK, TrainOnWhat.LAST_ASSISTANT_MESSAGE) == expected


def test_begin_of_sequence_is_never_trained() -> None:
    renderer = FAMILIES["llama3"].renderer
    _, weights = renderer.build_supervised_example(TALK, TrainOnWhat.ALL_TOKENS)
    assert weights.tolist() == [0.0] + [1.0] * (len(weights) - 1)


def test_customized_trains_the_marked_messages() -> None:
    marked: list[Any] = [{**m, "trainable": i in (1, 4)} for i, m in enumerate(TALK)]
    text = trained_text("chatml", marked, TrainOnWhat.CUSTOMIZED)
    assert text == "one<|im_end|>|second<|im_end|>"


def test_trainable_is_required_or_forbidden() -> None:
    renderer = FAMILIES["chatml"].renderer
    with pytest.raises(RendererError, match=r"messages\[0\]: trainable=None.*every message"):
        renderer.build_supervised_example(TALK, TrainOnWhat.CUSTOMIZED)
    marked: list[Any] = [{**m, "trainable": True} for m in TALK]
    with pytest.raises(RendererError, match="has no effect with train_on_what=last_assistant"):
        renderer.build_supervised_example(marked)


def test_a_mode_may_be_its_name_and_unknown_ones_are_listed() -> None:
    renderer = FAMILIES["chatml"].renderer
    mode: Any = "all_assistant_messages"
    assert trained_text("chatml", TALK, mode).count("|<|") == 0
    with pytest.raises(RendererError, match="unknown; use one of last_assistant_message"):
        renderer.build_supervised_example(TALK, "all_assistants")  # pyright: ignore[reportArgumentType]
    with pytest.raises(RendererError, match="nothing to train on"):
        renderer.build_supervised_example([])


def test_no_reply_to_train_gives_weights_of_zero() -> None:
    renderer = FAMILIES["chatml"].renderer
    _, weights = renderer.build_supervised_example(TALK[:2])
    assert not weights.any()
    assert len(renderer.build_supervised_examples(TALK[:2])) == 1


def _assert_equal(examples: list[Example], expected: list[Example]) -> None:
    assert [model_input for model_input, _ in examples] == [m for m, _ in expected]
    for (_, weights), (_, wanted) in zip(examples, expected, strict=True):
        np.testing.assert_array_equal(weights, wanted)


def _talk(name: str) -> list[Message]:
    """Return TALK with parts that the format rewrites: reasoning, or tools that move to the last
    user."""
    if name.startswith("mistral"):
        return [{**TALK[0], "tools": [SEARCH]}, *TALK[1:]]  # pyright: ignore[reportReturnType]
    if not FAMILIES[name].has_thinking:
        return TALK
    return [
        {**m, "reasoning_content": "think"} if m["role"] == "assistant" else m  # pyright: ignore
        for m in TALK
    ]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_conversation_trains_in_one_example_or_in_one_per_reply(name: str) -> None:
    renderer, talk = FAMILIES[name].renderer, _talk(name)
    mode = TrainOnWhat.ALL_ASSISTANT_MESSAGES
    examples = renderer.build_supervised_examples(talk, mode)
    if renderer.has_extension_property:
        _assert_equal(examples, [renderer.build_supervised_example(talk, mode)])
        return
    with pytest.raises(RendererError, match=r"messages\[2\].*build_supervised_examples"):
        renderer.build_supervised_example(talk, mode)
    _assert_equal(examples, [renderer.build_supervised_example(talk[:end]) for end in (3, 5)])


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_chosen_message_is_trained_once(name: str) -> None:
    renderer = FAMILIES[name].renderer
    messages = [*_talk(name), TALK[1]]
    examples = renderer.build_supervised_examples(messages, TrainOnWhat.ALL_MESSAGES)
    texts = [
        renderer.encoder.decode([t for t, w in zip(m.to_ints(), ws, strict=True) if w])
        for m, ws in examples
    ]
    # A format that rewrites earlier turns: up to each reply, then the last question.
    assert len(examples) == (1 if renderer.has_extension_property else 3)
    for word, count in {"sys": 1, "one": 2, "first": 1, "two": 1, "second": 1}.items():
        assert sum(text.count(word) for text in texts) == count


def test_splitting_a_tool_run_conditions_each_step_on_its_prompt() -> None:
    renderer = FAMILIES["qwen3"].renderer
    call: Any = {"function": {"name": "f", "arguments": "{}"}}
    messages: list[Message] = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "done"},
    ]
    # Without reasoning the template drops the first step's think block later on.
    with pytest.raises(RendererError, match=r"messages\[1\]"):
        renderer.build_supervised_example(messages, TrainOnWhat.LAST_ASSISTANT_TURN)
    assert len(renderer.build_supervised_examples(messages)) == 2
    thought: Any = [{"type": "thinking", "thinking": "t"}]
    kept = [messages[0], {**messages[1], "content": thought}, *messages[2:]]
    _, weights = renderer.build_supervised_example(kept, TrainOnWhat.LAST_ASSISTANT_TURN)  # pyright: ignore[reportArgumentType]
    assert weights.sum() > 0


def test_thinking_disabled_refuses_to_train_reasoning() -> None:
    renderer = FAMILIES["qwen3_disable_thinking"].renderer
    thought: Any = [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}]
    messages: list[Message] = [TALK[1], {"role": "assistant", "content": thought}]
    with pytest.raises(RendererError, match="thinking disabled"):
        renderer.build_supervised_example(messages)
    later = [*messages, TALK[3], TALK[4]]
    assert renderer.build_supervised_example(later)[1].any()  # in history it is only dropped


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_batches_equal_single_calls(name: str) -> None:
    renderer = FAMILIES[name].renderer
    talks = [TALK, TALK[:3], TALK[1:3], [*TALK, *TALK[1:]]]
    mode = TrainOnWhat.ALL_ASSISTANT_MESSAGES
    batch = renderer.build_supervised_batch(talks, mode)
    for talk, examples in zip(talks, batch, strict=True):
        single = renderer.build_supervised_examples(talk, mode)
        assert [e[0] for e in examples] == [e[0] for e in single]
        for got, expected in zip(examples, single, strict=True):
            np.testing.assert_array_equal(got[1], expected[1])


def test_segments_say_where_each_token_comes_from() -> None:
    rendering = FAMILIES["qwen3"].renderer.render(TALK)
    decode = FAMILIES["qwen3"].renderer.encoder.decode
    last = [s for s in rendering.segments if s.message == 4]
    kinds = [(segment.kind, decode(segment.tokens), segment.sampled) for segment in last]
    assert kinds == [
        (SegmentKind.FRAME, "<|im_start|>assistant\n", False),
        (SegmentKind.THINK, "<think>", True),
        (SegmentKind.THINK, "\n\n", True),
        (SegmentKind.THINK, "</think>", True),
        (SegmentKind.THINK, "\n\n", True),
        (SegmentKind.CONTENT, "second", True),
        (SegmentKind.STOP, "<|im_end|>", True),
        (SegmentKind.FRAME, "\n", False),
    ]
    assert rendering.sampled_start(4) == rendering.length - sum(s.length for s in last[1:])
