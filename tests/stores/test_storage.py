"""Every storage reads, writes and lists files in the same way."""

import asyncio
from pathlib import Path

import pytest

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.stores import (
    AsyncStorage,
    FsspecStorage,
    LocalStorage,
    Storage,
    storage_from_uri,
    storage_join,
)

KINDS = ("local", "fsspec")


def open_storage(kind: str, folder: Path) -> Storage:
    return LocalStorage(folder) if kind == "local" else FsspecStorage("memory", f"/{folder.name}")


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_written_read_listed_and_removed(kind: str, tmp_path: Path):
    storage = open_storage(kind, tmp_path)
    storage.write("a/b.txt", b"one")
    storage.append("a/b.txt", b" two")
    storage.append("a/new.txt", b"x")
    assert storage.read("a/b.txt") == b"one two"
    assert storage.read_range("a/b.txt", 2, 3) == b"e t"
    assert storage.read_range("a/b.txt", 4) == b"two"
    assert storage.list_dir("a") == ["b.txt", "new.txt"]
    assert storage.list_dir("") == ["a"]
    found, folder = storage.stat("a/b.txt"), storage.stat("a")
    assert found is not None
    assert folder is not None
    assert (found.size, found.is_dir, folder.is_dir) == (7, False, True)
    storage.remove("a/new.txt")
    storage.remove("a/new.txt")
    assert storage.list_dir("a") == ["b.txt"]
    storage.remove_dir("a")
    storage.remove_dir("a")
    assert not storage.exists("a/b.txt")
    assert storage.stat("a/b.txt") is None
    assert storage.list_dir("a") == []
    with pytest.raises(FileNotFoundError):
        storage.read("a/b.txt")


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_does_not_leave_the_root(kind: str, tmp_path: Path):
    storage = open_storage(kind, tmp_path)
    for path in ("../x", "a/../../x", "/etc/passwd"):
        with pytest.raises(ConfigurationError, match="leaves the storage"):
            storage.read(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_not_a_folder(kind: str, tmp_path: Path):
    storage = open_storage(kind, tmp_path)
    storage.write("file", b"1")
    assert storage.list_dir("file") == []


@pytest.mark.parametrize("kind", KINDS)
def test_operations_have_an_asynchronous_form(kind: str, tmp_path: Path):
    storage = open_storage(kind, tmp_path)
    assert isinstance(storage, AsyncStorage)

    async def work() -> bytes:
        await storage.awrite("a", b"1")
        await storage.aappend("a", b"23")
        assert await storage.aexists("a")
        assert await storage.alist_dir("") == ["a"]
        return await storage.aread_range("a", 1, 1)

    assert asyncio.run(work()) == b"2"


def test_a_uri_chooses_the_storage(tmp_path: Path):
    assert isinstance(storage_from_uri(str(tmp_path)), LocalStorage)
    assert storage_from_uri(f"file://{tmp_path}").url("x") == f"{tmp_path}/x"
    assert isinstance(storage_from_uri("memory://runs"), FsspecStorage)
    with pytest.raises(ConfigurationError, match="uri=nothing://x cannot be opened"):
        storage_from_uri("nothing://x")


def test_parts_are_joined():
    assert storage_join("a/", "", "/b", "c") == "a/b/c"
    assert storage_join("", "") == ""
