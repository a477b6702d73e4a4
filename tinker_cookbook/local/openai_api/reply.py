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

from tinker_cookbook.replies.grammar import Grammar, TextMark, Tolerance, WholeCalls
from tinker_cookbook.replies.json_calls import build_call, read_json_calls, read_whole_reply
from tinker_cookbook.replies.json_source import ends_in_string
from tinker_cookbook.replies.pair_calls import PAIR_MARKS, read_pair_text
from tinker_cookbook.replies.pieces import BadCall, Call, ReadCall, TextPiece, ThoughtPiece
from tinker_cookbook.replies.reader import ReplyReader as MarkReader
from tinker_cookbook.replies.scanner import MarkScanner
from tinker_cookbook.replies.schema import fit_arguments, parameters_of
from tinker_cookbook.replies.tag_calls import PYTHON_WORDS, read_tag_calls, tags_are_open

__all__ = ["INNER_MARKS", "MARKS", "Piece", "ReplyReader", "split_reasoning"]

THINK, END_THINK = TextMark("<think>"), TextMark("</think>")
CALL, END_CALL = TextMark("<tool_call>"), TextMark("</tool_call>")
MISTRAL_CALLS, MISTRAL_ID, MISTRAL_ARGUMENTS = TextMark("[TOOL_CALLS]"), "[CALL_ID]", "[ARGS]"
PYTHON_TAG = TextMark("<|python_tag|>")
MARKS = (THINK, END_THINK, CALL, END_CALL, MISTRAL_CALLS, PYTHON_TAG)
"""What structures a reply, by token or by text."""
INNER_MARKS = (MISTRAL_ID, MISTRAL_ARGUMENTS, *PAIR_MARKS)
"""What structures a call from within; read from its text."""

_ARGUMENT_KEYS = ("arguments", "parameters")
_ANY_NUMBER = 2**31


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
        known = MARKS if self._tool_names else (THINK, END_THINK)
        in_text = [mark for mark in known if mark not in token_marks]
        self._reader = MarkScanner(MarkReader(self._grammar(starts_in_thinking)), in_text)

    def push(self, text: str) -> Iterator[Piece]:
        """Take more text."""
        return self._show(self._reader.text(text))

    def mark(self, mark: str) -> Iterator[Piece]:
        """Take a token that is one of `MARKS`."""
        return self._show(self._reader.mark(TextMark(mark)))

    def finish(self) -> Iterator[Piece]:
        """Take the end of the reply."""
        return self._show(self._reader.end(is_cut=False))

    def _grammar(self, starts_in_thinking: bool) -> Grammar:
        has_tools = bool(self._tool_names)
        tolerance = Tolerance(
            thinks_first=True,
            bad_calls_are_text=True,
            other_calls=((MISTRAL_CALLS, None),) if has_tools else (),
            unclosed_calls_count=True,
            call_is_open=_is_open,
        )
        return Grammar(
            think=(THINK, END_THINK),
            starts_in_thinking=starts_in_thinking,
            call=(CALL, END_CALL) if has_tools else None,
            parse_call=self._parse_call,
            think_newlines=(_ANY_NUMBER, _ANY_NUMBER, _ANY_NUMBER),
            newlines_before_call=_ANY_NUMBER if has_tools else 0,
            calls_on_lines=True,
            newlines_after_call=_ANY_NUMBER,
            newlines_at_start=_ANY_NUMBER if starts_in_thinking else 0,
            whole_calls=WholeCalls(self._parse_whole, ("{",), PYTHON_TAG) if has_tools else None,
            tolerance=tolerance,
        )

    # ---- calls ----

    def _parse_call(self, parts: Sequence[str | int], raw_text: str) -> Sequence[ReadCall]:
        """Read what stands between marks in whatever notation it is; all of it or nothing."""
        body = "".join(map(str, parts))
        if raw_text.startswith(MISTRAL_CALLS):
            calls = _read_mistral(body, raw_text)
        elif body.lstrip().startswith(("{", "[")):
            calls = _read_json(body, raw_text)
        elif body.lstrip().startswith("<function="):
            tagged = read_tag_calls(body, raw_text, PYTHON_WORDS, is_strict=False)
            calls = [self._typed(call) for call in tagged]
        else:
            calls = [self._typed(read_pair_text(body, raw_text))]
        return self._declared(calls) or [BadCall(raw_text, "no call of a declared tool")]

    def _parse_whole(self, text: str) -> Sequence[ReadCall] | None:
        return self._declared(read_whole_reply(text, keys=_ARGUMENT_KEYS, may_hold_more=True) or ())

    def _declared(self, calls: Iterable[ReadCall]) -> list[ReadCall]:
        """Return the calls if all are of declared tools; else none."""
        found = list(calls)
        names = {call.name if isinstance(call, Call) else None for call in found}
        return found if names <= self._tool_names else []

    def _typed(self, call: ReadCall) -> ReadCall:
        """Return a call in a notation without types, with the types that its tool declares."""
        if isinstance(call, BadCall):
            return call
        parameters = parameters_of(self._tools, call.name)
        fitted = fit_arguments(call.arguments, parameters, PYTHON_WORDS, reads_texts=True)
        return Call(call.name, fitted)

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


def _read_json(body: str, raw_text: str) -> Sequence[ReadCall]:
    return read_json_calls(body, raw_text, keys=_ARGUMENT_KEYS, may_hold_more=True)


def _read_mistral(body: str, raw_text: str) -> Sequence[ReadCall]:
    """Read a list of calls in JSON, or a name, maybe an id, and arguments."""
    name, found, arguments = body.partition(MISTRAL_ARGUMENTS)
    if not found:
        return _read_json(body, raw_text)
    return [build_call(name.partition(MISTRAL_ID)[0].strip(), arguments.strip(), raw_text)]


def _is_open(body: str) -> bool:
    """Whether the beginning of a call ends within a value, in any notation."""
    if body.lstrip().startswith("<function="):
        return tags_are_open(body)
    last_key, last_end = (body.rfind(mark) for mark in PAIR_MARKS[2:])
    return last_key > last_end if last_key >= 0 else ends_in_string(body)
