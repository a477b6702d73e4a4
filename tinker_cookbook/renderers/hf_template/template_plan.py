"""From the output of a chat template to the pieces of a layout: markers, text, typed text,
replies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tinker_cookbook.renderers.hf_template.text import Mark, Value, mark_spans, quoted
from tinker_cookbook.renderers.layout import Layout, SegmentKind

__all__ = ["Atom", "ControlTokens", "Plan", "Reply", "build_atoms", "lay_out_atoms"]


class ControlTokens:
    """Finds a tokenizer's added tokens in text, in the same way as the tokenizer."""

    def __init__(self, added: Mapping[int, Any]) -> None:
        """Prepare the search.

        Args:
            added: the tokenizer's `added_tokens_decoder`.
        """
        self.ids = {token.content: index for index, token in added.items()}
        branches = []
        for token in sorted(added.values(), key=lambda token: -len(token.content)):
            space_before = r"\s*" if token.lstrip else ""
            space_after = r"\s*" if token.rstrip else ""
            branches.append(f"{space_before}{re.escape(token.content)}{space_after}")
        self.pattern = re.compile("|".join(branches) or r"(?!)")

    def id_of(self, match: re.Match[str]) -> int:
        """Return the token of a match, which may include the white space that the token takes."""
        text = match.group()
        found = self.ids.get(text)
        return self.ids[text.strip()] if found is None else found


@dataclass(frozen=True)
class Reply:
    """The part of one assistant message that sampling writes, as positions in the written text."""

    start: int = 0
    end: int = 0
    written: str = ""
    """The text up to `end`, with marks."""
    problem: str | None = None
    """The reason why this reply has no exact mask."""
    tagged: tuple[tuple[int, int], ...] | None = None
    """The spans of `{% generation %}` blocks, if the template has them."""


class Atom(NamedTuple):
    """One piece of a layout, before the typed texts replace their marks."""

    text: str
    """Text that the template wrote; empty for a control token or a typed text."""
    token: int | None
    """A control token."""
    value: int | None
    """Number of a typed text."""
    quotes: int
    kind: SegmentKind
    message: int
    sampled: bool


_CUT = Atom("", None, None, 0, SegmentKind.FRAME, -1, False)


@dataclass
class Plan:
    """The layout of all conversations of one shape."""

    text: str
    """Output of the template, with marks."""
    atoms: list[Atom]
    replies: dict[int, Reply] = field(default_factory=dict)
    """Replies by message index."""
    faithful: frozenset[int] = frozenset()
    """Replies that are written here as they are sampled, after the same prompt."""


def build_atoms(
    text: str,
    values: Sequence[Value],
    control: ControlTokens,
    *,
    replies: Mapping[int, Reply],
    cuts: frozenset[int],
    stops: frozenset[int],
) -> list[Atom]:
    """Cut the output of a template into atoms.

    Args:
        text: the output, with marks.
        values: the typed texts.
        control: the tokenizer's control tokens.
        replies: by message, the replies that are in this text as they are sampled.
        cuts: where sampling starts; the texts on both sides are encoded separately.
        stops: tokens that end a turn.
    """
    return _Cutter(text, values, control, replies, stops).atoms(cuts)


class _Cutter:
    def __init__(
        self,
        text: str,
        values: Sequence[Value],
        control: ControlTokens,
        replies: Mapping[int, Reply],
        stops: frozenset[int],
    ) -> None:
        self._text = text
        self._values = values
        self._control = control
        self._replies = replies
        self._stops = stops
        self._marks = mark_spans(text)
        self._ended: set[int] = set()
        """Messages whose end-of-turn token has been seen."""

    def atoms(self, cuts: frozenset[int]) -> list[Atom]:
        """Return the atoms in order."""
        edges = self._edges(cuts)
        atoms: list[Atom] = []
        position, number = 0, 0
        for edge in edges:
            if position in cuts and position:
                atoms.append(_CUT)
            if edge <= position:
                continue
            mark = self._marks[number] if number < len(self._marks) else None
            if mark is not None and mark.start == position:
                atoms.append(self._typed(mark))
                position, number = mark.end, number + 1
            else:
                before = self._marks[number - 1] if number else None
                atoms += self._literal(position, edge, before, mark)
                position = edge
        return atoms

    def _edges(self, cuts: frozenset[int]) -> list[int]:
        edges = {len(self._text), *cuts}
        for mark in self._marks:
            value = self._values[mark.value]
            edges |= {mark.start, mark.end}
            if mark.quotes == 0:
                edges |= {mark.start - len(value.before)} if self._before(mark) else set()
                edges |= {mark.end + len(value.after)} if self._after(mark) else set()
        for reply in self._replies.values():
            edges |= {reply.start, reply.end}
            edges |= {edge for span in reply.tagged or () for edge in span}
        return sorted(edge for edge in edges if 0 <= edge <= len(self._text))

    def _before(self, mark: Mark) -> bool:
        return self._text.endswith(self._values[mark.value].before, 0, mark.start)

    def _after(self, mark: Mark) -> bool:
        return self._text.startswith(self._values[mark.value].after, mark.end)

    def _typed(self, mark: Mark) -> Atom:
        value = self._values[mark.value]
        sampled = self._reply_at(mark.start) is not None
        kind = value.kind
        if sampled and not self._is_tagged(mark.start):
            kind = SegmentKind.FRAME
        return Atom("", None, mark.value, mark.quotes, kind, value.message, sampled)

    def _reply_at(self, position: int) -> int | None:
        for message, reply in self._replies.items():
            if reply.start <= position < reply.end:
                return message
        return None

    def _is_tagged(self, position: int) -> bool:
        reply = self._replies[self._reply_at(position)]  # pyright: ignore[reportArgumentType]
        return reply.tagged is None or any(a <= position < b for a, b in reply.tagged)

    def _literal(self, start: int, end: int, before: Mark | None, after: Mark | None) -> list[Atom]:
        """Return the atoms of text that the template wrote between two edges."""
        atoms: list[Atom] = []
        position = start
        for match in self._control.pattern.finditer(self._text[start:end]):
            where = start + match.start()
            if where > position:
                atoms.append(self._written(position, where, before, after))
            token = self._control.id_of(match)
            atom = self._written(where, where, before, after)._replace(text="", token=token)
            atoms.append(self._as_stop(atom, before))
            position = start + match.end()
        if position < end:
            atoms.append(self._written(position, end, before, after))
        return atoms

    def _as_stop(self, atom: Atom, before: Mark | None) -> Atom:
        """Mark the token that ends the turn of the text before it, or a reply's turn."""
        is_frame = atom.sampled and atom.kind is SegmentKind.FRAME  # outside {% generation %}
        if atom.token not in self._stops or atom.message in self._ended or is_frame:
            return atom
        is_right_after = before is not None and self._values[before.value].message == atom.message
        if not atom.sampled and not is_right_after:
            return atom
        self._ended.add(atom.message)
        return atom._replace(kind=SegmentKind.STOP)

    def _written(self, start: int, end: int, before: Mark | None, after: Mark | None) -> Atom:
        text = self._text[start:end]
        reply = self._reply_at(start)
        if reply is not None:
            near = self._values[after.value] if after else None
            kind = near.kind if near and near.message == reply else SegmentKind.CONTENT
            kind = kind if self._is_tagged(start) else SegmentKind.FRAME
            return Atom(text, None, None, 0, kind, reply, True)
        mark = self._touched(start, end, before, after)
        if mark is not None and text.isspace():
            value = self._values[mark.value]
            return Atom(text, None, None, 0, value.kind, value.message, False)
        return Atom(text, None, None, 0, SegmentKind.FRAME, self._owner(before, after), False)

    def _touched(
        self, start: int, end: int, before: Mark | None, after: Mark | None
    ) -> Mark | None:
        """Return the typed text that this outer white space belongs to."""
        values = self._values
        ends = starts = -1
        if before is not None and before.quotes == 0 and self._after(before):
            ends = before.end + len(values[before.value].after)
        if after is not None and after.quotes == 0 and self._before(after):
            starts = after.start - len(values[after.value].before)
            reply = self._replies.get(values[after.value].message)
            if reply is not None and starts < reply.start:
                starts = -1  # the template trimmed the text; this is the end of its prompt
        if start < ends:
            return before
        return after if 0 <= starts < end else None

    def _owner(self, before: Mark | None, after: Mark | None) -> int:
        """Return the message that markers between two typed texts belong to."""
        if before is None:
            return -1
        left = self._values[before.value].message
        if left not in self._ended:
            return left
        return -1 if after is None else self._values[after.value].message


def lay_out_atoms(
    layout: Layout, atoms: Sequence[Atom], values: Sequence[Value], markup: ControlTokens
) -> None:
    """Append the atoms, with the typed texts instead of their marks."""
    for text, token, number, quotes, kind, message, sampled in atoms:
        if token is not None:
            layout.ids((token,), kind, message, sampled=sampled)
        elif number is not None:
            value = values[number]
            if value.is_markup:
                _lay_out_markup(layout, value, markup, sampled=sampled)
            else:
                typed = quoted(value.text, quotes) if quotes else value.text
                layout.text(typed, kind, message, sampled=sampled)
        elif text:
            layout.text(text, kind, message, sampled=sampled)
        else:
            layout.cut()


def _lay_out_markup(layout: Layout, value: Value, markup: ControlTokens, *, sampled: bool) -> None:
    """Append a call that could not be parsed; the markers of calls in it become tokens."""
    position = 0
    for match in markup.pattern.finditer(value.text):
        before = value.text[position : match.start()]
        layout.text(before, value.kind, value.message, sampled=sampled)
        token = markup.id_of(match)
        layout.ids((token,), value.kind, value.message, sampled=sampled)
        position = match.end()
    layout.text(value.text[position:], value.kind, value.message, sampled=sampled)
