"""When a completion ends: at stop tokens, or at stop strings in its decoded text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.local.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.decoders import DecodeStream

__all__ = ["StopMatcher", "StopRule", "build_stop_rule", "load_tokenizer"]

_MAX_STOPS = 64
_MAX_STOP_CHARS = 1024


@dataclass(frozen=True)
class StopRule:
    """What ends the completions of one request."""

    token_ids: frozenset[int]
    strings: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None
    """None unless `strings` has entries."""

    def matcher(self) -> StopMatcher:
        """Return a fresh matcher for one completion."""
        return StopMatcher(self)


class StopMatcher:
    """Checks one completion while it grows. Its text is decoded once, token by token."""

    def __init__(self, rule: StopRule) -> None:
        self._rule = rule
        self._tail = ""
        # a stop string may begin in earlier pieces of text: keep all but one of its characters
        self._keep = max((len(text) for text in rule.strings), default=1) - 1
        self._stream: DecodeStream | None = None
        if rule.strings:
            from tokenizers.decoders import DecodeStream

            self._stream = DecodeStream(skip_special_tokens=False)

    def ends_at(self, token: int) -> bool:
        """Add the next token and return whether it is a stop token or completes a stop string."""
        if token in self._rule.token_ids:
            return True
        if self._stream is None or self._rule.tokenizer is None:
            return False
        piece = self._stream.step(self._rule.tokenizer, token)
        if not piece:
            return False
        text = self._tail + piece
        if any(stop in text for stop in self._rule.strings):
            return True
        self._tail = text[-self._keep :] if self._keep else ""
        return False


def load_tokenizer(folder: str) -> Tokenizer:
    """Load `tokenizer.json` of a model folder, without transformers."""
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"stop strings need {path.name}, which the model's folder does not have; "
            "use token ids as stops instead"
        )
    return Tokenizer.from_file(str(path))


def build_stop_rule(
    stop: Sequence[str] | Sequence[int] | None,
    *,
    eos_token_ids: Sequence[int],
    vocab_size: int,
    get_tokenizer: Callable[[], Tokenizer],
) -> StopRule:
    """Check the `stop` of a request and return its rule.

    Args:
        stop: None for the model's end-of-sequence tokens; empty to never stop; else strings or
            token ids, which replace the end-of-sequence tokens.
        get_tokenizer: called only if there are stop strings.

    Raises:
        UserError: for mixed types, ids outside the vocabulary, empty or too many strings.
    """
    if stop is None:
        return StopRule(frozenset(int(token) for token in eos_token_ids))
    entries = [stop] if isinstance(stop, str | int) else list(stop)
    if len(entries) > _MAX_STOPS:
        raise UserError(f"stop has {len(entries)} entries; at most {_MAX_STOPS} are accepted")
    strings = [entry for entry in entries if isinstance(entry, str)]
    if len(strings) == len(entries):
        return _string_rule(strings, get_tokenizer) if strings else StopRule(frozenset())
    if any(isinstance(entry, str | bool) for entry in entries):
        raise UserError(f"stop={entries!r} mixes types; use only strings or only token ids")
    for token in entries:
        if not 0 <= int(token) < vocab_size:
            raise UserError(
                f"stop={int(token)} is not a token id; ids of this model are 0 to {vocab_size - 1}"
            )
    return StopRule(frozenset(int(token) for token in entries))


def _string_rule(strings: list[str], get_tokenizer: Callable[[], Tokenizer]) -> StopRule:
    for text in strings:
        if not text or len(text) > _MAX_STOP_CHARS:
            raise UserError(
                f"stop={text[:40]!r} has {len(text)} characters; "
                f"a stop string has 1 to {_MAX_STOP_CHARS}. Use stop=[] to never stop"
            )
    return StopRule(frozenset(), tuple(strings), get_tokenizer())
