"""Split a sampled text into reasoning, content and tool calls for OpenAI clients, as it grows.

The parser is `tinker_cookbook.replies`, with rules that fit many models: it knows all marks that
open models use, ignores line breaks around marks, keeps calls as text if they cannot be read or do
not name a declared tool, and converts arguments to the types that their tool declares.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from tinker_cookbook.dialects.pieces import Piece
from tinker_cookbook.local.service.protocol.json_body import JsonObject
from tinker_cookbook.replies.grammar import TextMark
from tinker_cookbook.replies.harmony import HARMONY_MARKS, HarmonyReader, HarmonyTokens
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
from tinker_cookbook.replies.scanner import MarkScanner, PieceReader

__all__ = ["INNER_MARKS", "MARKS", "Piece", "ReplyReader", "marks_among", "split_reasoning"]


def marks_among(names: Collection[str]) -> frozenset[str]:
    """Return which of a vocabulary's control tokens structure a reply.

    If all marks of gpt-oss are in the vocabulary, these are the only ones.
    """
    harmony = frozenset(HARMONY_MARKS)
    return harmony if harmony <= set(names) else frozenset(MARKS) & set(names)


def split_reasoning(text: str) -> tuple[str | None, str]:
    """Separate a leading `<think>` block from the rest of a text."""
    head, separator, rest = text.partition(END_THINK)
    if not separator or not head.lstrip().startswith(THINK):
        return None, text
    return head.lstrip().removeprefix(THINK).strip("\n"), rest.lstrip("\n")


class ReplyReader:
    """Reads a reply in parts of any size and yields its pieces."""

    def __init__(
        self,
        *,
        starts_in_thinking: bool,
        tool_names: Collection[str] = (),
        tools: Sequence[Mapping[str, object]] = (),
        token_marks: Collection[str] = (),
    ) -> None:
        """Begin empty.

        Args:
            starts_in_thinking: whether the prompt ends inside the reasoning.
            tool_names: tools that may be called, in addition to `tools`.
            tools: tool declarations as in the OpenAI API; their schemas give arguments their types.
            token_marks: marks that are tokens of the vocabulary. They are passed to `mark`; the
                same letters in a text are text.
        """
        self._tools = tools
        declared = map(_declared_name, tools)
        self._tool_names = frozenset(tool_names) | frozenset(declared)
        has_tools = bool(self._tool_names)
        self._is_harmony = set(HARMONY_MARKS) <= set(token_marks)
        if self._is_harmony:
            self._reader: PieceReader = HarmonyReader(
                HarmonyTokens(*range(len(HARMONY_MARKS))),
                lambda mark: HARMONY_MARKS[int(mark)],
                keeps_call=lambda call: bool(self._declared([call])),
            )
            return
        grammar = loose_grammar(
            starts_in_thinking=starts_in_thinking,
            parse_call=self._parse_call if has_tools else None,
            parse_whole=self._parse_whole if has_tools else None,
        )
        known = MARKS if has_tools else (THINK, END_THINK)
        in_text = [mark for mark in known if mark not in token_marks]
        self._reader = MarkScanner(MarkReader(grammar), in_text)

    def push(self, text: str) -> Iterator[Piece]:
        """Add text."""
        return self._show(self._reader.text(text))

    def mark(self, mark: str) -> Iterator[Piece]:
        """Add a token that is one of `token_marks`."""
        known = HARMONY_MARKS.index(mark) if self._is_harmony else TextMark(mark)
        return self._show(self._reader.mark(known))

    def finish(self) -> Iterator[Piece]:
        """End the reply."""
        return self._show(self._reader.end(is_cut=False))

    def _parse_call(self, parts: Sequence[str | int], raw_text: str) -> Sequence[ReadCall]:
        """Read the calls between two marks. If one is wrong, all of them stay text."""
        calls = read_calls("".join(map(str, parts)), raw_text, self._tools)
        return self._declared(calls) or [BadCall(raw_text, "no call of a declared tool")]

    def _parse_whole(self, text: str) -> Sequence[ReadCall] | None:
        return self._declared(read_whole(text) or ())

    def _declared(self, calls: Iterable[ReadCall]) -> list[ReadCall]:
        """Return the calls if all of them name declared tools, or else no calls."""
        found = list(calls)
        names = {call.name if isinstance(call, Call) else None for call in found}
        return found if names <= self._tool_names else []

    def _show(self, pieces: Iterable[object]) -> Iterator[Piece]:
        for piece in pieces:
            if isinstance(piece, ThoughtPiece):
                yield Piece("reasoning", piece.text)
            elif isinstance(piece, TextPiece):
                yield Piece("content", piece.text)
            elif isinstance(piece, Call):
                yield Piece("tool_call", call=_shown(piece))


def _declared_name(tool: Mapping[str, object]) -> object:
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, Mapping) else None


def _shown(call: Call) -> JsonObject:
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
