"""Which marks structure a reply, and how strictly they are taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinker_cookbook.replies.json_calls import read_json_call

__all__ = ["CallParser", "Grammar", "TextMark", "Tolerance", "WholeCalls", "parse_json_call"]


class TextMark(str):
    """A mark that is written as ordinary text; other marks are token ids."""

    __slots__ = ()


Mark = int | TextMark

CallParser = Callable[[Sequence[str | int], str], Sequence[object]]
"""Takes the parts between the marks of a call (texts and the marks of `Grammar.call_marks`) and the
whole call as text; returns calls, or one bad call."""


def parse_json_call(parts: Sequence[str | int], raw_text: str) -> Sequence[object]:
    """Read one call in JSON."""
    return [read_json_call("".join(map(str, parts)), raw_text)]


@dataclass(frozen=True)
class WholeCalls:
    """How to read a reply that consists of calls without marks."""

    parse: Callable[[str], Sequence[object] | None]
    """Takes the whole reply; returns None if it is text."""
    starts: tuple[str, ...] = ('{"name":',)
    """Possible beginnings of such a reply, apart from white space."""
    mark: Mark | None = None
    """A mark that may precede the calls and has no further meaning."""


@dataclass(frozen=True)
class Tolerance:
    """What a reader accepts if the message does not have to render to the same tokens again."""

    thinks_first: bool = False
    """The opening mark of reasoning counts only at the start of a reply; elsewhere it is text."""
    bad_calls_are_text: bool = False
    """A call that cannot be read is kept as text."""
    other_calls: tuple[tuple[Mark, Mark | None], ...] = ()
    """More pairs of marks around calls, in addition to `Grammar.call`."""
    unclosed_calls_count: bool = False
    """The end of a reply closes a call."""
    call_is_open: Callable[[str], bool] | None = None
    """Whether an unfinished call ends inside a value. A closing mark there belongs to the value if
    a later one completes the call. Only for marks that are text."""


@dataclass(frozen=True)
class Grammar:
    """The marks that structure a reply. Fields that a format does not use stay None."""

    stop: frozenset[int] = frozenset()
    eos: frozenset[int] = frozenset()
    """Other tokens that end generation, such as end-of-document."""
    think: tuple[Mark, Mark] | None = None
    """Opening and closing mark of reasoning."""
    starts_in_thinking: bool = False
    """The prompt has already opened the reasoning."""
    call: tuple[Mark, Mark | None] | None = None
    """Opening and closing mark of a tool call. Without a closing mark, a call continues to the next
    call or to the end."""
    parse_call: CallParser = parse_json_call
    call_marks: frozenset[int] = frozenset()
    """Tokens that structure the inside of a call."""
    call_section: tuple[Mark, Mark] | None = None
    """Opening and closing mark around consecutive calls."""
    think_newlines: tuple[int, int, int] = (1, 1, 2)
    """Newlines that the format writes after the opening of reasoning, before its end and after its
    end."""
    newlines_before_call: int = 1
    """Newlines that the format writes between text and a call."""
    calls_on_lines: bool = False
    """Whether those newlines precede a call even without text."""
    newlines_after_call: int = 0
    newlines_at_start: int = 0
    """Newlines that the format writes before a reply."""
    whole_calls: WholeCalls | None = None
    """Set if a reply may consist of calls without marks."""
    tolerance: Tolerance = Tolerance()
