"""What a sampled text says to an OpenAI client: reasoning, content and tool calls, while it grows.

The reading is that of `tinker_cookbook.replies`, with what clients of many models need: all marks
that open models use are known, line breaks around them do not count, calls that cannot be read or
name no declared tool stay text, and arguments have the types that their tool declares.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tinker_cookbook.replies.grammar import TextMark
from tinker_cookbook.replies.loose import (
    END_THINK,
    INNER_MARKS,
    MARKS,
    THINK,
    loose_grammar,
    read_calls,
    read_whole,
)
from tinker_cookbook.replies.pieces import BadCall, Call, ReadCall, TextPiece, ThoughtPiece
from tinker_cookbook.replies.reader import ReplyReader as MarkReader
from tinker_cookbook.replies.scanner import MarkScanner

__all__ = ["INNER_MARKS", "MARKS", "Piece", "ReplyReader", "split_reasoning"]


@dataclass(frozen=True)
class Piece:
    """The next part of a reply."""

    kind: Literal["content", "reasoning", "tool_call"]
    text: str = ""
    call: dict[str, Any] = field(default_factory=dict)
    """A tool call as the OpenAI API shows it."""


def split_reasoning(text: str) -> tuple[str | None, str]:
    """Separate a leading `<think>` block from the rest of a text."""
    head, separator, rest = text.partition(END_THINK)
    if not separator or not head.lstrip().startswith(THINK):
        return None, text
    return head.lstrip().removeprefix(THINK).strip("\n"), rest.lstrip("\n")


class ReplyReader:
    """Takes a reply in pieces of any size and yields what it is made of."""

    def __init__(
        self,
        *,
        starts_in_thinking: bool,
        tool_names: Collection[str] = (),
        tools: Sequence[Mapping[str, Any]] = (),
        token_marks: Collection[str] = (),
    ) -> None:
        """Begin empty.

        Args:
            starts_in_thinking: the prompt has opened the reasoning.
            tool_names: tools that may be called, besides those of `tools`.
            tools: declarations as in the OpenAI API; their schemas give arguments their types.
            token_marks: of `MARKS`, those that are tokens of the vocabulary. They come by `mark`
                alone; the same letters in a text are text.
        """
        self._tools = tools
        declared = (tool.get("function", tool).get("name") for tool in tools)
        self._tool_names = frozenset(tool_names) | frozenset(declared)
        has_tools = bool(self._tool_names)
        grammar = loose_grammar(
            starts_in_thinking=starts_in_thinking,
            parse_call=self._parse_call if has_tools else None,
            parse_whole=self._parse_whole if has_tools else None,
        )
        known = MARKS if has_tools else (THINK, END_THINK)
        in_text = [mark for mark in known if mark not in token_marks]
        self._reader = MarkScanner(MarkReader(grammar), in_text)

    def push(self, text: str) -> Iterator[Piece]:
        """Take more text."""
        return self._show(self._reader.text(text))

    def mark(self, mark: str) -> Iterator[Piece]:
        """Take a token that is one of `MARKS`."""
        return self._show(self._reader.mark(TextMark(mark)))

    def finish(self) -> Iterator[Piece]:
        """Take the end of the reply."""
        return self._show(self._reader.end(is_cut=False))

    def _parse_call(self, parts: Sequence[str | int], raw_text: str) -> Sequence[ReadCall]:
        """Read what stands between marks; all of it or nothing."""
        calls = read_calls("".join(map(str, parts)), raw_text, self._tools)
        return self._declared(calls) or [BadCall(raw_text, "no call of a declared tool")]

    def _parse_whole(self, text: str) -> Sequence[ReadCall] | None:
        return self._declared(read_whole(text) or ())

    def _declared(self, calls: Iterable[ReadCall]) -> list[ReadCall]:
        """Return the calls if all are of declared tools; else none."""
        found = list(calls)
        names = {call.name if isinstance(call, Call) else None for call in found}
        return found if names <= self._tool_names else []

    def _show(self, pieces: Iterable[Any]) -> Iterator[Piece]:
        for piece in pieces:
            if isinstance(piece, ThoughtPiece):
                yield Piece("reasoning", piece.text)
            elif isinstance(piece, TextPiece):
                yield Piece("content", piece.text)
            elif isinstance(piece, Call):
                yield Piece("tool_call", call=_shown(piece))


def _shown(call: Call) -> dict[str, Any]:
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
