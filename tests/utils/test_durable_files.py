"""Files that survive a crash."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tinker_cookbook.utils.durable_files import move_durably, write_atomically, write_durably


def test_write_atomically_replaces_and_leaves_nothing_else(tmp_path: Path):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")
    write_atomically(path, "naïve")
    assert path.read_bytes() == "naïve".encode()
    assert os.listdir(tmp_path) == ["a.json"]


def test_the_mode_of_a_new_file(tmp_path: Path):
    write_atomically(tmp_path / "key", "secret", mode=0o600)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_a_full_disk_leaves_the_old_file_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(path, b"new")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_move_durably_moves_files_and_folders(tmp_path: Path):
    folder = tmp_path / "staging"
    folder.mkdir()
    write_durably(folder / "a", "1")
    move_durably(folder, tmp_path / "done")
    assert (tmp_path / "done" / "a").read_text() == "1"
    write_durably(tmp_path / "b", b"2")
    move_durably(tmp_path / "b", tmp_path / "done" / "a")
    assert (tmp_path / "done" / "a").read_text() == "2"
    assert os.listdir(tmp_path) == ["done"]
