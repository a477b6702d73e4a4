"""Reading a sampled reply: tokens in, deltas and a message out.

The parser works on token ids, so a marker that the model typed as ordinary text (for example inside
an argument of a tool call) is text. `tinker_cookbook.replies`, which the local service uses too,
defines what tokens and text mean. There is one parser only: a whole reply is fed to it at once, so
streaming gives the same result by construction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Protocol

from tinker_cookbook.renderers.encoding.encoder import TextEncoder, Utf8TokenDecoder
from tinker_cookbook.renderers.tool_calls import as_tool_call
from tinker_cookbook.renderers.types import (
    ContentPart,
    Message,
    MessageDelta,
    ParseTermination,
    StreamingTextDelta,
    StreamingThinkingDelta,
    TextPart,
    ThinkingPart,
    ToolCall,
    UnparsedToolCall,
)
from tinker_cookbook.replies.grammar import CallParser, Grammar, Mark, parse_json_call
from tinker_cookbook.replies.pieces import BadCall, Call, TextPiece, ThoughtPiece
from tinker_cookbook.replies.reader import ReplyReader
from tinker_cookbook.replies.scanner import PieceReader

__all__ = [
    "CallParser",
    "Grammar",
    "MessageBuilder",
    "ParsedCall",
    "ReplyParser",
    "ResponseParser",
    "TokenParser",
    "parse_json_call",
]

ParsedCall = ToolCall | UnparsedToolCall


class ReplyParser(Protocol):
    """Interface of every format's parser."""

    def feed(self, tokens: Iterable[int]) -> Iterator[MessageDelta]:
        """Take more tokens and yield the deltas that they complete. Always exhaust the iterator."""
        ...

    def finish(self) -> Iterator[MessageDelta]:
        """Take the end of the tokens and yield what was held back."""
        ...

    def result(self) -> tuple[Message, ParseTermination]:
        """Return the message and how it ended; call it after `finish`."""
        ...


class MessageBuilder:
    """Collects deltas into the parts of a message."""

    def __init__(self) -> None:
        self._parts: list[tuple[type, list[str]]] = []
        self.calls: list[ToolCall] = []
        self.unparsed: list[UnparsedToolCall] = []

    def text(self, text: str) -> Iterator[MessageDelta]:
        """Add text, yielding its delta."""
        if text:
            yield StreamingTextDelta(text, self._append(StreamingTextDelta, text))

    def thinking(self, text: str) -> Iterator[MessageDelta]:
        """Add reasoning, yielding its delta."""
        if text:
            yield StreamingThinkingDelta(text, self._append(StreamingThinkingDelta, text))

    def add(self, pieces: Iterable[object]) -> Iterator[MessageDelta]:
        """Add the pieces that a reader yields, yielding their deltas."""
        for piece in pieces:
            if isinstance(piece, TextPiece):
                yield from self.text(piece.text)
            elif isinstance(piece, ThoughtPiece):
                yield from self.thinking(piece.text)
            else:
                self.call(piece)

    def call(self, call: object) -> None:
        """Add a tool call."""
        if isinstance(call, Call | BadCall):
            call = as_tool_call(call)
        if isinstance(call, ToolCall):
            self.calls.append(call)
        else:
            assert isinstance(call, UnparsedToolCall), "a reader yields nothing else"
            self.unparsed.append(call)

    def _append(self, kind: type, text: str) -> int:
        if not self._parts or self._parts[-1][0] is not kind:
            self._parts.append((kind, []))
        self._parts[-1][1].append(text)
        return len(self._parts) - 1

    def message(self) -> Message:
        """Return the message. Its content is a string, or a list of parts if there is reasoning."""
        if all(kind is StreamingTextDelta for kind, _ in self._parts):
            text = "".join(piece for _, pieces in self._parts for piece in pieces)
            message = Message(role="assistant", content=text)
        else:
            message = Message(role="assistant", content=[_part(*part) for part in self._parts])
        if self.calls:
            message["tool_calls"] = list(self.calls)
        if self.unparsed:
            message["unparsed_tool_calls"] = list(self.unparsed)
        return message


def _part(kind: type, pieces: list[str]) -> ContentPart:
    text = "".join(pieces)
    if kind is StreamingThinkingDelta:
        return ThinkingPart(type="thinking", thinking=text)
    return TextPart(type="text", text=text)


class TokenParser(ABC):
    """Parses one reply, fed in chunks of any size, with the same result.

    Subclasses define what control tokens and text mean. Text is passed in whole characters.
    """

    def __init__(
        self, encoder: TextEncoder, *, control: Iterable[int], ends: Iterable[int]
    ) -> None:
        """Prepare for a reply.

        Args:
            encoder: the renderer's encoder.
            control: tokens that structure a reply, and those that end it.
            ends: control tokens that may follow the end of a reply without being text.
        """
        self._encoder = encoder
        self._decoder = Utf8TokenDecoder(encoder)
        self._builder = MessageBuilder()
        self._control = frozenset(control)
        self._ends = frozenset(ends)
        self._is_done = False
        self._trailing: list[int] = []
        self._termination = ParseTermination.MALFORMED

    def feed(self, tokens: Iterable[int]) -> Iterator[MessageDelta]:
        """Take more tokens and yield the deltas that they complete. Always exhaust the iterator."""
        run: list[int] = []
        for token in tokens:
            if self._is_done:
                self._trailing.append(token)
            elif token in self._control:
                yield from self._text(self._decoder.decode_text(run))
                run = []
                yield from self._text(self._decoder.flush())
                yield from self._control_token(token)
            else:
                run.append(token)
        if run:
            yield from self._text(self._decoder.decode_text(run))

    def finish(self) -> Iterator[MessageDelta]:
        """Take the end of the tokens and yield what was held back."""
        if not self._is_done:
            yield from self._text(self._decoder.flush())
            yield from self._cut()

    def result(self) -> tuple[Message, ParseTermination]:
        """Return the message and how it ended; call it after `finish`."""
        message = self._builder.message()
        if all(token in self._ends for token in self._trailing):
            return message, self._termination
        message["trailing_text"] = self._encoder.decode(self._trailing)
        return message, ParseTermination.MALFORMED

    def _end(self, *, is_eos: bool) -> None:
        """Record that the reply has ended; what follows is trailing text."""
        self._termination = ParseTermination.EOS if is_eos else ParseTermination.STOP_SEQUENCE
        self._is_done = True

    @abstractmethod
    def _text(self, text: str) -> Iterator[MessageDelta]:
        """Take text; it may be empty."""

    @abstractmethod
    def _control_token(self, token: int) -> Iterator[MessageDelta]:
        """Take a control token; the text before it has been passed already."""

    @abstractmethod
    def _cut(self) -> Iterator[MessageDelta]:
        """Take the end of a reply that was cut off."""


class ResponseParser(TokenParser):
    """Parses a reply whose tokens a grammar describes."""

    def __init__(
        self, encoder: TextEncoder, grammar: Grammar, reader: PieceReader | None = None
    ) -> None:
        """Prepare for a reply.

        Args:
            encoder: the renderer's encoder.
            grammar: names the tokens that structure a reply.
            reader: takes text and marks; by default, one that obeys the grammar.
        """
        self._grammar = grammar
        pairs = (grammar.think, grammar.call, grammar.call_section)
        marks = {mark for pair in pairs for mark in pair or ()} | grammar.call_marks
        if grammar.whole_calls is not None:
            marks.add(grammar.whole_calls.mark)
        ends = grammar.stop | grammar.eos
        tokens = {mark for mark in marks if isinstance(mark, int)}
        super().__init__(encoder, control=ends | tokens, ends=ends)
        self._reader = reader or ReplyReader(grammar, self.mark_text)

    def mark_text(self, mark: Mark) -> str:
        """Return a mark as text."""
        return self._encoder.decode([mark]) if isinstance(mark, int) else str(mark)

    def _control_token(self, token: int) -> Iterator[MessageDelta]:
        if token in self._grammar.stop or token in self._grammar.eos:
            yield from self._builder.add(self._reader.end(is_cut=False))
            self._end(is_eos=token not in self._grammar.stop)
        else:
            yield from self._builder.add(self._reader.mark(token))

    def _text(self, text: str) -> Iterator[MessageDelta]:
        return self._builder.add(self._reader.text(text))

    def _cut(self) -> Iterator[MessageDelta]:
        return self._builder.add(self._reader.end(is_cut=True))
