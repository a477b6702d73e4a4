"""When a completion ends: stop tokens, and stop strings found while text grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinker_cookbook.local.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["StopMatcher", "StopRule", "build_stop_rule", "load_tokenizer"]

_MAX_STOPS = 64
_MAX_STOP_CHARS = 1024


@dataclass(frozen=True)
class StopRule:
    """What ends the completions of one request."""

    token_ids: frozenset[int]
    strings: tuple[str, ...] = ()
    tokenizer: Any = None
    """A `tokenizers.Tokenizer`; None unless `strings` has entries."""

    def matcher(self) -> StopMatcher:
        """Return a fresh matcher for one completion."""
        return StopMatcher(self)


class StopMatcher:
    """Watches one completion grow; text is decoded once, token by token."""

    def __init__(self, rule: StopRule) -> None:
        self._rule = rule
        self._tail = ""
        self._keep = max((len(text) for text in rule.strings), default=1) - 1
        self._stream: Any = None
        if rule.strings:
            from tokenizers.decoders import DecodeStream

            self._stream = DecodeStream(skip_special_tokens=False)

    def ends_at(self, token: int) -> bool:
        """Take the next token and say whether it completes a stop token or a stop string."""
        if token in self._rule.token_ids:
            return True
        if self._stream is None:
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
            f"stop strings need {path.name} in the model's folder, which has none; "
            "pass the stop tokens' ids instead"
        )
    return Tokenizer.from_file(str(path))


def build_stop_rule(
    stop: Sequence[str] | Sequence[int] | None,
    *,
    eos_token_ids: Sequence[int],
    vocab_size: int,
    get_tokenizer: Any,
) -> StopRule:
    """Check `stop` and turn it into a rule.

    Args:
        stop: None for the model's end-of-sequence tokens; empty for no stop at all; else strings or
            token ids, which then replace the end-of-sequence tokens.
        get_tokenizer: called without arguments only if there are stop strings.

    Raises:
        UserError: for mixed types, ids outside the vocabulary, empty or too many strings.
    """
    if stop is None:
        return StopRule(frozenset(int(token) for token in eos_token_ids))
    entries: list[Any] = [stop] if isinstance(stop, str | int) else list(stop)
    if len(entries) > _MAX_STOPS:
        raise UserError(f"stop has {len(entries)} entries; at most {_MAX_STOPS} are accepted")
    if all(isinstance(entry, str) for entry in entries):
        return _string_rule(entries, get_tokenizer) if entries else StopRule(frozenset())
    if any(isinstance(entry, str | bool) for entry in entries):
        raise UserError(f"stop={entries!r} mixes types; use only strings or only token ids")
    for token in entries:
        if not 0 <= int(token) < vocab_size:
            raise UserError(
                f"stop={int(token)} is not a token id; ids of this model are 0 to {vocab_size - 1}"
            )
    return StopRule(frozenset(int(token) for token in entries))


def _string_rule(strings: list[str], get_tokenizer: Any) -> StopRule:
    for text in strings:
        if not text or len(text) > _MAX_STOP_CHARS:
            raise UserError(
                f"stop={text[:40]!r} has {len(text)} characters; "
                f"a stop string has 1 to {_MAX_STOP_CHARS}. Use stop=[] for no stop at all"
            )
    return StopRule(frozenset(), tuple(strings), get_tokenizer())
