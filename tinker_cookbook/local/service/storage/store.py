"""Durable checkpoints: folders under the state folder, and the index over them.

    index.sqlite3            list of all checkpoints
    checkpoints/<folder>/    PEFT adapter, optimizer state, checkpoint.json (a copy of its records)
    staging/<instance>/      folders that a running process is writing
    locks/<instance>         lock that a running process holds
    running/<instance>.json  address of a running process

A checkpoint is written into staging, fsynced, renamed into `checkpoints/`, and only then indexed: a
crash leaves the old state or the new one. The next start removes what a dead process left behind.
It does not touch the files that a running process is writing.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.local.errors import OTHER_STATE_DIR, StorageError, UserError
from tinker_cookbook.local.service.storage.checkpoint_index import (
    Index,
    IndexDamagedError,
    NameTakenError,
)
from tinker_cookbook.local.service.storage.rows import CheckpointRow, RunRow
from tinker_cookbook.utils.durable_files import flush_folder, move_durably, write_atomically

__all__ = ["SPARE_BYTES", "NewCheckpoint", "Store"]

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
SPARE_BYTES = 2**20
"""A disk with less free space than this counts as full."""


@dataclass(frozen=True)
class NewCheckpoint:
    """A checkpoint that a client asked to save."""

    run_id: str
    segment: str
    name: str
    has_optimizer: bool
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None
    overwrite: bool = False


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_text(manifest: dict) -> str:
    return json.dumps(manifest, indent=1) + "\n"


def _unusable(state_dir: Path, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"state_dir={state_dir} cannot be used: {error}; free some space, or choose another "
        "--state-dir"
    )


class Store:
    """The checkpoints in a state folder, which several service processes may share."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.instance = f"{os.getpid()}-{secrets.token_hex(6)}"
        self._checkpoints = state_dir / "checkpoints"
        self._staging = state_dir / "staging" / self.instance
        self._locks = state_dir / "locks"
        self._pins: Counter[str] = Counter()
        self._unwanted: set[str] = set()
        """Folders that will be removed when nobody reads them any more."""
        try:
            for folder in (self._checkpoints, self._staging, self._locks):
                folder.mkdir(parents=True, exist_ok=True)
            state_dir.chmod(0o700)
            flush_folder(state_dir)  # so that checkpoints in it are found after a power failure
            self._lock_file = self._hold_lock()
        except OSError as error:
            raise ConfigurationError(
                f"state_dir={state_dir} cannot be written: {error}; {OTHER_STATE_DIR}"
            ) from error
        try:
            self.index = Index(state_dir / "index.sqlite3")
        except IndexDamagedError as error:
            self._put_index_aside(error)
            self.index = Index(state_dir / "index.sqlite3")
        try:
            if not self.index.is_complete:
                self._rebuild_index()
            self.remove_leftovers()
        except (OSError, StorageError) as error:
            raise _unusable(state_dir, error) from error

    def _hold_lock(self) -> int:
        path = self._locks / self.instance
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # another process may have removed the new file before it was locked
            if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
            os.close(descriptor)

    def close(self) -> None:
        """Release the lock and the index, and remove the staged folders of this process."""
        shutil.rmtree(self._staging, ignore_errors=True)
        with suppress(OSError):  # a folder that has become read-only
            self._note.unlink(missing_ok=True)
            (self._locks / self.instance).unlink(missing_ok=True)
        os.close(self._lock_file)
        self.index.close()

    def abandon(self) -> None:
        """Remove staged folders and the note, even while other threads are writing.

        The lock ends with the process. The next start removes what is still being written.
        """
        shutil.rmtree(self._staging, ignore_errors=True)
        with suppress(OSError):
            self._note.unlink(missing_ok=True)

    def announce(self, values: dict[str, object]) -> None:
        """Write a note with the address of this process, which only the owner can read.

        It is in `running/` until `close`. A note whose instance holds no lock was left by a crash.

        Raises:
            ConfigurationError: the disk is full or read-only.
        """
        try:
            self._note.parent.mkdir(mode=0o700, exist_ok=True)
            write_atomically(self._note, json.dumps(values), mode=0o600)
        except OSError as error:
            raise _unusable(self.state_dir, error) from error

    @property
    def _note(self) -> Path:
        return self.state_dir / "running" / f"{self.instance}.json"

    def stage(self) -> Path:
        """Create an empty folder on the same file system as the checkpoints."""
        folder = self._staging / secrets.token_hex(16)
        try:
            folder.mkdir()
        except OSError as error:
            raise StorageError(f"{folder} cannot be created: {error}") from error
        return folder

    @property
    def spill_dir(self) -> Path:
        """Folder for adapters that this process moves out of memory; removed when it ends."""
        return self._staging / "spill"

    def discard(self, staged: Path) -> None:
        """Remove a staged folder that will not be committed."""
        shutil.rmtree(staged, ignore_errors=True)

    def folder(self, row: CheckpointRow) -> Path:
        return self._checkpoints / row.folder

    def commit(self, staged: Path, new: NewCheckpoint) -> CheckpointRow:
        """Flush a staged folder to disk, move it to the checkpoints and index it.

        Raises:
            UserError: the name exists and `overwrite` is false.
            StorageError: the disk is full or read-only; the message names the file.
        """
        try:
            return self._commit(staged, new)
        except OSError as error:
            raise StorageError(f"{staged} cannot be saved: {error}; free some space") from error

    def _commit(self, staged: Path, new: NewCheckpoint) -> CheckpointRow:
        now = time.time()
        files = {path.name: path for path in staged.iterdir() if path.is_file()}
        row = CheckpointRow(
            folder=staged.name,
            run_id=new.run_id,
            segment=new.segment,
            name=new.name,
            created_at=now,
            size_bytes=sum(path.stat().st_size for path in files.values()),
            has_optimizer=new.has_optimizer,
            is_public=False,
            user_metadata=new.user_metadata,
            expires_at=None if new.ttl_seconds is None else now + new.ttl_seconds,
        )
        self._write_manifest(staged, row, files)
        move_durably(staged, self._checkpoints / staged.name)
        try:
            replaced = self.index.put_checkpoint(row, overwrite=new.overwrite)
        except NameTakenError as error:
            self._remove_folder(row.folder)
            raise self.name_taken(new) from error
        except StorageError:
            self._remove_folder(row.folder)
            raise
        if replaced is not None:
            self._remove_folder(replaced)
        return row

    @staticmethod
    def name_taken(new: NewCheckpoint) -> UserError:
        """Return the error for a name that already exists."""
        overwrite = " or set overwrite=True" if new.segment == "weights" else ""
        return UserError(
            f"path={new.name!r} already exists as tinker://{new.run_id}/{new.segment}/{new.name}; "
            f"choose another name{overwrite}"
        )

    def _write_manifest(self, staged: Path, row: CheckpointRow, files: dict[str, Path]) -> None:
        run = self.index.run(row.run_id)
        manifest = {
            "checkpoint": dataclasses.asdict(row),
            "run": None if run is None else dataclasses.asdict(run),
            "files": {
                name: {"size": path.stat().st_size, "sha256": _hash_file(path)}
                for name, path in sorted(files.items())
            },
            "instance": self.instance,
        }
        (staged / MANIFEST).write_text(_manifest_text(manifest), encoding="utf-8")

    def set_public(self, row: CheckpointRow, is_public: bool) -> None:
        """Publish or withdraw a checkpoint. The change is on disk when the call returns."""
        self._change(row, {"is_public": is_public})

    def set_expiry(self, row: CheckpointRow, expires_at: float | None) -> None:
        """Set when a checkpoint expires, in seconds since 1970; on disk when the call returns."""
        self._change(row, {"expires_at": expires_at})

    def _change(self, row: CheckpointRow, changes: dict[str, bool | float | None]) -> None:
        """Change the index, and the manifest from which a damaged index can be rebuilt."""
        with self.index.changing_checkpoint(row.folder, changes):
            try:
                manifest = self._read_manifest(row)
                manifest["checkpoint"].update(changes)
            except (UserError, KeyError, TypeError, AttributeError) as error:
                # the damaged checkpoint cannot be used any more, but it can still expire
                logger.warning("only the index has %s of %s: %s", changes, row.folder, error)
                return
            path = self.folder(row) / MANIFEST
            try:
                write_atomically(path, _manifest_text(manifest))
            except OSError as error:
                raise StorageError(f"{path} cannot be written: {error}") from error

    def find(self, run_id: str, segment: str, name: str) -> CheckpointRow | None:
        return self.index.checkpoint(run_id, segment, name)

    def weight_files(self, row: CheckpointRow) -> list[Path]:
        """Return the files of a checkpoint that a download contains: the adapter."""
        manifest = self._read_manifest(row)
        return [
            self._file(row, name) for name in manifest["files"] if not name.startswith("optimizer")
        ]

    def verify(self, row: CheckpointRow) -> Path:
        """Compare the files of a checkpoint with its manifest; returns its folder.

        Raises:
            UserError: a file is missing, truncated, altered or a link; the message names it.
        """
        folder = self.folder(row)
        for name, expected in self._read_manifest(row)["files"].items():
            path = self._file(row, name)
            size = path.stat().st_size
            if size != expected["size"]:
                raise UserError(
                    f"{row.tinker_path}: {path} has {size} bytes, but {expected['size']} were "
                    "written; the checkpoint is damaged"
                )
            if _hash_file(path) != expected["sha256"]:
                raise UserError(
                    f"{row.tinker_path}: {path} was altered since it was written; the checkpoint "
                    "is damaged"
                )
        return folder

    def _file(self, row: CheckpointRow, name: str) -> Path:
        """Return the path of a file in a manifest; refuse links and missing files."""
        path = self.folder(row) / name
        if Path(name).name != name or path.is_symlink():
            raise UserError(
                f"{row.tinker_path}: {path} is a link or outside its folder; the checkpoint is "
                "damaged"
            )
        if not path.is_file():
            raise UserError(f"{row.tinker_path}: {path} is missing; the checkpoint is damaged")
        return path

    def _read_manifest(self, row: CheckpointRow) -> dict:
        path = self.folder(row) / MANIFEST
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{row.tinker_path}: {path} cannot be read ({error}); the checkpoint is damaged"
            ) from error

    def copy(self, source: CheckpointRow, new: NewCheckpoint) -> CheckpointRow:
        """Duplicate a checkpoint under another run and name."""
        folder = self.verify(source)
        staged = self.stage()
        try:
            for name in self._read_manifest(source)["files"]:
                shutil.copyfile(folder / name, staged / name)
            return self.commit(staged, new)
        except OSError as error:
            raise StorageError(f"{staged} cannot be saved: {error}; free some space") from error
        finally:
            self.discard(staged)

    @contextmanager
    def pin(self, row: CheckpointRow) -> Iterator[None]:
        """Keep a checkpoint's files while they are read, even if it is deleted meanwhile."""
        self._pins[row.folder] += 1
        try:
            yield
        finally:
            self._pins[row.folder] -= 1
            if not self._pins[row.folder]:
                del self._pins[row.folder]
                if row.folder in self._unwanted:
                    self._unwanted.discard(row.folder)
                    self._remove_folder(row.folder)

    def delete(self, row: CheckpointRow) -> None:
        """Remove a checkpoint from the index, then its files.

        Raises:
            StorageError: the index cannot be changed.
        """
        self._forget([row.folder], lambda: self.index.delete_checkpoint(row.folder))

    def remove_expired(self) -> int:
        """Delete expired checkpoints; returns their number."""
        now = time.time()
        expired = self.index.expired(now)
        self._forget(expired, lambda: self.index.remove_expired(now))
        return len(expired)

    def _forget(self, folders: Sequence[str], change_index: Callable[[], None]) -> None:
        """Change the index, then remove folders. On a full disk, the folders are removed first.

        A change of the index needs some free space. If it fails even then, the checkpoint is still
        listed, is refused as damaged, and can be deleted again.
        """
        try:
            change_index()
        except StorageError:
            if shutil.disk_usage(self.state_dir).free > SPARE_BYTES:
                raise
            logger.warning(
                "the disk is full: checkpoint folders are removed before the index is changed"
            )
            self._remove_folders(folders)
            change_index()
        self._remove_folders(folders)

    def _remove_folders(self, folders: Sequence[str]) -> None:
        for folder in folders:
            self._remove_folder(folder)

    def _remove_folder(self, folder: str) -> None:
        if folder in self._pins:
            self._unwanted.add(folder)
            return
        shutil.rmtree(self._checkpoints / folder, ignore_errors=True)

    def remove_leftovers(self) -> int:
        """Remove staged folders of dead processes, and checkpoint folders without a row."""
        removed = sum(self._sweep_dead(lock) for lock in self._locks.iterdir())
        for folder in self._checkpoints.iterdir():
            # In this order, because a running writer holds its lock until its checkpoint is
            # indexed.
            if self._has_live_writer(folder) or self.index.has_folder(folder.name):
                continue
            shutil.rmtree(folder, ignore_errors=True)
            logger.warning("removed %s, which was not saved or deleted completely", folder)
            removed += 1
        return removed

    def _sweep_dead(self, lock: Path) -> bool:
        """Remove the staged folders of an instance if nobody holds its lock."""
        if lock.name == self.instance:
            return False
        try:
            descriptor = os.open(lock, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.state_dir / "staging" / lock.name, ignore_errors=True)
            (self.state_dir / "running" / f"{lock.name}.json").unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True

    def _has_live_writer(self, folder: Path) -> bool:
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            return (self._locks / manifest["instance"]).exists()
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _put_index_aside(self, error: IndexDamagedError) -> None:
        """Rename a damaged index, so that it can still be examined."""
        mark = f"damaged-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        for path in self.state_dir.glob("index.sqlite3*"):
            if "damaged" not in path.name:
                path.rename(path.with_name(f"{path.name}.{mark}"))
        logger.error(
            "%s; it is moved to index.sqlite3.%s and rebuilt from the checkpoint folders. Sessions "
            "and runs without a checkpoint are no longer listed",
            *(error, mark),
        )

    def _rebuild_index(self) -> None:
        """Fill a new index from the existing checkpoint folders.

        The index is marked as complete only at the end, and folders that it does not list are kept
        until then. So it is safe if this start is killed, or if another one does the same.
        """
        found: list[tuple[CheckpointRow, RunRow]] = []
        for folder in sorted(self._checkpoints.iterdir()):
            try:
                manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
                checkpoint = CheckpointRow(**manifest["checkpoint"])
                checkpoint.created_at = float(checkpoint.created_at)
                run = RunRow(**manifest["run"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                aside = self.state_dir / "damaged" / folder.name
                logger.warning(
                    "moved %s to %s: its %s cannot be read (%s)", folder, aside, MANIFEST, error
                )
                aside.parent.mkdir(exist_ok=True)
                folder.rename(aside)
                continue
            checkpoint.folder = folder.name
            found.append((checkpoint, run))
        # of two checkpoints with the same name, the newer replaced the older
        for checkpoint, run in sorted(found, key=lambda pair: -pair[0].created_at):
            with suppress(NameTakenError):
                self.index.insert(run)
            with suppress(NameTakenError):
                self.index.put_checkpoint(checkpoint, overwrite=False)
                logger.warning("indexed %s again", checkpoint.tinker_path)
        self.index.mark_complete()
