"""Checkpoints are on disk or not at all, and a new start finds them."""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportPossiblyUnboundVariable=false

import dataclasses
import errno
import itertools
import json
import multiprocessing
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.local.service.disks import fill, small_disk
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.local.errors import StorageError, UserError
from tinker_cookbook.local.service.storage.checkpoint_index import Index
from tinker_cookbook.local.service.storage.rows import CheckpointRow, RunRow, SessionRow
from tinker_cookbook.local.service.storage.store import NewCheckpoint, Store

RUN = RunRow(
    run_id="s:train:0",
    session_id="s",
    base_model="m",
    lora={"rank": 4},
    user_metadata={"a": "b"},
    created_at=1.0,
    last_request_at=2.0,
    is_trainable=True,
)


@pytest.fixture
def store(tmp_path: Path):
    store = Store(tmp_path / "state")
    store.index.insert(RUN)
    yield store
    store.close()


def save(store: Store, name: str, content: bytes = b"weights", **options) -> CheckpointRow:
    staged = store.stage()
    (staged / "adapter_model.safetensors").write_bytes(content)
    (staged / "optimizer.safetensors").write_bytes(b"moments")
    segment = options.pop("segment", "weights")
    new = NewCheckpoint(RUN.run_id, segment, name, has_optimizer=True, **options)
    return store.commit(staged, new)


def test_a_committed_checkpoint_is_found_and_verified(store: Store) -> None:
    row = save(store, "a", user_metadata={"step": "1"})
    assert row.tinker_path == "tinker://s:train:0/weights/a"
    assert row.size_bytes == len(b"weights") + len(b"moments")
    assert store.find(RUN.run_id, "weights", "a") == row
    assert store.find(RUN.run_id, "sampler_weights", "a") is None
    folder = store.verify(row)
    assert (folder / "adapter_model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in store.weight_files(row)] == ["adapter_model.safetensors"]
    assert list((store.state_dir / "staging" / store.instance).iterdir()) == []


def test_a_taken_name_is_refused_and_leaves_no_folder(store: Store) -> None:
    save(store, "a")
    with pytest.raises(UserError, match="already exists"):
        save(store, "a", b"other")
    assert len(list((store.state_dir / "checkpoints").iterdir())) == 1
    save(store, "a", segment="sampler_weights")


def test_overwriting_replaces_files_and_metadata(store: Store) -> None:
    save(store, "a", user_metadata={"old": "1"}, ttl_seconds=3600)
    row = save(store, "a", b"new weights", overwrite=True)
    found = store.find(RUN.run_id, "weights", "a")
    assert found == row
    assert found.user_metadata is None
    assert found.expires_at is None
    assert (store.verify(row) / "adapter_model.safetensors").read_bytes() == b"new weights"
    assert len(list((store.state_dir / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b"weigh"), "has 5 bytes"),
        (lambda path: path.write_bytes(b"wEights"), "was altered"),
    ],
)
def test_damaged_files_are_named(store: Store, damage, message: str) -> None:
    row = save(store, "a")
    other = save(store, "b")
    damage(store.folder(row) / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"weights/a: .*adapter_model.safetensors {message}"):
        store.verify(row)
    store.verify(other)


def test_a_damaged_manifest_is_named(store: Store) -> None:
    row = save(store, "a")
    (store.folder(row) / "checkpoint.json").write_text("{")
    with pytest.raises(UserError, match=r"checkpoint\.json cannot be read"):
        store.verify(row)


def test_time_to_live_hides_then_removes(store: Store) -> None:
    row = save(store, "a", ttl_seconds=3600)
    assert row.expires_at is not None
    assert abs(row.expires_at - time.time() - 3600) < 5
    store.set_expiry(row, time.time() - 1)
    assert store.find(RUN.run_id, "weights", "a") is None
    assert store.index.checkpoints() == ([], 0)
    assert store.remove_expired() == 1
    assert not store.folder(row).exists()
    save(store, "a")


def test_a_change_that_a_full_disk_does_not_take_is_not_made(store: Store, monkeypatch) -> None:
    row = save(store, "a", ttl_seconds=3600)
    files = {path.name: path.read_bytes() for path in store.folder(row).iterdir()}

    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match=r"checkpoint\.json"):
        store.set_expiry(row, None)
    monkeypatch.undo()
    assert store.find(RUN.run_id, "weights", "a") == row
    assert {path.name: path.read_bytes() for path in store.folder(row).iterdir()} == files


def test_a_checkpoint_without_its_manifest_can_still_be_given_an_end(store: Store) -> None:
    row = save(store, "a")
    (store.folder(row) / "checkpoint.json").write_text("{")
    store.set_expiry(row, time.time() - 1)
    assert store.remove_expired() == 1


def test_an_expired_name_can_be_used_again_before_it_is_swept(store: Store) -> None:
    row = save(store, "a")
    store.set_expiry(row, time.time() - 1)
    save(store, "a", b"again")
    assert store.find(RUN.run_id, "weights", "a") is not None


def test_files_in_use_outlive_their_deletion(store: Store) -> None:
    row = save(store, "a")
    with store.pin(row):
        store.delete(row)
        assert store.find(RUN.run_id, "weights", "a") is None
        assert store.folder(row).exists()
    assert not store.folder(row).exists(), "gone once nobody reads it"
    row = save(store, "a")
    store.delete(row)
    assert not store.folder(row).exists()


def test_copies_have_their_own_files(store: Store) -> None:
    source = save(store, "a")
    target = RunRow(**(RUN.__dict__ | {"run_id": "t:train:0"}))
    store.index.insert(target)
    copy = store.copy(source, NewCheckpoint("t:train:0", "weights", "a", has_optimizer=True))
    store.delete(source)
    assert (store.verify(copy) / "adapter_model.safetensors").read_bytes() == b"weights"


def test_a_copy_that_does_not_fit_leaves_nothing(store: Store, monkeypatch) -> None:
    source = save(store, "a")

    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full_disk)
    with pytest.raises(StorageError, match="No space left"):
        store.copy(source, NewCheckpoint("other", "weights", "a", has_optimizer=True))
    assert list((store.state_dir / "staging" / store.instance).iterdir()) == []


def test_pages_are_newest_first(store: Store) -> None:
    for name in "abcd":
        save(store, name)
    page, total = store.index.checkpoints(limit=2, offset=1)
    assert [row.name for row in page] == ["c", "b"]
    assert total == 4


def _leave_half_written(state: Path, stop_after: str) -> None:
    store = Store(state)
    staged = store.stage()
    (staged / "adapter_model.safetensors").write_bytes(b"half")
    if stop_after == "rename":
        store.index.put_checkpoint = lambda *a, **k: os._exit(1)  # type: ignore[method-assign]
        store.commit(staged, NewCheckpoint(RUN.run_id, "weights", "half", has_optimizer=False))
    os._exit(1)


@pytest.mark.parametrize("stop_after", ["write", "rename"])
def test_what_a_killed_process_left_is_swept_and_nothing_else(store, stop_after: str) -> None:
    row = save(store, "kept")
    staged = store.stage()
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=_leave_half_written, args=(store.state_dir, stop_after))
    process.start()
    process.join()
    assert process.exitcode == 1
    other = Store(store.state_dir)
    assert other.find(RUN.run_id, "weights", "kept") == row
    assert other.find(RUN.run_id, "weights", "half") is None
    assert staged.exists(), "a live process's folder must stay"
    assert [path.name for path in (store.state_dir / "checkpoints").iterdir()] == [row.folder]
    stagings = {path.name for path in (store.state_dir / "staging").iterdir()}
    assert stagings == {store.instance, other.instance}
    other.close()


def test_a_lost_index_is_rebuilt_from_the_folders(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.index.insert(RUN)
    row = save(store, "a")
    damaged = save(store, "b")
    (store.folder(damaged) / "checkpoint.json").write_text("{")
    store.close()
    for path in tmp_path.glob("index.sqlite3*"):
        path.unlink()
    again = Store(tmp_path)
    assert again.find(RUN.run_id, "weights", "a") == row
    assert again.index.run(RUN.run_id) == RUN
    again.verify(row)
    again.close()


def test_a_rebuild_that_was_cut_short_loses_nothing(tmp_path: Path, monkeypatch) -> None:
    store = Store(tmp_path)
    store.index.insert(RUN)
    rows = [save(store, name) for name in "abc"]
    store.close()
    for path in tmp_path.glob("index.sqlite3*"):
        path.unlink()
    put, num_put = Index.put_checkpoint, itertools.count()

    def die_at_the_second(index: Index, row: CheckpointRow, *, overwrite: bool) -> str | None:
        if next(num_put) == 1:
            raise KeyboardInterrupt
        return put(index, row, overwrite=overwrite)

    with monkeypatch.context() as patch:
        patch.setattr(Index, "put_checkpoint", die_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            Store(tmp_path)
    again = Store(tmp_path)
    assert [again.find(RUN.run_id, "weights", name) for name in "abc"] == rows
    for row in rows:
        again.verify(row)
    again.close()


def test_a_rebuild_takes_the_newer_of_two_with_one_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.index.insert(RUN)
    for _ in range(4):  # folders have random names
        old = save(store, "a", overwrite=True)
        aside = tmp_path / "aside"
        shutil.copytree(store.folder(old), aside)
        new = save(store, "a", b"newer", overwrite=True)
        shutil.move(aside, store.folder(old))  # as if killed before it was removed
        store.close()
        for path in tmp_path.glob("index.sqlite3*"):
            path.unlink()
        store = Store(tmp_path)
        assert store.find(RUN.run_id, "weights", "a") == new
        assert not store.folder(old).exists()
    store.close()


@pytest.mark.parametrize("kind", ["other bytes", "wrong pages", "cut"])
def test_a_damaged_index_is_kept_aside_and_built_again(tmp_path: Path, caplog, kind: str) -> None:
    store = Store(tmp_path)
    store.index.insert(RUN)
    row = save(store, "a")
    store.close()
    path = tmp_path / "index.sqlite3"
    content = path.read_bytes()
    for leftover in tmp_path.glob("index.sqlite3-*"):
        leftover.unlink()
    damaged = {
        "other bytes": b"not a database" * 1000,
        "wrong pages": content[:4096] + b"\xff" * (len(content) - 4096),
        "cut": content[: len(content) // 2 + 7],
    }[kind]
    path.write_bytes(damaged)
    again = Store(tmp_path)
    assert again.find(RUN.run_id, "weights", "a") == row
    again.close()
    assert "index.sqlite3 is damaged" in caplog.text
    (aside,) = tmp_path.glob("index.sqlite3.damaged-*")
    assert aside.read_bytes() == damaged


def test_an_index_of_another_format_is_left_alone(tmp_path: Path) -> None:
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "index.sqlite3") as connection:
        connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(ConfigurationError, match=r"index\.sqlite3 has format 99"):
        Store(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigurationError, match=r"state_dir=.*file/state cannot be written"):
        Store(blocked / "state")


def test_manifests_say_what_the_index_says(store: Store) -> None:
    row = save(store, "a")
    manifest = json.loads((store.folder(row) / "checkpoint.json").read_text())
    assert CheckpointRow(**manifest["checkpoint"]) == row
    assert RunRow(**manifest["run"]) == RUN
    assert manifest["files"]["optimizer.safetensors"]["size"] == 7


def _save_many(state: Path, first: int) -> None:
    store = Store(state)
    for number in range(first, first + 10):
        save(store, f"n{number}")
    store.close()


def test_processes_share_one_folder(store: Store) -> None:
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_save_many, args=(store.state_dir, n * 10)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    rows, total = store.index.checkpoints()
    assert total == 30
    assert all(store.verify(row) for row in rows)


@contextmanager
def write_lock(store: Store) -> Iterator[None]:
    """Another program writes to the index, a backup for example."""
    other = sqlite3.connect(store.state_dir / "index.sqlite3", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


def test_reading_waits_for_no_writer(store: Store) -> None:
    row = save(store, "a")
    change = threading.Thread(target=store.set_public, args=[row, True])
    with write_lock(store):
        change.start()
        time.sleep(0.2)
        began = time.monotonic()
        assert store.find(RUN.run_id, "weights", "a") == row
        assert store.index.runs(limit=5, offset=0, project_id=None) == ([RUN], 1)
        assert time.monotonic() - began < 5
        assert change.is_alive()
    change.join(30)
    found = store.find(RUN.run_id, "weights", "a")
    assert found is not None
    assert found.is_public


DAMAGE = [
    ("runs", "lora", "{"),
    ("runs", "lora", "[]"),
    ("runs", "lora", "{}"),
    ("runs", "user_metadata", "[" * 5000),
    ("runs", "last_request_at", "yesterday"),
    ("runs", "created_at", 1e300),
    ("runs", "base_model", b"\xff"),
    ("checkpoints", "user_metadata", '"x"'),
    ("checkpoints", "size_bytes", "many"),
    ("checkpoints", "expires_at", 1e300),
    ("sessions", "status", "{}"),
    ("sessions", "tags", "{}"),
]


@pytest.mark.parametrize(("table", "column", "value"), DAMAGE)
def test_a_damaged_row_is_passed_over(store: Store, caplog, table, column, value) -> None:
    """The others are listed, and the log names the damaged one once."""
    index = store.index
    for number in (1, 2):
        run_id = f"{number}:train:0"
        index.insert(dataclasses.replace(RUN, run_id=run_id, session_id=str(number)))
        staged = store.stage()
        new = NewCheckpoint(run_id, "weights", "x", has_optimizer=False, user_metadata={"a": "b"})
        store.commit(staged, new)
        index.insert(
            SessionRow(str(number), 1.0, 2.0, "name", None, [], "default", None, {"type": "active"})
        )
    with index.transaction() as connection:
        key = "session_id" if table == "sessions" else "run_id"
        damaged = "1" if table == "sessions" else "1:train:0"
        connection.execute(f"UPDATE {table} SET {column}=? WHERE {key}=?", (value, damaged))
    for _ in range(2):
        listed = {
            "runs": {row.run_id for row in index.runs(limit=10, offset=0, project_id=None)[0]},
            "checkpoints": {row.run_id for row in index.checkpoints()[0]},
            "sessions": {row.session_id for row in index.sessions(limit=10, offset=0)},
        }
    kept = {key for key in listed.pop(table) if key != RUN.run_id}
    assert kept == {"2" if table == "sessions" else "2:train:0"}
    assert all(any(key.startswith("1") for key in keys) for keys in listed.values())
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert f"the row {table}" in errors[0].getMessage()


@pytest.mark.parametrize("how", ["delete", "expire"])
def test_deleting_works_on_a_full_disk(tmp_path: Path, how: str) -> None:
    """It is what makes room."""
    with small_disk(tmp_path / "disk", "4m"):
        store = Store(tmp_path / "disk" / "state")
        store.index.insert(RUN)
        kept, row = save(store, "kept"), save(store, "large", b"x" * 500_000, ttl_seconds=3600)
        if how == "expire":
            store.set_expiry(row, time.time() - 1)
        fill(tmp_path / "disk")
        with pytest.raises((StorageError, OSError)):
            save(store, "more")
        if how == "expire":
            assert store.remove_expired() == 1
        else:
            store.delete(row)
        assert store.index.checkpoints()[0] == [kept]
        assert not store.folder(row).exists()
        store.verify(kept)
        store.close()
