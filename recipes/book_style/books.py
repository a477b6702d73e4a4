"""Read a book from a text file or an EPUB, as sections of paragraphs."""

import re
from dataclasses import dataclass
from pathlib import Path

from tinker_cookbook.exceptions import DataFormatError

from .epub import read_epub_documents

__all__ = ["Book", "Section", "load_book", "parse_text", "split_paragraphs"]

MAX_FILE_BYTES = 64 * 2**20
# A paragraph of shorter lines is verse, whose line breaks are kept; other lines are joined.
VERSE_LINE_CHARS = 55

_GUTENBERG_START = re.compile(r"\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG[^\n]*\n", re.I)
_GUTENBERG_END = re.compile(r"\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG", re.I)
_GUTENBERG_TITLE = re.compile(r"^Title:\s*(.+?)\s*$", re.M)


@dataclass(frozen=True)
class Section:
    """A tale, a chapter, or a whole book without divisions."""

    title: str | None
    paragraphs: list[str]


@dataclass(frozen=True)
class Book:
    """The title and the text of a book."""

    title: str
    sections: list[Section]


def load_book(path: str | Path) -> Book:
    """Read a `.txt` (or `.md`) or `.epub` file.

    Raises:
        DataFormatError: naming the file and what is wrong with it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataFormatError(f"book={path} is not a file; give a .txt or .epub file.")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataFormatError(f"book={path} is larger than 64 MiB; give one book, as text or EPUB.")
    if path.suffix.lower() == ".epub":
        book = _load_epub(path)
    elif path.suffix.lower() in (".txt", ".text", ".md"):
        book = parse_text(_decode(path), name=path.stem)
    else:
        raise DataFormatError(
            f"book={path} has an unknown file type; use a .txt or .epub file. "
            "Convert other formats first, for instance with Calibre."
        )
    if not any(section.paragraphs for section in book.sections):
        raise DataFormatError(f"book={path} holds no text; an EPUB of scanned pages has none.")
    return book


def parse_text(text: str, *, name: str) -> Book:
    """Make a book of one section from text, without Project Gutenberg's front and back matter."""
    title = name
    start = _GUTENBERG_START.search(text)
    if start is not None:
        named = _GUTENBERG_TITLE.search(text, 0, start.start())
        title = named.group(1) if named else name
        end = _GUTENBERG_END.search(text, start.end())
        text = text[start.end() : end.start() if end else len(text)]
    return Book(title, [Section(None, split_paragraphs(text))])


def split_paragraphs(text: str) -> list[str]:
    """Split at blank lines; if the text has no blank lines, at every line end."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    blocks = re.split(r"\n[ \t\f\v]*\n\s*", text.strip())
    if len(blocks) == 1:
        blocks = text.strip().split("\n")
    return [paragraph for block in blocks if (paragraph := _unwrap(block))]


def _unwrap(block: str) -> str:
    lines = [line for raw in block.split("\n") if (line := " ".join(raw.split()))]
    is_verse = len(lines) > 1 and max(map(len, lines)) < VERSE_LINE_CHARS
    return ("\n" if is_verse else " ").join(lines)


def _decode(path: Path) -> str:
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encodings = ["utf-16"]
    elif b"\0" in data:
        raise DataFormatError(f"book={path} is not text (it holds zero bytes); give plain text.")
    else:
        encodings = ["utf-8-sig", "cp1252"]
    for encoding in encodings:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise DataFormatError(f"book={path} is in an unknown encoding; save it as UTF-8.")


def _load_epub(path: Path) -> Book:
    title, documents = read_epub_documents(path)
    sections = [
        Section(document.heading, split_paragraphs("\n\n".join(document.blocks)))
        for document in documents
    ]
    return Book(title or path.stem, [section for section in sections if section.paragraphs])
