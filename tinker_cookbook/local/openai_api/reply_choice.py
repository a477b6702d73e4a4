"""One completion as the OpenAI API shows it, built token by token: text, tool calls, logprobs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from tinker_cookbook.dialects.pieces import Piece
from tinker_cookbook.local.engine.types import SampledSequence
from tinker_cookbook.local.openai_api.codec import StopCutter, TextCodec, TextStream
from tinker_cookbook.local.openai_api.reply import ReplyReader
from tinker_cookbook.local.openai_api.sampling import Drawn
from tinker_cookbook.local.service.protocol.json_body import JsonObject

__all__ = ["Choice", "FinishReason", "LogprobEntry", "draws_of"]

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class LogprobEntry:
    """A token of the text with its logprob, and the most likely tokens at its position."""

    drawn: Drawn
    offset: int
    """Position of its text in the completion, in characters."""


class Choice:
    """Turns the tokens of one completion into its shown text, tool calls and logprobs."""

    def __init__(
        self,
        codec: TextCodec,
        *,
        end_ids: frozenset[int],
        stops: Sequence[str],
        reader: ReplyReader | None = None,
        after: Sequence[int] = (),
    ) -> None:
        """Begin empty.

        Args:
            codec: text codec of the model.
            end_ids: tokens that end the completion and are not shown.
            stops: texts that end the completion.
            reader: splits the text into reasoning, content and tool calls; None: all is content.
            after: last tokens of the prompt, whose text the completion continues.
        """
        self.codec = codec
        self.token_ids: list[int] = []
        self.entries: list[LogprobEntry] = []
        self.end_entries: list[LogprobEntry] = []
        """The end token, which has no text."""
        self.num_calls = 0
        self._end_ids = end_ids
        self._stream = TextStream(codec, after=after)
        self._cutter = StopCutter(stops)
        self._reader = reader
        self._pending: list[tuple[str, bool]] = []
        """Texts that a stop may still cut off, each with whether it is a mark."""
        self._length = 0
        self._shown_length = 0
        self._num_taken = 0
        self._is_finished = False
        self._num_shown_calls = 0

    def push(self, drawn: Drawn) -> list[Piece]:
        """Add a token; returns the pieces that it completes."""
        self.token_ids.append(drawn.token)
        if drawn.token in self._end_ids:
            self.end_entries.append(LogprobEntry(drawn, self._length))
            return []
        self.entries.append(LogprobEntry(drawn, self._length))
        mark = self.codec.mark_texts.get(drawn.token)
        if self._reader is None or mark is None:
            return self._take(self._stream.push(drawn.token))
        return self._take(self._stream.finish()) + self._take(mark, is_mark=True)

    def finish(self) -> list[Piece]:
        """End the completion; returns the pieces that were held back."""
        pieces = self._take(self._stream.finish())
        pieces += self._release(len(self._cutter.finish()))
        if self._reader is not None:
            pieces += self._counted(self._reader.finish())
        self._is_finished = True
        if self._cutter.found is not None:
            self.entries = [entry for entry in self.entries if entry.offset < self._shown_length]
        return pieces

    def _take(self, text: str, *, is_mark: bool = False) -> list[Piece]:
        if not text:
            return []
        self._length += len(text)
        self._pending.append((text, is_mark))
        return self._release(len(self._cutter.push(text)))

    def _release(self, length: int) -> list[Piece]:
        """Read the next characters, which no stop can cut off any more."""
        self._shown_length += length
        pieces: list[Piece] = []
        while length and self._pending:
            text, is_mark = self._pending.pop(0)
            if len(text) > length:
                self._pending.insert(0, (text[length:], False))
                text, is_mark = text[:length], False
            length -= len(text)
            pieces += self._read(text, is_mark=is_mark)
        return pieces

    def _read(self, text: str, *, is_mark: bool) -> list[Piece]:
        if self._reader is None:
            return [Piece("content", text)]
        return self._counted(self._reader.mark(text) if is_mark else self._reader.push(text))

    def _counted(self, pieces: Iterable[Piece]) -> list[Piece]:
        found = list(pieces)
        self.num_calls += sum(piece.kind == "tool_call" for piece in found)
        return found

    def take_entries(self) -> list[LogprobEntry]:
        """Return the entries of text that has been shown since the last call.

        At the end of the completion, all remaining entries are returned, also of tokens without
        text.
        """
        first, end = self._num_taken, self._num_taken
        if self._is_finished:
            end = len(self.entries)
        while end < len(self.entries) and self.entries[end].offset < self._shown_length:
            end += 1
        self._num_taken = end
        return self.entries[first:end]

    def next_call_index(self) -> int:
        """Return the index of the next streamed tool call."""
        self._num_shown_calls += 1
        return self._num_shown_calls - 1

    @property
    def stop_text(self) -> str | None:
        """The stop text of the request that ended the completion, if one did."""
        return self._cutter.found

    def finish_reason(self, stop_reason: str) -> FinishReason:
        if stop_reason != "stop":
            return "length"
        return "tool_calls" if self.num_calls else "stop"

    def chat_logprobs(self, entries: Sequence[LogprobEntry]) -> JsonObject:
        """Return the `logprobs` object of a chat choice."""
        return {"content": [self._chat_entry(entry.drawn) for entry in entries], "refusal": None}

    def _chat_entry(self, drawn: Drawn) -> JsonObject:
        top = [self._chat_token(token, logprob) for token, logprob in drawn.top]
        return self._chat_token(drawn.token, drawn.logprob) | {"top_logprobs": top}

    def _chat_token(self, token: int, logprob: float) -> JsonObject:
        return {
            "token": self.codec.token_text(token),
            "logprob": max(logprob, -9999.0),
            "bytes": self.codec.token_bytes(token),
        }

    def completion_logprobs(
        self, entries: Sequence[LogprobEntry], *, offset: int = 0
    ) -> dict[str, list[object]]:
        """Return the `logprobs` object of a completion choice, with `offset` added."""
        drawn = [entry.drawn for entry in entries]
        return {
            "tokens": [self.codec.token_text(item.token) for item in drawn],
            "token_logprobs": [max(item.logprob, -9999.0) for item in drawn],
            "top_logprobs": [
                {self.codec.token_text(token): logprob for token, logprob in item.top}
                for item in drawn
            ],
            "text_offset": [offset + entry.offset for entry in entries],
        }


def draws_of(sequence: SampledSequence) -> list[Drawn]:
    """Return the tokens of a finished completion."""
    top = sequence.topk_logprobs
    rows: list[tuple[tuple[int, float], ...]] = [()] * len(sequence.tokens)
    if top is not None:
        rows = [
            tuple(zip(ids, logprobs, strict=True))
            for ids, logprobs in zip(top.token_ids.tolist(), top.logprobs.tolist(), strict=True)
        ]
    return [
        Drawn(0, token, logprob, row)
        for token, logprob, row in zip(
            sequence.tokens.tolist(), sequence.logprobs.tolist(), rows, strict=True
        )
    ]
