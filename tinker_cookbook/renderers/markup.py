"""Converting reasoning and tool calls in the text of a reply into parts of the message.

Most public data writes a reply as one text: `<think>`, the reasoning, `</think>`, the answer, and
calls between `<tool_call>` and `</tool_call>`. A renderer takes text literally: it would write an
empty think block and train the tags as letters. So code that reads data from elsewhere converts it
first:

    message, count = structure_reply_markup({"role": "assistant", "content": "<think>add</think>4"})

What is converted:
 - `<think>...</think>` at the start of a text, or on separate lines further down;
 - reasoning without an opening tag (it was in the prompt): a `</think>` alone on its line, in a
   text without `<think>`;
 - calls at the end of a text. A call followed by text stays, because the text would be moved before
   it.
Tags of reasoning may be in capitals or have attributes. Tags in code (between backticks or fences),
tags in the middle of a sentence, blocks that are not closed, `<thinking>` (which may mean anything)
and calls that cannot be read stay text; `remaining_markup` finds those outside code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.tool_calls import as_tool_call, call_name_and_arguments
from tinker_cookbook.renderers.types import (
    CallLike,
    ContentPart,
    Message,
    TextPart,
    ThinkingPart,
    ToolCall,
    ToolSpec,
)
from tinker_cookbook.replies.loose import (
    CALL,
    END_CALL,
    END_THINK,
    MISTRAL_CALLS,
    THINK,
    loose_grammar,
    read_calls,
)
from tinker_cookbook.replies.pieces import Call, ReadCall, TextPiece
from tinker_cookbook.replies.reader import ReplyReader
from tinker_cookbook.replies.scanner import MarkScanner

__all__ = ["remaining_markup", "structure_reply_markup"]

_MARKUP = re.compile(
    r"<(?P<slash>/?)(?P<name>think|thinking|tool_call)(?:\s[^<>\n]*)?>|\[TOOL_CALLS\]",
    re.IGNORECASE,
)
_CALL_STARTS = (CALL, MISTRAL_CALLS)
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[^\n]*$", re.MULTILINE)
_BACKTICKS = re.compile(r"(?<!`)(`+)(?!`)[^\n]*?(?<!`)\1(?!`)")
_BLANK_LINES = re.compile(r"(?:[ \t]*\n)+|[ \t]+")


def structure_reply_markup(message: Message, tools: Sequence[ToolSpec] = ()) -> tuple[Message, int]:
    """Return a reply with its markup converted to thinking parts and tool calls, and the number of
    blocks.

    Blank lines around reasoning, and those between it and the answer, belong to the markup. The
    order of reasoning and text is kept; a block without reasoning leaves nothing behind.

    Args:
        message: of any role; only the assistant's are changed. If a message already has reasoning
            or calls next to its text, equal ones in the text are removed from it, and different
            ones stay text.
        tools: declarations. They give arguments their types in notations without types.

    Returns:
        The message itself and 0 if there is nothing to convert, else a copy. Its content is a
        string, or a list of parts if there is reasoning.
    """
    content: Any = message.get("content")
    if message.get("role") != "assistant" or not isinstance(content, str | list):
        return message, 0
    given = [TextPart(type="text", text=content)] if isinstance(content, str) else content
    parts, num_blocks = _structure_thinking(message, given)
    calls: list[ToolCall] = []
    if parts and parts[-1].get("type") == "text":
        text, calls = _split_calls(cast(TextPart, parts[-1])["text"], tools)
        if calls and _may_add_calls(message, calls):
            parts = [*parts[:-1], *_text_part(text)]
        else:
            calls = []
    if not num_blocks and not calls:
        return message, 0
    changed: dict[str, Any] = {**message, "content": _simplest(parts)}
    if calls and not message.get("tool_calls"):
        changed["tool_calls"] = calls
    return cast(Message, changed), num_blocks + len(calls)


def remaining_markup(message: Message) -> list[str]:
    """Return the tags of reasoning and calls in a message's text, outside code.

    After `structure_reply_markup`, these are the tags that a renderer would train as letters:
    usually a reply that was cut off, or a call that cannot be read.
    """
    content: Any = message.get("content")
    parts = [content] if isinstance(content, str) else content or []
    texts = [part if isinstance(part, str) else part.get("text") or "" for part in parts]
    return [match.group() for text in texts for match in _outside_code(text)]


def _structure_thinking(
    message: Message, parts: Sequence[ContentPart]
) -> tuple[list[ContentPart], int]:
    """Return the parts with the blocks in their texts as thinking parts, and the number of
    blocks."""
    had = message.get("reasoning_content") or ""
    had += "".join(map(_thought, parts))
    found: list[ContentPart] = []
    thoughts: list[ContentPart] = []
    num_blocks = 0
    for part in parts:
        if part.get("type") != "text":
            found.append(part)
            continue
        pieces, count = _split_thinking(cast(TextPart, part)["text"])
        num_blocks += count
        thoughts += [piece for piece in pieces if _thought(piece)]
        if had.strip():  # equal reasoning is given twice
            pieces = [piece for piece in pieces if not _thought(piece)]
        found += pieces if count else [part]
    if had.strip() and thoughts and "".join(map(_thought, thoughts)) != had.strip():
        return list(parts), 0
    return found, num_blocks


def _split_thinking(text: str) -> tuple[list[ContentPart], int]:
    """Return texts and reasoning in order, and the number of blocks of reasoning."""
    pieces: list[ContentPart] = []
    position = num_blocks = 0
    for start, body_start, body_end, end in _think_blocks(text):
        before = text[position:start]
        if before.strip():
            pieces += _text_part(before)
        reasoning = _without_blank_start(text[body_start:body_end]).rstrip()
        if reasoning and pieces and _thought(pieces[-1]):
            reasoning = f"{_thought(pieces.pop())}\n\n{reasoning}"
        if reasoning:
            pieces.append(ThinkingPart(type="thinking", thinking=reasoning))
        position = end + len(text[end:]) - len(_without_blank_start(text[end:]))
        num_blocks += 1
    return pieces + _text_part(text[position:]), num_blocks


def _think_blocks(text: str) -> Iterator[tuple[int, int, int, int]]:
    """Yield where each block starts, where its reasoning starts and ends, and where it ends."""
    position = 0
    has_opening, is_leading = False, True
    while (opening := _next_opening(text, position)) is not None:
        has_opening = True
        start, body = opening
        is_leading = is_leading and not text[position:start].strip()
        close = _find_close(text, body)
        if close is None:
            return
        if is_leading or not text[close[1] :].partition("\n")[0].strip():
            yield start, body, *close
        position = close[1]
    if not has_opening:
        closes = [match for match in _outside_code(text) if _mark(match) == END_THINK]
        if len(closes) == 1 and _stands_alone(text, closes[0].start(), closes[0].end()):
            yield 0, 0, closes[0].start(), closes[0].end()


def _mark(match: re.Match[str]) -> str:
    """Return the mark of a tag, ignoring case and attributes."""
    if match["name"] is None:
        return MISTRAL_CALLS
    return f"<{match['slash']}{match['name'].lower()}>"


def _next_opening(text: str, position: int) -> tuple[int, int] | None:
    """Return where the next `<think>` that begins a line outside code starts and ends."""
    for match in _outside_code(text[position:]):
        start = position + match.start()
        line_start = max(text.rfind("\n", 0, start) + 1, position)
        if _mark(match) == THINK and not text[line_start:start].strip():
            return start, position + match.end()
    return None


def _find_close(text: str, position: int) -> tuple[int, int] | None:
    """Return the place of the first `</think>` outside code, or of the first one if all are in
    code."""
    for match in _outside_code(text[position:]):
        if _mark(match) == END_THINK:
            return position + match.start(), position + match.end()
    close = text.find(END_THINK, position)
    return None if close < 0 else (close, close + len(END_THINK))


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether the tag is alone on its line."""
    line_start = text.rfind("\n", 0, start) + 1
    return not text[line_start:start].strip() and not text[end:].partition("\n")[0].strip()


def _without_blank_start(text: str) -> str:
    """Return the text without blank lines at its start, or without spaces if there are none."""
    blank = _BLANK_LINES.match(text)
    return text[blank.end() :] if blank else text


def _outside_code(text: str) -> list[re.Match[str]]:
    """Return the tags of a text that are neither in a fenced block nor between backticks."""
    code = list(_code_spans(text))
    found = list(_MARKUP.finditer(text))
    return [m for m in found if not any(start <= m.start() < end for start, end in code)]


def _code_spans(text: str) -> Iterator[tuple[int, int]]:
    """Yield where code starts and ends: fenced blocks (the last one may be open) and backticks."""
    start, fence, position = 0, "", 0
    for match in _FENCE.finditer(text):
        mark = match.group(1)
        if not fence:
            yield from (
                (m.start(), m.end()) for m in _BACKTICKS.finditer(text, position, match.start())
            )
            start, fence = match.start(), mark
        elif mark.startswith(fence) and match.group().strip() == mark:
            yield start, match.end()
            fence, position = "", match.end()
    if fence:
        yield start, len(text)
    else:
        yield from ((m.start(), m.end()) for m in _BACKTICKS.finditer(text, position))


def _split_calls(text: str, tools: Sequence[ToolSpec]) -> tuple[str, list[ToolCall]]:
    """Return the text before the calls at its end, and these calls; the whole text if there are
    none."""
    for match in _outside_code(text):
        if match.group() in _CALL_STARTS:
            calls = _read_calls(text[match.start() :], tools)
            if calls:
                return text[: match.start()].rstrip("\n"), calls
    return text, []


def _read_calls(text: str, tools: Sequence[ToolSpec]) -> list[ToolCall]:
    """Return the calls of a text that consists of calls, else none."""

    def parse_call(parts: Sequence[str | int], raw_text: str) -> Sequence[ReadCall]:
        return read_calls("".join(map(str, parts)), raw_text, tools)

    grammar = loose_grammar(parse_call=parse_call)
    grammar = replace(grammar, tolerance=replace(grammar.tolerance, unclosed_calls_count=False))
    marks = MarkScanner(ReplyReader(grammar), (CALL, END_CALL, MISTRAL_CALLS))
    calls: list[ToolCall] = []
    for piece in (*marks.text(text), *marks.end(is_cut=False)):
        call = as_tool_call(piece) if isinstance(piece, Call) else None
        if isinstance(call, ToolCall):
            calls.append(call)
        elif not isinstance(piece, TextPiece) or piece.text.strip():
            return []
    return calls


def _may_add_calls(message: Message, calls: Sequence[ToolCall]) -> bool:
    """Whether the message has no calls next to its text, or the same calls."""
    had: Sequence[Any] = message.get("tool_calls") or ()
    return not had or [_meaning(call) for call in had] == [_meaning(call) for call in calls]


def _meaning(call: CallLike) -> object:
    """Return name and arguments of a call as values that can be compared; other values
    unchanged."""
    try:
        name, arguments = call_name_and_arguments(call)
    except (RendererError, AttributeError):
        return call
    return name, json.loads(arguments)


def _thought(part: ContentPart) -> str:
    return cast(ThinkingPart, part)["thinking"] if part.get("type") == "thinking" else ""


def _text_part(text: str) -> list[ContentPart]:
    return [TextPart(type="text", text=text)] if text else []


def _simplest(parts: Sequence[ContentPart]) -> str | list[ContentPart]:
    """Return one text as a string, everything else as parts."""
    if all(part.get("type") == "text" for part in parts):
        return "".join(cast(TextPart, part)["text"] for part in parts)
    return list(parts)
