"""Rows survive a crash: torn lines are skipped by readers and cut off by writers."""

from pathlib import Path

import pytest

from tinker_cookbook.exceptions import DataFormatError
from tinker_cookbook.utils.jsonl_log import append_row, keep_rows, read_rows


def test_rows_come_back_in_order(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    for number in range(3):
        append_row(path, {"n": number, "text": "ü\n"})
    assert read_rows(path) == [{"n": n, "text": "ü\n"} for n in range(3)]
    assert len(path.read_bytes().splitlines()) == 3


@pytest.mark.parametrize("torn", [b'{"n": 1', b"{", b'{"n": 1, "text": "\xc3', b'{"n": 1}'])
def test_a_torn_last_line_is_skipped_and_then_cut_off(tmp_path: Path, torn: bytes):
    path = tmp_path / "rows.jsonl"
    append_row(path, {"n": 0})
    with path.open("ab") as file:
        file.write(torn)
    assert read_rows(path) == [{"n": 0}]
    append_row(path, {"n": 2})
    assert read_rows(path) == [{"n": 0}, {"n": 2}]
    assert path.read_bytes() == b'{"n": 0}\n{"n": 2}\n'


def test_a_file_that_is_only_a_torn_line(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n"')
    append_row(path, {"n": 1})
    assert read_rows(path) == [{"n": 1}]


def test_damage_in_the_middle_is_an_error_with_the_line(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 0}\nnonsense\n{"n": 2}\n')
    with pytest.raises(DataFormatError, match=r"rows\.jsonl:2"):
        read_rows(path)


def test_keep_rows_backs_up_what_it_drops(tmp_path: Path):
    path, backup = tmp_path / "rows.jsonl", tmp_path / "old"
    for number in range(4):
        append_row(path, {"n": number})
    before = path.read_bytes()
    assert keep_rows(path, lambda row: row["n"] < 2, backup=backup) == 2
    assert read_rows(path) == [{"n": 0}, {"n": 1}]
    assert backup.read_bytes() == before


def test_keep_rows_leaves_a_file_alone_when_nothing_is_dropped(tmp_path: Path):
    path, backup = tmp_path / "rows.jsonl", tmp_path / "old"
    append_row(path, {"n": 0})
    assert keep_rows(path, lambda _: True, backup=backup) == 0
    assert not backup.exists()
    assert keep_rows(tmp_path / "none.jsonl", lambda _: True) == 0


def test_numbers_are_rewritten_exactly(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    append_row(path, {"n": 0, "x": 0.1 + 0.2, "y": 1e-300})
    append_row(path, {"n": 1})
    keep_rows(path, lambda row: row["n"] == 0)
    assert read_rows(path) == [{"n": 0, "x": 0.1 + 0.2, "y": 1e-300}]
