"""Cutting a book at paragraphs: no text is lost, and every passage is below the limit."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.book_style.books import Book, Section, parse_text, split_paragraphs
from recipes.book_style.passages import cut_book, cut_section

# One token a word, mark or space: close to what byte-level tokenizers do, and easy to reason about.
_TOKEN = re.compile(r"\w{1,5}|[^\w\s]|\s+")


def count_tokens(text: str) -> int:
    return len(_TOKEN.findall(text))


def letters(text: str) -> str:
    return "".join(text.split())


words = st.text(alphabet='abcdeé’.!?"', min_size=1, max_size=12)
paragraphs = st.lists(words, min_size=1, max_size=60).map(" ".join)
sections = st.lists(paragraphs, max_size=8)


@given(texts=sections, max_tokens=st.integers(12, 80))
def test_no_text_is_lost_and_every_passage_is_below_the_limit(texts: list[str], max_tokens: int):
    passages = list(
        cut_section(Section(None, texts), max_tokens=max_tokens, count_tokens=count_tokens)
    )
    assert letters("".join(p.text for p in passages)) == letters("".join(texts))
    assert all(0 < p.num_tokens < max_tokens for p in passages)
    assert all(p.num_tokens == count_tokens(p.text) for p in passages)


@given(texts=sections, max_tokens=st.integers(200, 400))
def test_borders_lie_between_paragraphs_that_fit(texts: list[str], max_tokens: int):
    fitting = [text for text in texts if count_tokens(text) < max_tokens]
    passages = cut_section(Section(None, fitting), max_tokens=max_tokens, count_tokens=count_tokens)
    pieces = [piece for passage in passages for piece in passage.text.split("\n\n")]
    assert pieces == fitting


def test_passages_of_a_section_are_about_equally_long():
    section = Section("A tale", [f"Sentence number {i} of this tale." for i in range(40)])
    passages = list(cut_section(section, max_tokens=150, count_tokens=count_tokens))
    lengths = [passage.num_tokens for passage in passages]
    assert len(lengths) >= 3
    assert min(lengths) > 0.7 * max(lengths)
    assert {passage.section_title for passage in passages} == {"A tale"}


def test_an_overlong_paragraph_is_cut_between_sentences():
    sentences = [f"This is the {i}th sentence, said she." for i in range(20)]
    section = Section(None, [" ".join(sentences)])
    passages = list(cut_section(section, max_tokens=50, count_tokens=count_tokens))
    assert len(passages) > 1
    assert all(passage.text.endswith("said she.") for passage in passages)


def test_a_quotation_mark_stays_with_its_sentence():
    section = Section(None, ["‘Come in.’ " * 12])
    passages = list(cut_section(section, max_tokens=20, count_tokens=count_tokens))
    assert all(p.text.startswith("‘") and p.text.endswith("’") for p in passages)


def test_no_passage_crosses_a_section():
    book = Book("b", [Section("one", ["alpha beta"]), Section("two", ["gamma delta"])])
    passages = cut_book(book, max_tokens=500, count_tokens=count_tokens)
    assert [(p.section_title, p.text) for p in passages] == [
        ("one", "alpha beta"),
        ("two", "gamma delta"),
    ]


GUTENBERG = """The Project Gutenberg eBook of A Voyage

Title: A Voyage

*** START OF THE PROJECT GUTENBERG EBOOK A VOYAGE ***

CHAPTER I

We sailed at dawn,
and the wind was with us the whole of that long day until we came to land.

*** END OF THE PROJECT GUTENBERG EBOOK A VOYAGE ***

Full license text
"""


def test_gutenberg_matter_is_stripped_and_gives_the_title():
    book = parse_text(GUTENBERG, name="pg1")
    assert book.title == "A Voyage"
    text = "\n\n".join(book.sections[0].paragraphs)
    assert text.startswith("CHAPTER I\n\nWe sailed at dawn, and the wind")
    assert text.endswith("came to land.")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_wrapped_lines_are_joined_and_verse_keeps_its_lines(newline: str):
    prose = "It was a long line of prose, and the margin of the page had broken\nit in the middle."
    verse = "Mirror, mirror on the wall,\nWho is fairest of us all?"
    text = f"{prose}\n\n\n{verse}\n".replace("\n", newline)
    assert split_paragraphs(text) == [prose.replace("\n", " "), verse]


def test_a_text_without_blank_lines_has_a_paragraph_a_line():
    assert split_paragraphs("One.\nTwo.\nThree.") == ["One.", "Two.", "Three."]
