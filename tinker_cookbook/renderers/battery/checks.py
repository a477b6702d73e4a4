"""Checks of a rendered conversation: functions that return what is wrong, or None.

`tinker-cookbook render --verify`, the tests and the parity table share them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.battery.subject import Case, Subject
from tinker_cookbook.renderers.content import split_reasoning
from tinker_cookbook.renderers.types import Message, ParseTermination, TrainOnWhat


def with_tools(family: Subject, case: Case) -> list[Message]:
    """Return the messages with the tools declared as the renderer declares them."""
    if not case.tools:
        return case.messages
    has_system = case.messages[0]["role"] == "system"
    system = str(case.messages[0]["content"]) if has_system else ""
    prefix = family.renderer.create_conversation_prefix_with_tools(list(case.tools), system)
    return [*prefix, *case.messages[has_system:]]


def is_expressible(family: Subject, case: Case) -> bool:
    """Whether the template writes this conversation and treats no text in it as markup."""
    markers = [*family.tokenizer.get_added_vocab(), "</think>", "<think>"]
    texts = json.dumps(
        [family.to_template(m) for m in case.messages], ensure_ascii=False, default=str
    )
    if any(marker in texts for marker in markers):
        return False
    return bool(case.messages) and family.expresses(case)


def parity_problem(family: Subject, case: Case, *, prompt: bool) -> str | None:
    """Return how the rendering differs from the template, except the documented difference."""
    messages = with_tools(family, case)
    renderer = family.renderer
    ours = renderer.render_prompt(messages) if prompt else renderer.render(messages)
    tokens = ours.tokens()
    expected = family.reference(case.messages, prompt=prompt, tools=case.tools)
    if tokens == expected:
        return None
    expected = family.adjusted(expected, case, prompt=prompt)
    if tokens == expected:
        return None
    if splits_at_the_prompt(family, case) and _text(family, tokens) == _text(family, expected):
        return None
    return f"{_text(family, tokens)!r} is not {_text(family, expected)!r} ({tokens} / {expected})"


def splits_at_the_prompt(family: Subject, case: Case) -> bool:
    """Whether the template merges the end of a prompt with the start of the reply into one token.

    Sampling cannot produce that token after that prompt, so the renderer encodes the reply
    separately. This happens to replies that start with a line break, and to empty reasoning if the
    prompt has opened the block.
    """
    replies = [split_reasoning(m) for m in case.messages if m["role"] == "assistant"]
    if family.name == "qwen3_thinking_2507" or (
        family.strips and family.has_thinking and not family.keeps_newlines
    ):
        space = None if family.strips else "\n"
        return any(_merges(family, "\n", reasoning.strip(space) + "\n") for reasoning, _ in replies)
    if family.name == "qwen3_disable_thinking":
        return any(_merges(family, "\n\n", text.lstrip("\n")) for _, text in replies)
    tail = None if family.trims or family.strips else family.prompt_tail
    if tail is None:
        return False
    starts = [text for _, text in replies]
    if family.keeps_newlines:  # reasoning follows the opened block unchanged
        starts += [reasoning for reasoning, _ in replies if reasoning]
    return any(_merges(family, tail, start) for start in starts)


def _merges(family: Subject, before: str, after: str) -> bool:
    encode = family.tokenizer.encode
    apart = encode(before, add_special_tokens=False) + encode(after, add_special_tokens=False)
    return apart != encode(before + after, add_special_tokens=False)


def _text(family: Subject, tokens: Sequence[int]) -> str:
    return family.renderer.encoder.decode(tokens)


def consistency_problem(family: Subject, case: Case) -> str | None:
    """Check that the trained tokens are those that sampling would produce after the same prompt."""
    messages = with_tools(family, case)
    renderer = family.renderer
    trained = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    try:
        examples = renderer.build_supervised_examples(messages, TrainOnWhat.ALL_ASSISTANT_MESSAGES)
    except RendererError as error:
        return None if family.may_refuse(messages) else f"refused: {error}"
    seen = 0
    for model_input, weights in examples:
        tokens = model_input.to_ints()
        assert weights.dtype == np.float32
        assert weights.shape == (len(tokens),)
        for start, end in _runs(weights, tokens, stops(family)):
            index = trained[seen]
            prompt = renderer.build_generation_prompt(messages[:index]).to_ints()
            if tokens[:start] != prompt:
                return f"messages[{index}]: trained after another prompt than sampled from"
            if tokens[end - 1] not in stops(family):
                return f"messages[{index}]: the end of the turn is not trained"
            seen += 1
    return None if seen == len(trained) else f"trained {seen} replies of {len(trained)}"


def _is_rewritten(family: Subject, messages: Sequence[Message]) -> bool:
    """Whether the template writes the reply before the last one differently than in its prompt."""
    in_a_row = any(a["role"] == b["role"] == "assistant" for a, b in itertools.pairwise(messages))
    return in_a_row and not family.renderer.has_extension_property


def stops(family: Subject) -> list[int]:
    """Return the stop tokens as ids."""
    return [stop for stop in family.renderer.get_stop_sequences() if isinstance(stop, int)]


def _runs(weights: np.ndarray, tokens: Sequence[int], ends: Sequence[int]) -> list[tuple[int, int]]:
    """Return [start, end) of each run of ones; an end token ends a run too."""
    runs: list[tuple[int, int]] = []
    is_open = False
    for position in np.flatnonzero(weights).tolist():
        if is_open and runs[-1][1] == position:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
        is_open = tokens[position] not in ends
    return runs


def round_trip_problem(family: Subject, case: Case) -> str | None:
    """Check that the tokens of the last reply parse back to the reply."""
    messages = with_tools(family, case)
    if messages[-1]["role"] != "assistant":
        return None
    renderer = family.renderer
    try:
        model_input, weights = renderer.build_supervised_example(messages)
    except RendererError:
        if family.may_refuse(messages) or _is_rewritten(family, messages):
            return None
        return "refused"
    ids = np.asarray(model_input.to_ints())
    message, termination = renderer.parse_response(ids[weights > 0].tolist())
    if termination is not ParseTermination.STOP_SEQUENCE:
        return f"ended with {termination}"
    got = _comparable(family, message)
    expected = _comparable(family, _as_written(family, messages[-1]))
    return None if got == expected else f"{got} is not {expected}"


def _as_written(family: Subject, message: Message) -> Message:
    """Return the message without what the format drops: outer white space and newlines."""
    reasoning, text = split_reasoning(message)
    if family.trims or family.strips:
        text = text.strip()
        reasoning = reasoning if family.keeps_newlines else reasoning.strip()
    if family.trims_end:
        text, reasoning = text.rstrip(), reasoning if reasoning.strip() else ""
    if family.accepts_thinking and not family.keeps_newlines:  # its think block absorbs newlines
        text, reasoning = text.lstrip("\n"), reasoning.strip("\n")
    result: Any = {**message, "content": text}
    if reasoning:
        result["content"] = [
            {"type": "thinking", "thinking": reasoning},
            {"type": "text", "text": text},
        ]
    return result


def _comparable(family: Subject, message: Message) -> tuple[object, ...]:
    reasoning, text = split_reasoning(message)
    if family.accepts_thinking and not family.keeps_newlines and not text.strip("\n"):
        text = ""  # newlines between block and call belong to the format
    calls = [
        (call.function.name, json.loads(call.function.arguments))
        for call in message.get("tool_calls", [])
    ]
    unparsed = [call.raw_text for call in message.get("unparsed_tool_calls", [])]
    normal = _normal_form(family)
    return normal(reasoning), normal(text), json.loads(normal(json.dumps(calls))), unparsed


def _normal_form(family: Subject) -> Any:
    """Return the change that the tokenizer itself makes to text.

    Qwen's composes characters (NFC); SmolLM2's has no token for some bytes, such as 0xF1.
    """
    backend = family.tokenizer.backend_tokenizer

    def through_tokenizer(text: str) -> str:
        ids = backend.encode(text, add_special_tokens=False).ids
        return backend.decode(ids, skip_special_tokens=False)

    return through_tokenizer


def extension_problem(family: Subject, case: Case) -> str | None:
    """Check that each prompt and its reply start the next prompt."""
    messages = with_tools(family, case)
    renderer = family.renderer
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == len(messages) - 1:
            continue
        try:
            example = renderer.build_supervised_example(messages[: index + 1])
        except RendererError:
            if family.may_refuse([message]):
                continue  # not a sampled reply
            return f"messages[{index}] cannot be trained"
        last = int(np.flatnonzero(example[1])[-1])
        sampled = example[0].to_ints()[: last + 1]
        later = renderer.render_prompt(messages[: index + 2]).tokens()
        if later[: len(sampled)] != sampled:
            return f"messages[{index}] is written differently once messages[{index + 1}] follows"
    return None
