"""Durable checkpoints: folders under the state folder, and the index over them.

    index.sqlite3            what exists
    checkpoints/<folder>/    PEFT adapter, optimizer state, checkpoint.json (what the index says)
    staging/<instance>/      being written by a live process
    locks/<instance>         held by a live process
    running/<instance>.json  how to reach it

A checkpoint is written into staging, fsynced, renamed into `checkpoints/`, and only then indexed: a
crash leaves the old state or the new one. What a dead process left behind is removed by the next
start; what a live process is writing is never touched.
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
from tinker_cookbook.local.errors import StorageError, UserError
from tinker_cookbook.local.service.storage.index import (
    CheckpointRow,
    Index,
    IndexDamagedError,
    NameTakenError,
    RunRow,
)

__all__ = ["SPARE_BYTES", "NewCheckpoint", "Store"]

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
SPARE_BYTES = 2**20
"""A disk with less room than this counts as full."""


@dataclass(frozen=True)
class NewCheckpoint:
    """What a client asked to save."""

    run_id: str
    segment: str
    name: str
    has_optimizer: bool
    ttl_seconds: int | None = None
    user_metadata: dict[str, str] | None = None
    overwrite: bool = False


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    """The state folder of one or several service processes."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.instance = f"{os.getpid()}-{secrets.token_hex(6)}"
        self._checkpoints = state_dir / "checkpoints"
        self._staging = state_dir / "staging" / self.instance
        self._locks = state_dir / "locks"
        self._pins: Counter[str] = Counter()
        self._unwanted: set[str] = set()
        """Folders that are removed when nobody reads them any more."""
        try:
            for folder in (self._checkpoints, self._staging, self._locks):
                folder.mkdir(parents=True, exist_ok=True)
            state_dir.chmod(0o700)
            _sync_folder(state_dir)  # saved checkpoints are found below it after a power cut
            self._lock_file = self._hold_lock()
        except OSError as error:
            raise ConfigurationError(
                f"state_dir={state_dir} cannot be written: {error}; choose another --state-dir"
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
            # another process may have swept the new file away before it was locked
            if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
            os.close(descriptor)

    def close(self) -> None:
        """Release everything; staged folders of this process are removed."""
        shutil.rmtree(self._staging, ignore_errors=True)
        with suppress(OSError):  # a folder that has become read-only
            self._note.unlink(missing_ok=True)
            (self._locks / self.instance).unlink(missing_ok=True)
        os.close(self._lock_file)
        self.index.close()

    def abandon(self) -> None:
        """Remove staged folders and the note, while other threads may still be writing.

        The lock goes with the process: what is being saved just now is swept by the next start.
        """
        shutil.rmtree(self._staging, ignore_errors=True)
        with suppress(OSError):
            self._note.unlink(missing_ok=True)

    def announce(self, values: dict[str, object]) -> None:
        """Leave a note, readable by the owner only, that says how to reach this process.

        It is in `running/` until `close`; one whose instance holds no lock was left by a crash.

        Raises:
            ConfigurationError: the disk does not take it.
        """
        folder = self.state_dir / "running"
        temporary = folder / f".{self.instance}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(values, file)
            temporary.replace(self._note)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise _unusable(self.state_dir, error) from error

    @property
    def _note(self) -> Path:
        return self.state_dir / "running" / f"{self.instance}.json"

    def stage(self) -> Path:
        """Make an empty folder on the same file system as the checkpoints."""
        folder = self._staging / secrets.token_hex(16)
        try:
            folder.mkdir()
        except OSError as error:
            raise StorageError(f"{folder} cannot be made: {error}") from error
        return folder

    @property
    def spill_dir(self) -> Path:
        """Where this process keeps what it moves out of memory; gone with it."""
        return self._staging / "spill"

    def discard(self, staged: Path) -> None:
        """Remove a staged folder that will not be committed."""
        shutil.rmtree(staged, ignore_errors=True)

    def folder(self, row: CheckpointRow) -> Path:
        return self._checkpoints / row.folder

    def commit(self, staged: Path, new: NewCheckpoint) -> CheckpointRow:
        """Make a written folder durable, move it in place and index it.

        Raises:
            UserError: the name is taken and `overwrite` is false.
            StorageError: naming the file, if the disk does not take it.
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
        for path in staged.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _sync_folder(staged)
        target = self._checkpoints / staged.name
        staged.rename(target)
        _sync_folder(self._checkpoints)
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
        """The error for a name that exists."""
        overwrite = " or set overwrite=True" if new.segment == "weights" else ""
        return UserError(
            f"path={new.name!r} exists already as tinker://{new.run_id}/{new.segment}/{new.name}; "
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
        """Publish a checkpoint or take that back; durable when the call returns."""
        self._change(row, {"is_public": is_public})

    def set_expiry(self, row: CheckpointRow, expires_at: float | None) -> None:
        """Set when a checkpoint goes, in seconds since 1970; durable when the call returns."""
        self._change(row, {"expires_at": expires_at})

    def _change(self, row: CheckpointRow, changes: dict[str, bool | float | None]) -> None:
        """Change the index, and the manifest from which a damaged index is built again."""
        with self.index.changing_checkpoint(row.folder, changes):
            try:
                manifest = self._read_manifest(row)
                manifest["checkpoint"].update(changes)
            except (UserError, KeyError, TypeError, AttributeError) as error:
                # it is refused when it is used, and may still be given an end
                logger.warning("only the index knows %s of %s: %s", changes, row.folder, error)
                return
            self._replace_manifest(self.folder(row), manifest)

    @staticmethod
    def _replace_manifest(folder: Path, manifest: dict) -> None:
        temporary = folder / f".{MANIFEST}.{secrets.token_hex(8)}"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(_manifest_text(manifest))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(folder / MANIFEST)
            _sync_folder(folder)
        except OSError as error:
            raise StorageError(f"{folder / MANIFEST} cannot be written: {error}") from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def find(self, run_id: str, segment: str, name: str) -> CheckpointRow | None:
        return self.index.checkpoint(run_id, segment, name)

    def weight_files(self, row: CheckpointRow) -> list[Path]:
        """Files of a checkpoint that a download holds: the adapter without our own records."""
        manifest = self._read_manifest(row)
        return [
            self._file(row, name) for name in manifest["files"] if not name.startswith("optimizer")
        ]

    def verify(self, row: CheckpointRow) -> Path:
        """Return the folder after comparing its files with what was written.

        Raises:
            UserError: a file is missing, truncated, altered or a link; names it.
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
        """A file that a manifest lists; a missing one, or one that leads elsewhere, is refused."""
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
        """Keep a checkpoint's files while they are being read, even if it is deleted meanwhile."""
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
        """Forget a checkpoint, then remove its files.

        Raises:
            StorageError: the index does not take the change.
        """
        self._forget([row.folder], lambda: self.index.delete_checkpoint(row.folder))

    def remove_expired(self) -> int:
        """Delete checkpoints whose time is over; returns how many."""
        now = time.time()
        expired = self.index.expired(now)
        self._forget(expired, lambda: self.index.remove_expired(now))
        return len(expired)

    def _forget(self, folders: Sequence[str], change_index: Callable[[], None]) -> None:
        """Change the index and remove folders; where the disk is full the files go first.

        A change takes some room too. Should it still fail then, the checkpoint is listed, refused
        as damaged, and can be deleted again.
        """
        try:
            change_index()
        except StorageError:
            if shutil.disk_usage(self.state_dir).free > SPARE_BYTES:
                raise
            logger.warning("the disk is full: deleted checkpoints make room before they are noted")
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
        """Remove what dead processes left: staged folders, and others that were never indexed."""
        removed = sum(self._sweep_dead(lock) for lock in self._locks.iterdir())
        for folder in self._checkpoints.iterdir():
            # In this order: a live writer holds its lock until after its checkpoint is indexed.
            if self._has_live_writer(folder) or self.index.has_folder(folder.name):
                continue
            shutil.rmtree(folder, ignore_errors=True)
            logger.warning("removed %s, which was not completely saved or deleted", folder)
            removed += 1
        return removed

    def _sweep_dead(self, lock: Path) -> bool:
        """Remove the staged folders of an instance whose lock nobody holds."""
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
        """Keep a damaged index for whoever wants to look at it, out of the way."""
        mark = f"damaged-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        for path in self.state_dir.glob("index.sqlite3*"):
            if "damaged" not in path.name:
                path.rename(path.with_name(f"{path.name}.{mark}"))
        logger.error(
            "%s; moved to index.sqlite3.%s and built again from the checkpoint folders. Sessions "
            "and runs without a checkpoint are not listed any more",
            *(error, mark),
        )

    def _rebuild_index(self) -> None:
        """Fill a new index from checkpoint folders that are already there.

        A start that is killed meanwhile, or another one at the same time, does no harm: an index
        counts as complete at the end only, and what it does not list is kept until then.
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
        # of two with one name the newer has replaced the other
        for checkpoint, run in sorted(found, key=lambda pair: -pair[0].created_at):
            with suppress(NameTakenError):
                self.index.insert(run)
            with suppress(NameTakenError):
                self.index.put_checkpoint(checkpoint, overwrite=False)
                logger.warning("indexed %s again", checkpoint.tinker_path)
        self.index.mark_complete()
