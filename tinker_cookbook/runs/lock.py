"""The lock of a run directory: one process at a time writes there.

The process holds an advisory lock on a small file in the directory, and the file says which process
that is. The system releases the lock when the process ends, even after `kill -9`. On file systems
without such locks only the content of the file counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.utils.processes import is_running

__all__ = ["LOCK_FILE", "hold", "is_in_use", "refuse_if_held"]

LOCK_FILE = ".in_use.json"
ATTEMPTS = 20
NOTE_SECONDS = 0.02
"""Time that a starting run needs at most between creating the lock file and locking it."""
Note = dict[str, object]
"""The content of the lock file."""
_MINE: set[tuple[int, int]] = set()
"""Device and inode of the lock files that this process holds."""


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold the lock of an existing run directory, against other processes and other runs here.

    Raises:
        ConfigurationError: if the directory is in use (the message names the process and its start
            time) or cannot be written.
    """
    path = folder / LOCK_FILE
    descriptor = _acquire(path)
    identity = _identity(os.fstat(descriptor))
    _MINE.add(identity)
    try:
        yield
    finally:
        # Removed while locked: a process that opened it meanwhile sees that the path is gone.
        with contextlib.suppress(OSError):
            path.unlink()
        _MINE.discard(identity)
        os.close(descriptor)


def refuse_if_held(folder: Path) -> None:
    """Raise an error if a run directory is in use.

    Raises:
        ConfigurationError: if it is in use; the message names the process and its start time.
    """
    path = folder / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return
    try:
        if _is_held(descriptor, path):
            raise _in_use(path)
    finally:
        os.close(descriptor)


def is_in_use(folder: Path) -> bool:
    """Return whether a process uses a run directory; for programs that only read runs.

    A process that has ended does not count, even if its lock file is still there. Nothing in the
    directory is changed, and a run that starts at the same time is not hindered.
    """
    path = folder / LOCK_FILE
    if not path.exists():
        return False
    note = _read_note(path)
    if not note:  # a run that starts now locks the file before it writes the note
        time.sleep(NOTE_SECONDS)
        note = _read_note(path)
    if _is_dead(note):
        return False
    # The process may be another one that has got the same number since: ask the system.
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        locked = _try_lock(descriptor)
        return bool(note) if locked is None else not locked
    finally:
        os.close(descriptor)


def _acquire(path: Path) -> int:
    for _ in range(ATTEMPTS):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigurationError(
                f"log_path={path.parent} cannot be written: {error.strerror}; use another folder."
            ) from error
        if _is_held(descriptor, path):
            os.close(descriptor)
            raise _in_use(path)
        if _names(path, descriptor):
            _write_note(descriptor)
            return descriptor
        os.close(descriptor)
    raise _in_use(path)


def _is_held(descriptor: int, path: Path) -> bool:
    """Try to lock; a lock that only children of a dead process still hold is discarded."""
    locked = _try_lock(descriptor)
    if locked:
        return False
    note = _read_note(path)
    if locked is None and not note:
        return False
    if _identity(os.fstat(descriptor)) in _MINE or not _is_dead(note):
        return True
    if locked is None:
        return False
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    return False


def _try_lock(descriptor: int) -> bool | None:
    """Return whether this process now has the lock; None if the file system has no locks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def _names(path: Path, descriptor: int) -> bool:
    """Return whether the path still names the opened file, instead of nothing or a newer file."""
    try:
        return _identity(path.stat()) == _identity(os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _write_note(descriptor: int) -> None:
    note = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with contextlib.suppress(OSError):  # the lock also works on a full disk
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(note).encode(), 0)


def _read_note(path: Path) -> Note:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _is_dead(note: Note) -> bool:
    pid, here = note.get("pid"), note.get("host") == socket.gethostname()
    return here and isinstance(pid, int) and not is_running(pid)


def _in_use(path: Path) -> ConfigurationError:
    note = _read_note(path)
    pid, host = note.get("pid"), note.get("host")
    here = host == socket.gethostname()
    who = f"process {pid}" if here else f"process {pid} on {host}"
    if not note:
        who = "a process that has just started"
    elif here and pid == os.getpid():
        who = f"another run of this process ({pid})"
    stop = f", stop it (kill {pid})" if here and pid != os.getpid() else ""
    return ConfigurationError(
        f"log_path={path.parent} is in use by {who}{_since(note)}; one run at a time writes "
        f"there. Wait for it{stop}, or use another log_path."
        + ("" if here or not note else f" If that process is gone, delete {path}.")
    )


def _since(note: Note) -> str:
    try:
        started = datetime.fromisoformat(str(note["started_at"]))
    except (KeyError, TypeError, ValueError):
        return ""
    minutes = (datetime.now(UTC) - started).total_seconds() / 60
    return f" since {started.astimezone():%Y-%m-%d %H:%M:%S} ({minutes:.0f} min ago)"
