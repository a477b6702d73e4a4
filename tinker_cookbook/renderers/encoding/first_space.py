"""Vocabularies whose tokens depend on what precedes a text: SentencePiece's `▁` at the start.

Such a tokenizer (Llama 2, Mistral 7B, TinyLlama, Phi-3) inserts a space before a text, so that a
first word has the same token as any other word. It does so at the start of the sequence, some also
after every control token, and never within a text. So `Blue` is `▁Blue` at those places, and `Blue`
after, for example, `<|assistant|>` and a line break that are plain text.
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from tinker_cookbook.replies.json_source import JsonObject

if TYPE_CHECKING:
    from tokenizers import Tokenizer


__all__ = ["FirstSpace", "TextPlace", "first_space", "without_first_space"]


class FirstSpace(StrEnum):
    """Where a tokenizer inserts a space before a text."""

    NEVER = "never"
    AT_START = "first"
    """At the start of a sequence."""
    AFTER_CONTROL = "always"
    """At the start of a sequence, and after every control token."""


class TextPlace(StrEnum):
    """What precedes a text."""

    START = "nothing"
    AFTER_CONTROL = "a control token"
    INSIDE = "text"


_SPACE = "▁"
_SCHEMES = {"first": FirstSpace.AT_START, "always": FirstSpace.AFTER_CONTROL}


def first_space(backend: Tokenizer) -> FirstSpace:
    """Return where a `tokenizers.Tokenizer` inserts a space before a text."""
    for part in _steps(_state(backend.normalizer)) + _steps(_state(backend.pre_tokenizer)):
        if part["type"] == "Prepend" and part["prepend"] == _SPACE:
            return FirstSpace.AFTER_CONTROL
        if part["type"] == "ByteLevel" and part.get("add_prefix_space"):
            return FirstSpace.AFTER_CONTROL
        if part["type"] == "Metaspace":
            default = "always" if part.get("add_prefix_space", True) else "never"
            return _SCHEMES.get(part.get("prepend_scheme", default), FirstSpace.NEVER)
    return FirstSpace.NEVER


def without_first_space(backend: Tokenizer, plain: Tokenizer) -> Tokenizer:
    """Return a copy of `plain` that inserts no space before a text; both share the model.

    Args:
        backend: the original tokenizer.
        plain: the same tokenizer without control tokens.
    """
    from tokenizers import Tokenizer

    twin = Tokenizer(plain.model)
    twin.add_tokens(list(plain.get_added_tokens_decoder().values()))
    normalizer = _without_space(_state(backend.normalizer))
    pre_tokenizer = _without_space(_state(backend.pre_tokenizer))
    parts = Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0",
                "normalizer": normalizer,
                "pre_tokenizer": pre_tokenizer,
                "model": {"type": "BPE", "vocab": {}, "merges": []},
            }
        )
    )
    if parts.normalizer is not None:
        twin.normalizer = parts.normalizer
    if parts.pre_tokenizer is not None:
        twin.pre_tokenizer = parts.pre_tokenizer
    return twin


def _state(part: Any) -> JsonObject | None:
    return None if part is None else json.loads(part.__getstate__())


def _steps(state: JsonObject | None) -> list[JsonObject]:
    """Return the steps of a normalizer or pre-tokenizer; a single one is its only step."""
    if state is None:
        return []
    inner = state.get("normalizers") or state.get("pretokenizers")
    return [step for part in inner for step in _steps(part)] if inner else [state]


def _without_space(state: JsonObject | None) -> JsonObject | None:
    if state is None or (state["type"] == "Prepend" and state["prepend"] == _SPACE):
        return None
    for key in ("normalizers", "pretokenizers"):
        if key in state:
            kept = (_without_space(part) for part in state[key])
            return {**state, key: [part for part in kept if part is not None]}
    if state["type"] == "Metaspace":
        return {**state, "prepend_scheme": "never", "add_prefix_space": False}
    if state["type"] == "ByteLevel":
        return {**state, "add_prefix_space": False}
    return state
