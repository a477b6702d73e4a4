"""Finding marks that are ordinary text, however the text is split into chunks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Protocol

from tinker_cookbook.replies.grammar import Mark, TextMark

__all__ = ["MarkScanner", "PieceReader"]


class PieceReader(Protocol):
    """Takes text and marks, and yields pieces. Always exhaust the returned iterators."""

    def text(self, text: str) -> Iterator[object]:
        """Take more text."""
        ...

    def mark(self, mark: Mark) -> Iterator[object]:
        """Take a mark; the text before it has been passed already."""
        ...

    def end(self, *, is_cut: bool) -> Iterator[object]:
        """Take the end of the reply: the model ended it, or (`is_cut`) the token limit did."""
        ...


class MarkScanner:
    """Finds marks in text for another reader; holds back text that may be the beginning of a
    mark."""

    def __init__(self, reader: PieceReader, marks: Iterable[str]) -> None:
        self._reader = reader
        self._marks = sorted(set(marks), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._marks)) or r"(?!)")
        self._held = ""

    def text(self, text: str) -> Iterator[object]:
        """Take more text and pass on what cannot be part of a mark."""
        text = self._held + text
        position = 0
        for found in self._pattern.finditer(text):
            if found.start() > position:
                yield from self._reader.text(text[position : found.start()])
            yield from self._reader.mark(TextMark(found.group()))
            position = found.end()
        end = len(text) - self._length_to_hold(text[position:])
        self._held = text[end:]
        if end > position:
            yield from self._reader.text(text[position:end])

    def mark(self, mark: Mark) -> Iterator[object]:
        """Pass on what was held back, then the mark."""
        yield from self._release()
        yield from self._reader.mark(mark)

    def end(self, *, is_cut: bool) -> Iterator[object]:
        """Pass on the end."""
        yield from self._release()
        yield from self._reader.end(is_cut=is_cut)

    def _release(self) -> Iterator[object]:
        held, self._held = self._held, ""
        if held:
            yield from self._reader.text(held)

    def _length_to_hold(self, text: str) -> int:
        """Return how many characters at the end of a text may begin a mark."""
        longest = max(map(len, self._marks), default=0) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(mark.startswith(text[-length:]) for mark in self._marks):
                return length
        return 0
