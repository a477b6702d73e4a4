"""What is known about the runs of a storage, kept in a file so that the next list is quick.

An entry is used again only while the run's folder and growing files have the same sizes and times.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from tinker_cookbook.model_files import cookbook_home
from tinker_cookbook.stores.run_facts import Best, Facts
from tinker_cookbook.stores.storage import LocalStorage, Storage, storage_join
from tinker_cookbook.utils.durable_files import write_atomically
from tinker_cookbook.utils.run_files import CHECKPOINTS_FILE, METRICS_FILE

__all__ = ["Entry", "RunIndex", "Signature"]

VERSION = 1
UNSURE_SECONDS = 2.0
"""A folder that changed so shortly before it was listed may change again at the same time."""
Signature = list[float]
"""Time of the folder; size and time of the metrics and of the records of checkpoints."""


@dataclass
class Entry:
    """What is known about a run."""

    signature: Signature
    listed_at: float
    names: list[str]
    """Names in the run's folder, without the folders of iterations."""
    iteration_count: int
    facts: Facts
    best: Best | None = None
    has_best: bool = False
    """Whether the whole file of metrics was read for `best`."""
    disk_bytes: int | None = None
    """Size of all files; None if they were not counted yet."""
    changed: bool = field(default=True, compare=False)
    """Whether the entry differs from the file of the index."""

    @property
    def is_sure(self) -> bool:
        """Whether a later change of the folder has another time."""
        # The folders of some file systems have no time.
        return 0 < self.signature[1] < self.listed_at - UNSURE_SECONDS


class RunIndex:
    """The entries of a storage.

    Args:
        storage: The storage. Only entries of a local folder are kept in a file.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._path = _index_path(storage)
        self._entries = {} if self._path is None else _read(self._path)
        self._num_saved = len(self._entries)

    def get(self, prefix: str) -> Entry | None:
        """Return what is known about a run; None if nothing is, or its files may have changed."""
        entry = self._entries.get(prefix)
        if entry is None or not entry.is_sure or entry.signature != self.signature(prefix):
            return None
        return entry

    def put(self, prefix: str, entry: Entry) -> None:
        """Remember a run."""
        self._entries[prefix] = entry

    def signature(self, prefix: str) -> Signature:
        """Return the sizes and times by which a change of a run is noticed."""
        values: Signature = []
        for name in ("", METRICS_FILE, CHECKPOINTS_FILE):
            found = self._storage.stat(storage_join(prefix, name))
            if found is None:
                values += [-1.0, -1.0]
            elif found.is_dir:
                values += [0.0, found.mtime]
            else:
                values += [float(found.size), found.mtime]
        return values

    def keep_only(self, prefixes: set[str]) -> None:
        """Forget runs that no longer exist."""
        self._entries = {key: value for key, value in self._entries.items() if key in prefixes}

    def save(self) -> None:
        """Write the file, if anything has changed. A failure to write it is ignored."""
        entries = self._entries
        changed = any(entry.changed for entry in entries.values())
        if self._path is None or (not changed and len(entries) == self._num_saved):
            return
        rows = {}
        for prefix, entry in entries.items():
            entry.changed = False
            if entry.is_sure:
                rows[prefix] = entry
        text = json.dumps({"version": VERSION, "entries": rows}, default=vars)
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, text)
        self._num_saved = len(entries)


def _index_path(storage: Storage) -> Path | None:
    if not isinstance(storage, LocalStorage):
        return None
    name = hashlib.sha256(str(storage.root.resolve()).encode()).hexdigest()[:16]
    return cookbook_home() / "run_index" / f"{name}.json"


def _read(path: Path) -> dict[str, Entry]:
    """Return the entries of a file; empty if it is missing, damaged or of another version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            return {}
        return {prefix: _entry(row) for prefix, row in content["entries"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _entry(row: dict) -> Entry:
    best = row.pop("best")
    facts = Facts(**row.pop("facts"))
    entry = Entry(**row, facts=facts, best=Best(**best) if best else None)
    entry.changed = False
    return entry
