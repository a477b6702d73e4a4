"""Parsing a reply of gpt-oss; see `tinker_cookbook.replies.harmony`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tinker_cookbook.renderers.encoding.encoder import TextEncoder
from tinker_cookbook.renderers.parsing import TokenParser
from tinker_cookbook.renderers.types import MessageDelta
from tinker_cookbook.replies.grammar import Mark
from tinker_cookbook.replies.harmony import HARMONY_MARKS, HarmonyReader, HarmonyTokens

__all__ = ["CALL_TEXT", "HARMONY_MARKS", "HarmonyParser", "HarmonyTokens"]

CALL_TEXT = re.compile(
    r"(?:<\|start\|>assistant)?(?P<recipient>[^<]*)<\|channel\|>(?P<channel>.*?)<\|message\|>"
    r"(?P<body>.*?)(?:<\|call\|>)?",
    re.DOTALL,
)
"""Matches a call as text with its markers, as in `UnparsedToolCall.raw_text`."""


class HarmonyParser(TokenParser):
    """Parses a reply of several messages."""

    def __init__(self, encoder: TextEncoder, tokens: HarmonyTokens) -> None:
        self._tokens = tokens
        document_end = encoder.control_id("<|endoftext|>")
        self._eos = frozenset() if document_end is None else frozenset([document_end])
        ends = (tokens.stop, tokens.call, *self._eos)
        super().__init__(encoder, control=(*tokens, *self._eos), ends=ends)
        self._reader = HarmonyReader(tokens, self._mark_text)

    def _mark_text(self, mark: Mark) -> str:
        return self._encoder.decode([mark]) if isinstance(mark, int) else str(mark)

    def _text(self, text: str) -> Iterator[MessageDelta]:
        return self._builder.add(self._reader.text(text))

    def _control_token(self, token: int) -> Iterator[MessageDelta]:
        if token == self._tokens.stop or token in self._eos:
            yield from self._builder.add(self._reader.end(is_cut=False))
        else:
            yield from self._builder.add(self._reader.mark(token))
        if token in (self._tokens.stop, self._tokens.call) or token in self._eos:
            self._end(is_eos=token in self._eos)

    def _cut(self) -> Iterator[MessageDelta]:
        return self._builder.add(self._reader.end(is_cut=True))
