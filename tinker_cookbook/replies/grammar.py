"""Which marks structure a reply, and how strictly they are taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinker_cookbook.replies.json_calls import read_json_call

__all__ = ["CallParser", "Grammar", "TextMark", "Tolerance", "WholeCalls", "parse_json_call"]


class TextMark(str):
    """A mark that stands in the text, letter by letter; other marks are token ids."""

    __slots__ = ()


Mark = int | TextMark

CallParser = Callable[[Sequence[str | int], str], Sequence[object]]
"""Takes what stood between the marks of a call, texts and the marks of `Grammar.call_marks`, and
the whole call as text; returns calls, or one bad call."""


def parse_json_call(parts: Sequence[str | int], raw_text: str) -> Sequence[object]:
    """Read one call in JSON."""
    return [read_json_call("".join(map(str, parts)), raw_text)]


@dataclass(frozen=True)
class WholeCalls:
    """Calls without marks: a reply that is nothing else."""

    parse: Callable[[str], Sequence[object] | None]
    """Takes the whole reply; None if it is text."""
    starts: tuple[str, ...] = ('{"name":',)
    """What such a reply starts with, white space aside."""
    mark: Mark | None = None
    """May stand before it and says nothing more."""


@dataclass(frozen=True)
class Tolerance:
    """What a reader accepts where a reply need not be written again by the same tokens."""

    thinks_first: bool = False
    """The opening of reasoning counts at the start of a reply only; elsewhere it is text."""
    bad_calls_are_text: bool = False
    """A call that cannot be read is text, to the letter."""
    other_calls: tuple[tuple[Mark, Mark | None], ...] = ()
    """Further pairs around calls, as `Grammar.call` is one."""
    unclosed_calls_count: bool = False
    """The end of a reply closes a call."""
    call_is_open: Callable[[str], bool] | None = None
    """Tells of a call's beginning whether it ends within a value. A closing mark there belongs to
    the value, if a later one makes it a call. For marks that stand in the text."""


@dataclass(frozen=True)
class Grammar:
    """The marks that structure a reply. A format without thinking or tools leaves them None."""

    stop: frozenset[int] = frozenset()
    eos: frozenset[int] = frozenset()
    """Other tokens that end generation, such as end-of-document."""
    think: tuple[Mark, Mark] | None = None
    """Opening and closing of reasoning."""
    starts_in_thinking: bool = False
    """The prompt has already opened the reasoning."""
    call: tuple[Mark, Mark | None] | None = None
    """Opening and closing of a tool call; without a closing one it goes on to the next call or to
    the end."""
    parse_call: CallParser = parse_json_call
    call_marks: frozenset[int] = frozenset()
    """Tokens that structure a call from within."""
    call_section: tuple[Mark, Mark] | None = None
    """Opening and closing around a run of calls."""
    think_newlines: tuple[int, int, int] = (1, 1, 2)
    """Newlines of the format after the opening of reasoning, before its end and after that."""
    newlines_before_call: int = 1
    """What the format writes between text and a call."""
    calls_on_lines: bool = False
    """Those newlines stand before a call even where no text does."""
    newlines_after_call: int = 0
    newlines_at_start: int = 0
    """What the format writes before a reply."""
    whole_calls: WholeCalls | None = None
    """Set if a reply may be calls without marks."""
    tolerance: Tolerance = Tolerance()
