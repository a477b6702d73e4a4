"""Read an EPUB: a zip archive whose package file lists XHTML documents in reading order."""

import posixpath
import re
import urllib.parse
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from tinker_cookbook.exceptions import DataFormatError

__all__ = ["Document", "read_epub_documents"]

MAX_UNPACKED_BYTES = 256 * 2**20

_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
_BLOCK_TAG = re.compile(
    "address|article|aside|blockquote|body|dd|div|dl|dt|figcaption|figure|footer|h[1-6]|header|hr|"
    "li|main|ol|p|pre|section|table|td|th|tr|ul"
)
_HEADINGS = ("h1", "h2", "h3")
_HIDDEN_TAGS = frozenset(("head", "nav", "script", "style", "title"))


@dataclass(frozen=True)
class Document:
    """One file of the book."""

    heading: str | None
    """The first heading of the file; it is also one of the blocks."""
    blocks: list[str]
    """Paragraphs, headings and other blocks in order."""


def read_epub_documents(path: Path) -> tuple[str | None, list[Document]]:
    """Return the title of a book and its documents in reading order.

    Raises:
        DataFormatError: if the file is not an EPUB, is locked by DRM, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_archive(archive, path)
            title, names = _read_package(archive, path)
            return title, [_parse_document(archive.read(name)) for name in names]
    except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
        raise DataFormatError(
            f"book={path} is not a readable EPUB ({error}); export it again."
        ) from (error)
    except KeyError as error:
        raise DataFormatError(
            f"book={path} lists a file that is not in it: {error}. Export it again."
        ) from error
    except ElementTree.ParseError as error:
        raise DataFormatError(f"book={path} has a damaged index: {error}.") from error


def _check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    names = archive.namelist()
    if _CONTAINER not in names:
        raise DataFormatError(
            f"book={path} is a zip archive but not an EPUB; {_CONTAINER} is missing."
        )
    if _ENCRYPTION in names and b"adobe.com/adept" in archive.read(_ENCRYPTION):
        raise DataFormatError(f"book={path} is locked by DRM; give a file without it.")
    if sum(info.file_size for info in archive.infolist()) > MAX_UNPACKED_BYTES:
        raise DataFormatError(f"book={path} unpacks to more than 256 MiB; give a smaller book.")


def _read_package(archive: zipfile.ZipFile, path: Path) -> tuple[str | None, list[str]]:
    container = ElementTree.fromstring(archive.read(_CONTAINER))
    rootfile = next(_elements(container, "rootfile"), None)
    package_name = "" if rootfile is None else rootfile.get("full-path", "")
    if not package_name:
        raise DataFormatError(f"book={path} names no package file in {_CONTAINER}.")
    package = ElementTree.fromstring(archive.read(package_name))
    folder = posixpath.dirname(package_name)
    files = {
        item.get("id"): posixpath.normpath(
            posixpath.join(folder, urllib.parse.unquote(item.get("href", "")))
        )
        for item in _elements(package, "item")
        if "html" in item.get("media-type", "")
    }
    spine = [item.get("idref") for item in _elements(package, "itemref")]
    title = next(_elements(package, "title"), None)
    text = (title.text or "").strip() if title is not None else ""
    return text or None, [files[name] for name in spine if name in files]


def _elements(root: ElementTree.Element, name: str) -> Iterator[ElementTree.Element]:
    """Return the elements of this name in any namespace."""
    return (element for element in root.iter() if element.tag.rpartition("}")[2] == name)


def _parse_document(data: bytes) -> Document:
    parser = _BlockParser()
    parser.feed(data.decode("utf-8-sig", errors="replace"))
    parser.close()
    parser.end_block()
    return Document(parser.heading, parser.blocks)


class _BlockParser(HTMLParser):
    """Collects the text of each block-level element."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self.heading: str | None = None
        self._pieces: list[str] = []
        self._hidden_depth = 0
        self._open_heading = False

    def end_block(self) -> None:
        """Close the block that is being collected."""
        lines = (" ".join(line.split()) for line in "".join(self._pieces).split("\n"))
        text = "\n".join(line for line in lines if line)
        self._pieces = []
        if not text:
            return
        self.blocks.append(text)
        if self._open_heading and self.heading is None:
            self.heading = " ".join(text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "body":
            self._hidden_depth = 0  # a malformed head may have left a tag open
        if tag in _HIDDEN_TAGS:
            self._hidden_depth += 1
        elif tag == "br":
            self._pieces.append("\n")
        elif _BLOCK_TAG.fullmatch(tag):
            self.end_block()
            self._open_heading = tag in _HEADINGS

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _HIDDEN_TAGS:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag in _HIDDEN_TAGS:
            self._hidden_depth = max(0, self._hidden_depth - 1)
        elif _BLOCK_TAG.fullmatch(tag):
            self.end_block()
            self._open_heading = False

    def handle_data(self, data: str) -> None:
        if not self._hidden_depth:
            self._pieces.append(data.replace("\n", " "))
