"""How long a service keeps logs, curves, and records of sessions and runs.

Checkpoints are removed when their owner deletes them or they expire. The records and the curve of a
run with checkpoints are kept as long as the checkpoints. Other records, curves and logs are removed
some time after their last use.
"""

from __future__ import annotations

import logging
import re
import time
from contextlib import suppress
from pathlib import Path

from tinker_cookbook.local.service.settings import RetentionSettings
from tinker_cookbook.local.service.storage.loss_curves import ProgressLog
from tinker_cookbook.local.service.storage.store import Store
from tinker_cookbook.utils.processes import is_running

__all__ = ["Retention", "log_folder", "log_path", "prune_logs"]

logger = logging.getLogger(__name__)

CHECK_SECONDS = 3600.0
_LOG_NAME = re.compile(r"service-(\d+)\.log(\.\d+)?")


def log_folder(state_dir: Path) -> Path:
    """Return the folder of the logs of a state folder's services."""
    return state_dir / "logs"


def log_path(state_dir: Path, pid: int) -> Path:
    """Return the path of a process's log. Older parts have a number appended."""
    return log_folder(state_dir) / f"service-{pid}.log"


def prune_logs(folder: Path, *, max_bytes: int, before: float) -> int:
    """Remove logs of ended processes, the oldest first.

    Args:
        max_bytes: maximum size of the kept logs together.
        before: logs that were last written before this time are always removed.

    Returns:
        The number of removed files.
    """
    num_removed = num_bytes = 0
    for modified_at, size, path in sorted(_ended_logs(folder), reverse=True):
        num_bytes += size
        if modified_at < before or num_bytes > max_bytes:
            with suppress(OSError):  # a folder that has become read-only
                path.unlink(missing_ok=True)
                num_removed += 1
    return num_removed


def _ended_logs(folder: Path) -> list[tuple[float, int, Path]]:
    found = []
    for path in folder.glob("service-*.log*"):
        name = _LOG_NAME.fullmatch(path.name)
        if name is None or is_running(int(name[1])):
            continue
        with suppress(FileNotFoundError):  # another service may remove the same file
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    return found


class Retention:
    """Removes old logs, records and curves, once an hour."""

    def __init__(self, settings: RetentionSettings, store: Store, progress: ProgressLog) -> None:
        self._settings = settings
        self._store = store
        self._progress = progress
        self._next_check = 0.0

    def remove_old_if_due(self) -> None:
        """Remove old data if the last check was an hour ago.

        Raises:
            StorageError: the disk is full or read-only.
        """
        if time.monotonic() >= self._next_check:
            self._next_check = time.monotonic() + CHECK_SECONDS
            self.remove_old()

    def remove_old(self) -> None:
        """Remove old logs, records of old sessions and runs, and the curves of runs that are gone.

        Raises:
            StorageError: the disk is full or read-only.
        """
        before = time.time() - self._settings.keep_seconds
        prune_logs(
            log_folder(self._store.state_dir), max_bytes=self._settings.log_bytes, before=before
        )
        num_removed = self._store.index.remove_old_records(before)
        if num_removed:
            logger.info("removed %d old records of sessions and runs", num_removed)
        self._progress.remove_unknown(self._store.index.run_ids)
