"""The reader of gpt-oss's replies: several messages, each with a header that names its channel."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import NamedTuple

from tinker_cookbook.replies.grammar import Mark
from tinker_cookbook.replies.json_calls import build_call
from tinker_cookbook.replies.pieces import (
    UNTERMINATED_CALL_ERROR,
    BadCall,
    ReadCall,
    TextPiece,
    ThoughtPiece,
)

__all__ = ["HARMONY_MARKS", "HarmonyReader", "HarmonyTokens"]

_RECIPIENT = r"\s*(?:to=(?P<{0}>[^\s<]+))?\s*"
_HEADER = re.compile(
    r"(?:<\|start\|>assistant)?"
    + _RECIPIENT.format("before")
    + r"<\|channel\|>(?P<channel>analysis|commentary|final)"
    + _RECIPIENT.format("after")
    + r"(?:<\|constrain\|>)?\s*(?P<type>\w*)<\|message\|>"
)


class HarmonyTokens(NamedTuple):
    """The control tokens of the format."""

    start: int
    message: int
    end: int
    channel: int
    constrain: int
    call: int
    stop: int
    """`<|return|>`."""


HARMONY_MARKS = (
    *("<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|constrain|>", "<|call|>"),
    "<|return|>",
)
"""In the order of `HarmonyTokens`."""


class _State(Enum):
    HEADER = auto()
    TEXT = auto()
    THINK = auto()
    CALL = auto()
    BETWEEN = auto()
    """`<|end|>`: the message ends and the turn continues."""


class HarmonyReader:
    """Reads a reply of several messages.

    Text of the channels `final` and `commentary` is text, `analysis` is reasoning, and a message to
    `functions.NAME` is a call. A header that is not understood is text, and so is what follows it.
    """

    def __init__(
        self,
        tokens: HarmonyTokens,
        mark_text: Callable[[Mark], str] = str,
        *,
        keeps_call: Callable[[ReadCall], bool] | None = None,
    ) -> None:
        """Prepare for a reply.

        Args:
            tokens: the marks of the format.
            mark_text: returns a mark as text.
            keeps_call: decides which calls count; the others are text. If given, the end of a reply
                also closes a call.
        """
        self._tokens = tokens
        self._mark_text = mark_text
        self._keeps_call = keeps_call
        self._state = _State.HEADER
        self._header = ""
        self._marked = ""
        self._call_name: str | None = None
        self._call_body = ""

    def text(self, text: str) -> Iterator[object]:
        """Take more text."""
        if self._state is _State.HEADER:
            self._header += text
            # Typed marks must not read as control tokens.
            self._marked += text.replace("<|", "<\0|")
        elif self._state is _State.CALL:
            self._call_body += text
        elif text and self._state is _State.THINK:
            yield ThoughtPiece(text)
        elif text:
            yield TextPiece(text)

    def mark(self, mark: Mark) -> Iterator[object]:
        """Take a mark; `<|call|>` ends the reply."""
        tokens = self._tokens
        if mark == tokens.call:
            yield from self._end_message(None)
            self._state = _State.BETWEEN
        elif mark == tokens.end and self._state not in (_State.HEADER, _State.BETWEEN):
            yield from self._end_message("the call does not end in <|call|>")
            self._state = _State.BETWEEN
        elif mark == tokens.start and self._state is _State.BETWEEN:
            self._state = _State.HEADER
            self._add_to_header(mark)
        elif self._state is _State.HEADER and mark in (tokens.channel, tokens.constrain):
            self._add_to_header(mark)
        elif self._state is _State.HEADER and mark == tokens.message:
            self._add_to_header(mark)
            yield from self._read_header()
        else:
            yield from self._release_header()
            yield from self.text(self._mark_text(mark))

    def end(self, *, is_cut: bool) -> Iterator[object]:
        """Take the end of the reply."""
        error = UNTERMINATED_CALL_ERROR if is_cut else "the call does not end in <|call|>"
        yield from self._end_message(None if self._keeps_call else error)
        self._state = _State.BETWEEN

    def _add_to_header(self, mark: Mark) -> None:
        name = self._mark_text(mark)
        self._header += name
        self._marked += name

    def _read_header(self) -> Iterator[object]:
        found = _HEADER.fullmatch(self._marked)
        recipient = found and (found["before"] or found["after"])
        if found is None or (found["before"] and found["after"]):
            yield from self._release_header()
        elif recipient:
            self._state, self._call_name, self._call_body = _State.CALL, recipient, ""
        else:
            is_thinking = found["channel"] == "analysis"
            self._state = _State.THINK if is_thinking else _State.TEXT
            self._header = self._marked = ""

    def _release_header(self) -> Iterator[object]:
        """Yield the pending header as text."""
        if self._state is _State.HEADER:
            header, self._header, self._marked = self._header, "", ""
            self._state = _State.TEXT
            yield from self.text(header)

    def _end_message(self, call_error: str | None) -> Iterator[object]:
        """End the open message; with an error, an open call becomes a bad call."""
        if self._state is _State.HEADER:
            yield from self._release_header()
        elif self._state is _State.CALL:
            raw_text = self._header + self._call_body
            self._header = self._marked = ""
            name = (self._call_name or "").removeprefix("functions.")
            if call_error is None and name == self._call_name:
                call_error = f"the recipient {name!r} is not functions.NAME"
            if call_error is not None:
                call = BadCall(raw_text, call_error)
            else:
                call = build_call(name, self._call_body, raw_text + "<|call|>")
            if self._keeps_call is None or self._keeps_call(call):
                yield call
            else:
                yield TextPiece(raw_text)
