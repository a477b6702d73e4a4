"""Constrained decoding: rules that let a model draw only tokens that a grammar allows.

The grammars are compiled and followed by `llguidance` (extra `structured`). A JSON schema is
compiled once per request; its rule says, before each token, which tokens may come next.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

import numpy as np

from tinker_cookbook.local.engine.types import LogitRule
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.service.protocol.json_body import JsonObject

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer  # pyright: ignore[reportMissingImports]
    from tokenizers import Tokenizer

__all__ = ["GrammarCompiler", "GrammarRule", "json_term", "literal_term", "token_term"]

_WHITESPACE = r"( |\n {0,16})?"
"""Between the parts of JSON: a space, or a line break with indentation.

It is bounded, so that a model cannot write white space forever."""
_MAX_GRAMMAR = 2**20


def json_term(schema: JsonObject) -> str:
    """Return the part of a grammar that matches JSON of a schema."""
    options = {"whitespace_pattern": _WHITESPACE, "whitespace_flexible": True}
    return "%json " + json.dumps(schema | {"x-guidance": options}, ensure_ascii=False)


def literal_term(text: str) -> str:
    """Return the part of a grammar that matches a text, written with ordinary tokens."""
    return json.dumps(text, ensure_ascii=False)


def token_term(token: int) -> str:
    """Return the part of a grammar that matches one token."""
    return f"<[{token}]>"


class GrammarCompiler:
    """Compiles grammars for one vocabulary. It may be used on several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Keep what is needed; the vocabulary is read when the first grammar is compiled."""
        self._source = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None

    def compile(
        self,
        grammar: str,
        *,
        end_ids: Collection[int],
        free_until: int | None,
        field: str,
    ) -> Callable[[], LogitRule]:
        """Return a function that makes the rule of one completion.

        Args:
            grammar: a grammar of llguidance, in Lark's notation.
            end_ids: tokens that end the completion; they are allowed where the grammar ends.
            free_until: a token, such as the end of the reasoning, before which every token is
                allowed; None: the grammar begins with the first token.
            field: the field of the request that the grammar is from, for errors.

        Raises:
            UserError: llguidance is missing, or it cannot use the grammar or the vocabulary.
        """
        try:
            from llguidance import LLMatcher  # pyright: ignore[reportMissingImports] - optional
        except ImportError as error:
            raise UserError(
                f"{field} needs the package llguidance on the service; install "
                "tinker-cookbook[structured] there"
            ) from error
        if not end_ids:
            raise UserError(f"{field} needs a token that ends the reply; leave out stop_token_ids")
        if len(grammar) > _MAX_GRAMMAR:
            raise UserError(f"{field} is too large: at most {_MAX_GRAMMAR} characters are accepted")
        tokenizer = self._load(field)
        compiled = LLMatcher(tokenizer, grammar, log_level=0)
        if compiled.is_error():
            problem = compiled.get_error().split("\n")[0]
            raise UserError(f"{field} cannot be enforced: {problem}")
        ends = np.array(sorted(end_ids), np.int64)
        own_ends = np.array(tokenizer.eos_tokens, np.int64)
        return lambda: GrammarRule(compiled.deep_copy(), ends, own_ends, free_until)

    def _load(self, field: str) -> LLTokenizer:
        from llguidance import LLTokenizer  # pyright: ignore[reportMissingImports] - optional

        with self._lock:
            if self._tokenizer is None:
                size = max(self._vocab_size, self._source.get_vocab_size(with_added_tokens=True))
                try:
                    self._tokenizer = LLTokenizer(
                        self._source.to_str(), n_vocab=size, eos_token=_any_control(self._source)
                    )
                # The library reports what it does not know in several types.
                except Exception as error:
                    raise UserError(
                        f"{field} cannot be enforced with the tokenizer of this model: {error}"
                    ) from error
            return self._tokenizer


class GrammarRule:
    """The rule of one completion: only tokens with which the text can still match the grammar."""

    def __init__(
        self, matcher: LLMatcher, ends: np.ndarray, own_ends: np.ndarray, free_until: int | None
    ) -> None:
        """Begin a completion; see `GrammarCompiler.compile`.

        Args:
            matcher: the compiled grammar, which belongs to this rule.
            ends: int64, tokens that may follow a complete match.
            own_ends: int64, the tokens that the matcher uses for this.
            free_until: a token before which the rule is not in force.
        """
        self._matcher = matcher
        self._ends = ends
        self._own_ends = own_ends
        self._free_until = free_until

    def change(self, logits_V: np.ndarray) -> None:
        """Forbid all tokens that the grammar does not allow.

        Raises:
            UserError: the grammar became too complex for the library.
        """
        if self._free_until is not None:
            return
        allowed_V = self._allowed(len(logits_V))
        if not allowed_V.any():
            raise UserError(
                "the reply cannot continue within the required format: "
                f"{self._matcher.get_error() or 'no token is allowed'}. Simplify the schema"
            )
        logits_V[~allowed_V] = -np.inf

    def _allowed(self, vocab_size: int) -> np.ndarray:
        matcher = self._matcher
        if matcher.is_stopped() and not matcher.is_error():
            allowed_V = np.zeros(vocab_size, bool)
            is_complete = True
        else:
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            allowed_V = np.unpackbits(bits, bitorder="little").astype(bool)[:vocab_size]
            is_complete = matcher.is_accepting()
        allowed_V[self._own_ends] = False
        allowed_V[self._ends] = is_complete
        return allowed_V

    def add(self, token: int) -> None:
        """Advance in the grammar."""
        if self._free_until is None:
            self._matcher.consume_token(token)
        elif token == self._free_until:
            self._free_until = None


def _any_control(tokenizer: Tokenizer) -> list[int]:
    """Return a token that the library may use as the end of a text: it is never allowed itself."""
    added = tokenizer.get_added_tokens_decoder()
    special: Iterator[int] = (token for token, entry in added.items() if entry.special)
    return [next(special, 0)]
