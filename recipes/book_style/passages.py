"""Cut a book into passages at paragraph borders, each below a limit of tokens."""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .books import Book, Section

__all__ = ["Passage", "cut_book", "cut_section"]

PARAGRAPH_BREAK = "\n\n"
# A sentence ends at its mark and the quotes or brackets that close with it.
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+")

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Passage:
    """Consecutive paragraphs of one section."""

    text: str
    section_title: str | None
    num_tokens: int


def cut_book(book: Book, *, max_tokens: int, count_tokens: CountTokens) -> list[Passage]:
    """Cut the whole book, in reading order; see `cut_section`."""
    return [
        passage
        for section in book.sections
        for passage in cut_section(section, max_tokens=max_tokens, count_tokens=count_tokens)
    ]


def cut_section(
    section: Section, *, max_tokens: int, count_tokens: CountTokens
) -> Iterator[Passage]:
    """Cut one section into passages of about equal length, each below `max_tokens` tokens.

    Borders are between paragraphs. A paragraph that is too long is cut between sentences, a
    sentence between words, and a word between characters. No text is lost, and no passage crosses
    the end of the section.
    """
    pieces = [
        piece
        for paragraph in section.paragraphs
        for piece in _shorten(paragraph, max_tokens, count_tokens)
    ]
    total = sum(map(count_tokens, pieces))
    # The smallest number of passages, filled evenly, instead of a short one at the end.
    target = total / max(1, -(-total // (max_tokens - 1)))
    current: Passage | None = None
    for piece in pieces:
        longer = _append(current, piece, section.title, count_tokens)
        if current is not None and longer.num_tokens >= max_tokens:
            yield current
            longer = _append(None, piece, section.title, count_tokens)
        current = longer
        if current.num_tokens >= target:
            yield current
            current = None
    if current is not None:
        yield current


def _append(
    passage: Passage | None, piece: str, title: str | None, count_tokens: CountTokens
) -> Passage:
    text = piece if passage is None else passage.text + PARAGRAPH_BREAK + piece
    return Passage(text, title, count_tokens(text))


def _shorten(paragraph: str, max_tokens: int, count_tokens: CountTokens) -> list[str]:
    """Return the paragraph, or parts of it that are each below the limit."""
    if count_tokens(paragraph) < max_tokens:
        return [paragraph]
    for units in (_split_sentences(paragraph), paragraph.split()):
        if len(units) > 1:
            return _fill(units, max_tokens, count_tokens)
    middle = len(paragraph) // 2
    if middle == 0:
        return [paragraph]
    halves = paragraph[:middle], paragraph[middle:]
    return [part for half in halves for part in _shorten(half, max_tokens, count_tokens)]


def _split_sentences(paragraph: str) -> list[str]:
    ends = [match.end() for match in _SENTENCE_END.finditer(paragraph)]
    borders = [0, *ends, len(paragraph)]
    sentences = [paragraph[a:b].strip() for a, b in itertools.pairwise(borders)]
    return [sentence for sentence in sentences if sentence]


def _fill(units: list[str], max_tokens: int, count_tokens: CountTokens) -> list[str]:
    """Join units with spaces into parts below the limit; longer units are cut first."""
    parts: list[str] = []
    for unit in units:
        joined = f"{parts[-1]} {unit}" if parts else unit
        if count_tokens(joined) < max_tokens:
            parts[-1:] = [joined]
        else:
            parts += _shorten(unit, max_tokens, count_tokens)
    return parts
