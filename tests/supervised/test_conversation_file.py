"""Files of conversations: line numbers, odd encodings, compression, and refusals on opening."""

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinker_cookbook.exceptions import DataError
from tinker_cookbook.supervised.conversation_file import ConversationFile

BOM = b"\xef\xbb\xbf"


def row(text: str = "hi") -> bytes:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]
    return json.dumps({"messages": messages}).encode()


@pytest.fixture
def write(tmp_path: Path):
    def write_file(content: bytes, name: str = "chat.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write_file


def read_all(source: Path | ConversationFile) -> list[tuple[int, bytes]]:
    file = source if isinstance(source, ConversationFile) else ConversationFile(source)
    rows = file.rows(range(len(file)))
    assert [r.where for r in rows] == [file.where(i) for i in range(len(file))]
    return [(file.line_number(i), r.value) for i, r in enumerate(rows)]  # type: ignore[misc]


def test_rows_come_with_the_number_of_their_line(write):
    path = write(b"\n".join([row("a"), b"", row("b"), b"  \t", row("c")]))
    assert read_all(path) == [(1, row("a")), (3, row("b")), (5, row("c"))]
    assert ConversationFile(path).num_blank_lines == 2


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n\r\n  \n"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("start", [b"", BOM, BOM + b"\n", b"\n"])
def test_newlines_byte_order_mark_and_missing_last_newline(write, start, newline, end):
    path = write(start + newline.join([row("a"), row("b")]) + end)
    assert [value for _, value in read_all(path)] == [row("a"), row("b")]


@given(
    st.lists(st.sampled_from([b"{}", b'{"a":1}', b"", b" ", b"\t\r", b" {}", b"x"]), max_size=12),
    st.booleans(),
    st.integers(1, 9),
)
def test_scan_equals_a_naive_split_at_any_chunk_size(tmp_path_factory, lines, bom, chunk_bytes):
    path = tmp_path_factory.mktemp("scan") / "f.jsonl"
    path.write_bytes((BOM if bom else b"") + b"\n".join(lines))
    expected = [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
    if not expected:
        with pytest.raises(DataError, match="no rows"):
            ConversationFile(path, chunk_bytes=chunk_bytes)
        return
    file = ConversationFile(path, chunk_bytes=chunk_bytes)
    assert read_all(file) == expected
    odd = {line for line, value in expected if not (value[:1] == b"{" and value[-1:] == b"}")}
    assert odd <= {file.line_number(i) for i in file._odd_rows}


def test_rows_are_read_in_any_order(write):
    path = write(b"\n".join(row(str(i)) for i in range(100)))
    file = ConversationFile(path)
    assert [r.value for r in file.rows([70, 3, 70])] == [row("70"), row("3"), row("70")]


def test_gzip_is_recognised_by_content_not_by_name(write):
    text = b"\n".join([row("a"), b"", row("b")])
    expected = [(1, row("a")), (3, row("b"))]
    assert read_all(write(gzip.compress(text), "chat.jsonl.gz")) == expected
    assert read_all(write(gzip.compress(text), "chat.jsonl")) == expected
    two_members = gzip.compress(row("a") + b"\n\n") + gzip.compress(row("b"))
    assert read_all(write(two_members, "two.jsonl.gz")) == expected


def test_fingerprint_follows_the_content(write):
    plain = ConversationFile(write(row("a"))).fingerprint
    assert ConversationFile(write(row("a"), "other.jsonl")).fingerprint == plain
    assert ConversationFile(write(gzip.compress(row("a")), "x.gz")).fingerprint == plain
    assert ConversationFile(write(row("b"), "third.jsonl")).fingerprint != plain


def packed() -> bytes:
    # mtime: these bytes are in test names, and workers must collect the same names
    return gzip.compress(b"\n".join(row(str(i)) for i in range(2000)), mtime=0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["no rows"]),
        (b"\n \r\n\n", ["no rows"]),
        (gzip.compress(b"", mtime=0), ["no rows"]),
        (packed()[:-100], ["gzip", "cut off"]),
        (packed()[:15], ["gzip", "cut off"]),
        (packed()[:200] + b"?" * 40 + packed()[240:], ["gzip", "damaged"]),
        ('{"messages": []}'.encode("utf-16"), ["UTF-16", "UTF-8"]),
        (b"PK\x03\x04....", ["zip archive"]),
        (b"\x28\xb5\x2f\xfd....", ["zstd", "damaged"]),
        (b"\xfd7zXZ\x00....", ["xz", "cut off"]),
        (b"BZh....", ["bzip2", "damaged"]),
    ],
)
def test_files_that_are_something_else_are_refused(write, content, words):
    with pytest.raises(DataError) as info:
        ConversationFile(write(content))
    for word in [*words, "chat.jsonl"]:
        assert word in str(info.value)


def test_missing_files_suggest_the_nearest_name(write, tmp_path):
    write(row(), "conversations.jsonl")
    with pytest.raises(DataError, match=r"does not exist.*Did you mean .*conversations\.jsonl\?"):
        ConversationFile(tmp_path / "conversation.jsonl")
    with pytest.raises(DataError, match=r"nor the folder"):
        ConversationFile(tmp_path / "missing" / "chat.jsonl")


def test_folders_and_pipes_are_refused(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        ConversationFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    descriptor = os.open(tmp_path / "pipe", os.O_RDWR)  # so that opening it does not wait
    try:
        with pytest.raises(DataError, match="not a regular file"):
            ConversationFile(tmp_path / "pipe")
    finally:
        os.close(descriptor)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_refused(write):
    path = write(row())
    path.chmod(0)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        ConversationFile(path)


def test_a_row_of_100_megabytes_is_refused_unread(write):
    path = write(row("a") + b"\n")
    with path.open("ab") as stream:
        stream.truncate(100_000_000)  # a sparse line of zero bytes
        stream.seek(100_000_000)
        stream.write(b"\n" + row("b"))
    file = ConversationFile(path)
    assert [r.value for r in file.rows([0, 2])] == [row("a"), row("b")]
    for act in (file.check_rows, lambda: file.rows([1])):
        with pytest.raises(DataError, match=r"chat\.jsonl:2: the line has 100 MB; at most 67 MB"):
            act()


def test_every_row_of_a_small_file_is_checked_on_opening(write):
    path = write(b"\n".join([row("a")] * 5000 + [b'{"messages": [{"role": "bot"}]}']))
    with pytest.raises(DataError, match=r"chat\.jsonl:5001: role 'bot' is unknown"):
        ConversationFile(path).check_rows()


def test_incomplete_lines_of_a_large_file_are_found_without_parsing_all(write):
    rows = [row(str(i)) for i in range(5000)]
    rows[137] = rows[137][:-4]
    with pytest.raises(DataError, match=r"chat\.jsonl:138: not JSON"):
        ConversationFile(write(b"\n".join(rows))).check_rows(full_check_bytes=0)
    rows[137] = b'{"messages": "x"}'  # looks complete: left to the batch that reads it
    ConversationFile(write(b"\n".join(rows))).check_rows(full_check_bytes=0)


def test_a_file_that_changes_is_noticed(write):
    path = write(row("a") + b"\n" + row("b"))
    file = ConversationFile(path)
    with path.open("ab") as stream:
        stream.write(b"\n" + row("c"))
    with pytest.raises(DataError, match="changed while it was in use"):
        file.rows([0])


def test_a_file_replaced_by_another_is_still_the_old_one(write, tmp_path):
    path = write(row("a"))
    file = ConversationFile(path)
    os.replace(write(row("b"), "new.jsonl"), path)
    assert file.rows([0])[0].value == row("a")
