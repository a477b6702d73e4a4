"""Reading books from files: what is taken from an EPUB, and how unusable files are refused."""

import zipfile
from pathlib import Path

import pytest

from recipes.book_style.books import load_book
from recipes.book_style.tales import parse_tales
from tinker_cookbook.exceptions import DataFormatError

CONTAINER = (
    '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    '<rootfile full-path="OEBPS/book.opf"/></rootfiles></container>'
)
PACKAGE = """<package xmlns="http://www.idpf.org/2007/opf" xmlns:dc="http://purl.org/dc/elements/1.1/">
<metadata><dc:title>The Lamp</dc:title></metadata>
<manifest>
  <item id="two" href="ch%202.xhtml" media-type="application/xhtml+xml"/>
  <item id="one" href="ch1.xhtml" media-type="application/xhtml+xml"/>
  <item id="css" href="style.css" media-type="text/css"/>
</manifest>
<spine><itemref idref="one"/><itemref idref="two"/></spine></package>"""
FIRST = """<html><head><title>skip me</title><style>p {}</style></head><body>
<h1>Chapter <i>One</i></h1><p>It was   late &amp; dark.<br/>The lamp
was lit.</p><script>skip()</script><div><p>Nobody came.</p>tail</div></body></html>"""
SECOND = "<html><body><p>Morning.</p></body></html>"


def write_epub(path: Path, **changes: str | None) -> Path:
    files: dict[str, str | None] = {
        "META-INF/container.xml": CONTAINER,
        "OEBPS/book.opf": PACKAGE,
        "OEBPS/ch1.xhtml": FIRST,
        "OEBPS/ch 2.xhtml": SECOND,
    }
    files |= {name.replace("__", "/").replace("_dot_", "."): text for name, text in changes.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            if text is not None:
                archive.writestr(name, text)
    return path


def test_an_epub_is_read_in_spine_order(tmp_path: Path):
    book = load_book(write_epub(tmp_path / "lamp.epub"))
    assert book.title == "The Lamp"
    assert [section.title for section in book.sections] == ["Chapter One", None]
    assert book.sections[0].paragraphs == [
        "Chapter One",
        "It was late & dark.\nThe lamp was lit.",
        "Nobody came.",
        "tail",
    ]
    assert book.sections[1].paragraphs == ["Morning."]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"META-INF__container_dot_xml": None}, "not an EPUB"),
        ({"OEBPS__book_dot_opf": None}, "not in it"),
        ({"OEBPS__book_dot_opf": "<package>"}, "damaged index"),
        ({"META-INF__container_dot_xml": "<container/>"}, "names no package"),
        ({"OEBPS__ch1_dot_xhtml": None}, "not in it"),
        ({"META-INF__encryption_dot_xml": "http://ns.adobe.com/adept"}, "locked by DRM"),
        ({"OEBPS__ch1_dot_xhtml": "<p/>", "OEBPS__ch 2_dot_xhtml": ""}, "holds no text"),
    ],
)
def test_bad_epubs_are_refused_by_name(tmp_path: Path, changes: dict, problem: str):
    path = write_epub(tmp_path / "bad.epub", **changes)
    with pytest.raises(DataFormatError, match=problem) as caught:
        load_book(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.epub", b"not a zip at all", "not a readable EPUB"),
        ("a.epub", b"PK\x03\x04 truncated", "not a readable EPUB"),
        ("a.txt", b"\x00\x01\x02binary", "not text"),
        ("a.txt", b" \n\n ", "holds no text"),
        ("a.pdf", b"%PDF-1.7", "unknown file type"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, name: str, data: bytes, problem: str):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataFormatError, match=problem):
        load_book(path)


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(DataFormatError, match=r"is not a file; give a \.txt or \.epub"):
        load_book(tmp_path / "none.txt")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_text_encodings(tmp_path: Path, encoding: str):
    path = tmp_path / "a.txt"
    path.write_bytes("Ein Märchen “hier”.".encode(encoding))
    assert load_book(path).sections[0].paragraphs == ["Ein Märchen “hier”."]


def test_the_table_of_tales_leaves_modern_translations_out():
    table = (
        "Title\tContent\r\nstring\tstring\r\n\t\r\n"
        "Hans\tA first paragraph.  A second.\r\nHerr Korbes\tNot ours.\r\n"
    )
    book = parse_tales(table)
    assert [(s.title, s.paragraphs) for s in book.sections] == [
        ("Hans", ["A first paragraph.", "A second."])
    ]
