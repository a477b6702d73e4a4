"""The reader of replies whose marks a grammar names."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from enum import Enum, auto

from tinker_cookbook.replies.grammar import Grammar, Mark, TextMark
from tinker_cookbook.replies.pieces import (
    UNTERMINATED_CALL_ERROR,
    BadCall,
    TextPiece,
    ThoughtPiece,
)

__all__ = ["ReadState", "ReplyReader"]


_MAX_PUT_OFF = 8
"""Maximum number of closing marks inside one value: each one reads the whole call again."""


class ReadState(Enum):
    """State of a reader."""

    TEXT = auto()
    THINK = auto()
    CALL = auto()


class ReplyReader:
    """Takes the text and the marks of one reply, in chunks of any size, and yields its pieces.

    Newlines that the format writes around reasoning and calls (the grammar says how many) are not
    part of them. A mark in a place where the grammar does not allow it is text.
    """

    def __init__(self, grammar: Grammar, mark_text: Callable[[Mark], str] = str) -> None:
        """Prepare for a reply.

        Args:
            grammar: of the format.
            mark_text: returns a mark as text, for places where it has no meaning.
        """
        self._grammar = grammar
        self._tolerance = grammar.tolerance
        self._mark_text = mark_text
        self._think_open, self._think_close = grammar.think or (None, None)
        calls = [*([grammar.call] if grammar.call else []), *self._tolerance.other_calls]
        self._closings: dict[Mark, Mark | None] = dict(calls)
        self._call_open: Mark | None = None
        self._call_close: Mark | None = None
        self._section = grammar.call_section or ()
        self._state = ReadState.THINK if grammar.starts_in_thinking else ReadState.TEXT
        self._queue: deque[str | Mark] = deque()
        self._newlines_to_drop = grammar.newlines_at_start
        self._held_newlines = ""
        self._dropped_newlines = ""
        self._gap = ""
        """Newlines between text and calls; they also separate that text from what follows the
        calls."""
        self._has_text = self._has_calls = False
        may_think = self._tolerance.thinks_first and not grammar.starts_in_thinking
        self._lead: str | None = "" if may_think else None
        """White space at the start of a reply; it belongs to an opening mark that follows."""
        self._whole: str | None = "" if grammar.whole_calls else None
        """The whole reply so far, while it may still consist of calls without marks."""
        self._whole_mark = ""
        self._whole_is_begun = False
        self._call_parts: list[str | Mark] = []
        self._first_close: int | None = None
        """Index of the first part that is a closing mark and may belong to a value."""
        self._num_put_off = 0

    # ---- what comes in ----

    def text(self, text: str) -> Iterator[object]:
        """Take more text and yield the pieces that it completes. Always exhaust the iterator."""
        self._queue.append(text)
        yield from self._drain()

    def mark(self, mark: Mark) -> Iterator[object]:
        """Take a mark; the text before it has been passed already."""
        self._queue.append(mark)
        yield from self._drain()

    def end(self, *, is_cut: bool) -> Iterator[object]:
        """Take the end of the reply: the model ended it, or (`is_cut`) the token limit did."""
        while self._state is ReadState.CALL and self._first_close is not None:
            yield from self._roll_back()
            yield from self._drain()
        if self._state is ReadState.CALL:
            yield from self._end_open_call(is_cut=is_cut)
        elif self._whole is not None and self._whole_mark + self._whole:
            yield from self._end_whole()
        yield from self._release_lead()
        yield from self._release_newlines()

    def _drain(self) -> Iterator[object]:
        while self._queue:
            item = self._queue.popleft()
            mark = _as_mark(item)
            if mark is None:
                yield from self._take_text(str(item))
            else:
                yield from self._take_mark(mark)

    # ---- marks ----

    def _take_mark(self, mark: Mark) -> Iterator[object]:
        grammar = self._grammar
        if self._state is ReadState.CALL:
            yield from self._take_mark_in_call(mark)
        elif self._state is ReadState.THINK and mark == self._think_close:
            self._held_newlines = ""
            self._state, self._newlines_to_drop = ReadState.TEXT, grammar.think_newlines[2]
        elif self._state is ReadState.TEXT and self._opens_thinking(mark):
            if self._lead is not None and self._whole:
                self._whole = ""  # white space, as the lead is
            self._lead = None
            yield from self._release_newlines()
            self._state, self._newlines_to_drop = ReadState.THINK, grammar.think_newlines[0]
        elif self._state is ReadState.TEXT and mark in self._closings:
            yield from self._before_call()
            self._open_call(mark)
        elif self._state is ReadState.TEXT and mark in self._section:
            yield from self._before_call()
            self._newlines_to_drop = 0
        elif self._opens_whole(mark):
            self._whole_mark = self._mark_text(mark)
        else:
            yield from self._take_text(self._mark_text(mark))

    def _opens_thinking(self, mark: Mark) -> bool:
        if mark != self._think_open:
            return False
        if not self._tolerance.thinks_first:
            return True
        if self._lead is None or self._has_calls:
            return False
        return not (self._whole_mark + (self._whole or "")).strip()

    def _opens_whole(self, mark: Mark) -> bool:
        whole = self._grammar.whole_calls
        if whole is None or mark != whole.mark or self._whole is None or self._whole_mark:
            return False
        return self._state is ReadState.TEXT and not self._whole.strip()

    def _take_mark_in_call(self, mark: Mark) -> Iterator[object]:
        if mark == self._call_close:
            if self._puts_off():
                if self._first_close is None:
                    self._first_close = len(self._call_parts)
                self._call_parts.append(mark)
            elif self._first_close is None or self._calls_read():
                yield from self._end_call(closing=mark)
            else:
                self._queue.appendleft(mark)
                yield from self._roll_back()
        elif mark == self._call_open and self._call_close is None:
            if self._puts_off():
                self._add_to_call(self._mark_text(mark))
                return
            yield from self._end_call()
            self._dropped_newlines = ""
            self._open_call(mark)
        elif mark in self._grammar.call_marks or self._first_close is not None:
            self._call_parts.append(mark)
        else:
            self._add_to_call(self._mark_text(mark))

    # ---- calls ----

    def _puts_off(self) -> bool:
        """Whether a mark that would end the call may belong to one of its values."""
        is_open = self._tolerance.call_is_open
        if is_open is None or self._num_put_off >= _MAX_PUT_OFF:
            return False
        self._num_put_off += 1
        return is_open(self._call_text())

    def _open_call(self, mark: Mark) -> None:
        self._num_put_off = 0
        self._call_open, self._call_close = mark, self._closings[mark]
        self._state, self._call_parts = ReadState.CALL, []

    def _before_call(self) -> Iterator[object]:
        if self._whole is not None:
            held, self._whole = self._whole_mark + self._whole, None
            yield from self._take_settled(held) if held else ()
        yield from self._release_lead()
        self._dropped_newlines = ""
        if self._has_text or self._has_calls or self._grammar.calls_on_lines:
            self._dropped_newlines, self._held_newlines = self._held_newlines, ""
        if self._has_text and self._tolerance.bad_calls_are_text:
            self._gap = self._gap or self._dropped_newlines
        yield from self._release_newlines()

    def _end_call(self, *, closing: Mark | None = None) -> Iterator[object]:
        """Yield the calls that have just ended."""
        raw_text = self._raw_text()
        if closing is not None:
            raw_text += self._mark_text(closing)
        calls = self._grammar.parse_call(self._parsed_parts(), raw_text)
        self._state, self._first_close = ReadState.TEXT, None
        self._newlines_to_drop = self._grammar.newlines_after_call
        yield from self._give_calls(calls, raw_text)

    def _give_calls(self, calls: Sequence[object], raw_text: str) -> Iterator[object]:
        is_bad = any(isinstance(call, BadCall) for call in calls)
        if is_bad and self._tolerance.bad_calls_are_text:
            self._newlines_to_drop = 0
            self._state = ReadState.TEXT
            self._gap = ""
            yield from self._emit(self._dropped_newlines + raw_text)
            return
        self._has_calls = True
        yield from calls

    def _calls_read(self) -> bool:
        calls = self._grammar.parse_call(self._parsed_parts(), "")
        return not any(isinstance(call, BadCall) for call in calls)

    def _roll_back(self) -> Iterator[object]:
        """End the call at its first closing mark, and read again what came after it."""
        assert self._first_close is not None, "a closing mark was put off"
        at = self._first_close
        closing, rest = _as_mark(self._call_parts[at]), self._call_parts[at + 1 :]
        self._call_parts = self._call_parts[:at]
        self._queue.extendleft(reversed(rest))
        yield from self._end_call(closing=closing)

    def _end_open_call(self, *, is_cut: bool) -> Iterator[object]:
        """Yield the call that is open at the end of the reply, complete or not."""
        counts = self._tolerance.unclosed_calls_count
        if counts or (self._call_close is None and not is_cut):
            yield from self._end_call()
            return
        raw_text = self._raw_text()
        yield from self._give_calls([BadCall(raw_text, UNTERMINATED_CALL_ERROR)], raw_text)

    def _parsed_parts(self) -> list[str | int]:
        """Return the parts of a call; marks without a meaning inside a call become text."""
        found: list[str | int] = []
        text = ""
        for part in self._call_parts:
            mark = _as_mark(part)
            if not isinstance(mark, int) or mark not in self._grammar.call_marks:
                text += str(part) if mark is None else self._mark_text(mark)
                continue
            found += [text, mark] if text else [mark]
            text = ""
        return [*found, text] if text else found

    def _call_text(self) -> str:
        parts = self._parsed_parts()
        return "".join(p if isinstance(p, str) else self._mark_text(p) for p in parts)

    def _raw_text(self) -> str:
        """Return the text of the call so far, with its opening mark."""
        assert self._call_open is not None, "a call was opened"
        return self._mark_text(self._call_open) + self._call_text()

    def _add_to_call(self, text: str) -> None:
        """Add text to the call; consecutive texts become one part."""
        parts = self._call_parts
        last = parts[-1] if parts else None
        if isinstance(last, str) and not isinstance(last, TextMark):
            parts[-1] = last + text
        elif text:
            parts.append(text)

    # ---- text ----

    def _take_text(self, text: str) -> Iterator[object]:
        if self._state is ReadState.CALL:
            self._add_to_call(text)
            return
        if self._newlines_to_drop:
            kept = text.lstrip("\n")
            dropped = min(self._newlines_to_drop, len(text) - len(kept))
            text = text[dropped:]
            self._newlines_to_drop -= dropped
        if not text:
            return
        self._newlines_to_drop = 0
        if self._gap and self._state is ReadState.TEXT:
            text, self._gap = text if text[0].isspace() else self._gap + text, ""
        if self._state is ReadState.TEXT and self._whole is not None:
            text = self._hold_whole(text)
        yield from self._take_settled(text)

    def _take_settled(self, text: str) -> Iterator[object]:
        """Take text outside calls; hold back newlines that may belong to what follows."""
        if not text:
            return
        is_thinking = self._state is ReadState.THINK
        if self._lead is not None and not is_thinking:
            self._lead += text
            if text.isspace():
                return
            text, self._lead = self._lead, None
        grammar = self._grammar
        text = self._held_newlines + text
        limit = grammar.think_newlines[1] if is_thinking else grammar.newlines_before_call
        self._held_newlines = "\n" * min(limit, len(text) - len(text.rstrip("\n")))
        yield from self._emit(text[: len(text) - len(self._held_newlines)])

    def _emit(self, text: str) -> Iterator[object]:
        if not text:
            return
        if self._state is ReadState.THINK:
            self._has_text = False
            yield ThoughtPiece(text)
        else:
            self._has_text = True
            yield TextPiece(text)

    def _release_newlines(self) -> Iterator[object]:
        newlines, self._held_newlines = self._held_newlines, ""
        return self._emit(newlines)

    def _release_lead(self) -> Iterator[object]:
        """Yield white space at the start as text, since no reasoning follows it."""
        lead, self._lead = self._lead, None
        if lead:
            yield from self._take_settled(lead)

    # ---- calls without marks ----

    def _hold_whole(self, text: str) -> str:
        """Hold the reply back while it may still consist of calls; return certain text."""
        whole = self._grammar.whole_calls
        assert whole is not None, "asked before"
        assert self._whole is not None, "asked before"
        self._whole += text
        if self._whole_is_begun or text.isspace():
            return ""
        start = self._whole.lstrip()
        if any(start[: len(s)] == s[: len(start)] for s in whole.starts):
            self._whole_is_begun = any(start.startswith(s) for s in whole.starts)
            return ""
        held, self._whole = self._whole_mark + self._whole, None
        return held

    def _end_whole(self) -> Iterator[object]:
        """Yield the held reply as calls if it consists of calls, else as text."""
        whole = self._grammar.whole_calls
        assert whole is not None, "asked before"
        assert self._whole is not None, "asked before"
        held, self._whole = self._whole, None
        calls = whole.parse(held)
        if calls:
            self._lead = None
            self._has_calls = True
            yield from calls
        else:
            yield from self._take_settled(self._whole_mark + held)


def _as_mark(item: str | Mark) -> Mark | None:
    """Return the part if it is a mark, None if it is text."""
    return None if isinstance(item, str) and not isinstance(item, TextMark) else item
