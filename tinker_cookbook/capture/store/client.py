"""Record every SDK call of a program, and of the programs that it starts, in one database.

    with capture_to_store("my-run", data_dir="captures"):
        ...                                      # calls are recorded with run_id="my-run"

The database is `captures.sqlite` in the folder. A small server writes it, so that several processes
can record at the same time.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from tinker_cookbook.capture import propagate
from tinker_cookbook.capture.exporter import CaptureExporter, CaptureRecord
from tinker_cookbook.capture.instrument import instrument_tinker, uninstrument_tinker
from tinker_cookbook.capture.scope import RESERVED_KEYS, ScopeValue, capture
from tinker_cookbook.capture.store.daemon import INFO
from tinker_cookbook.exceptions import TrainingError

__all__ = [
    "CaptureSession",
    "JsonDict",
    "StoreSink",
    "capture_to_store",
    "ensure_daemon",
    "wire_rows_from_sample_record",
]

JsonDict: TypeAlias = dict[str, Any]


def wire_rows_from_sample_record(record: CaptureRecord) -> list[JsonDict]:
    """Return a record as rows of the database: one per sampled sequence, one for other calls.

    Reserved keys of the scope become fields of the row; the others are in its `tags`.
    """
    scope = dict(record.get("scope") or {})
    row: JsonDict = {key: scope.pop(key) for key in RESERVED_KEYS & scope.keys()}
    row |= {key: record[key] for key in ("kind", "time", "seconds", "error") if key in record}
    row |= {"tags": scope, "request": record.get("request")}
    response = record.get("response") or {}
    sequences = response.get("sequences")
    if not sequences:
        return [row | {"response": response}]
    return [row | {"sample": at} | sequence for at, sequence in enumerate(sequences)]


class StoreSink:
    """Sends records to the server of a database."""

    def __init__(self, base_url: str, *, default_timeout: float = 10.0) -> None:
        """Connect.

        Args:
            base_url: What `ensure_daemon` returned.
            default_timeout: Maximum seconds of an export that names no timeout.
        """
        self._url, _, self._key = base_url.partition("#")
        self._timeout = default_timeout

    def export(self, records: Sequence[CaptureRecord], timeout: float | None = None) -> None:
        """Send records; they are kept when this returns.

        Raises:
            OSError: the server cannot be reached, or refuses them.
        """
        rows = [row for record in records for row in wire_rows_from_sample_record(record)]
        request = urllib.request.Request(
            f"{self._url}/rows",
            json.dumps(rows).encode(),
            {"authorization": f"Bearer {self._key}", "content-type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=self._timeout if timeout is None else timeout):
            pass


_started: list[subprocess.Popen[bytes]] = []
"""Servers that this process started. They run longer than it, so nothing waits for them."""


def ensure_daemon(
    data_dir: str | Path,
    *,
    idle_shutdown_minutes: float | None = 60.0,
    spawn_timeout: float = 30.0,
) -> str:
    """Return the address of the folder's server, which is started if none runs.

    The key follows the address after a `#`.

    Raises:
        TrainingError: the server did not start in time.
    """
    folder = Path(data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "daemon.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = _find_daemon(folder)
        if found is not None:
            return found
        command = [sys.executable, "-m", "tinker_cookbook.capture.store.daemon", str(folder)]
        command += ["--idle-minutes", str(idle_shutdown_minutes or 0)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        _started.append(process)
        deadline = time.monotonic() + spawn_timeout
        while process.poll() is None and time.monotonic() < deadline:
            found = _find_daemon(folder)
            if found is not None:
                return found
            time.sleep(0.02)
    raise TrainingError(f"the server of {folder} did not start; is the folder writable?")


def _find_daemon(folder: Path) -> str | None:
    try:
        info = json.loads((folder / INFO).read_text())
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{info['base_url']}/healthz", timeout=2.0):
            return f"{info['base_url']}#{info['key']}"
    except (OSError, ValueError, KeyError, urllib.error.URLError):
        return None


@dataclass
class CaptureSession:
    """A recording that runs."""

    base_url: str
    exporter: CaptureExporter


@contextlib.contextmanager
def capture_to_store(
    run_id: str,
    *,
    data_dir: str | Path,
    run_attempt: int = 0,
    idle_shutdown_minutes: float | None = 60.0,
    flush_interval_sec: float = 1.0,
    drain_timeout_sec: float = 5.0,
    instrument_threads: bool = True,
    **scope_pairs: ScopeValue,
) -> Iterator[CaptureSession]:
    """Record the SDK calls of the block in the database of a folder.

    Args:
        run_id: Name of the run.
        data_dir: The folder.
        run_attempt: How often the run was started before.
        idle_shutdown_minutes: The server ends after this time without records; None: never.
        flush_interval_sec: Longest time that a record waits for others.
        drain_timeout_sec: Maximum seconds to wait at the end for calls that still run.
        instrument_threads: Whether new threads get the scope of their starter.
        **scope_pairs: Further keys of the scope.
    """
    base_url = ensure_daemon(data_dir, idle_shutdown_minutes=idle_shutdown_minutes)
    exporter = CaptureExporter(StoreSink(base_url), flush_interval_sec=flush_interval_sec)
    adds_threads = instrument_threads and not propagate.threads_instrumented()
    if adds_threads:
        propagate.instrument_threads()
    instrument_tinker(exporter)
    try:
        with capture(run_id=run_id, run_attempt=run_attempt, **scope_pairs):
            yield CaptureSession(base_url, exporter)
    finally:
        uninstrument_tinker()
        if adds_threads:
            propagate.uninstrument_threads()
        exporter.wait_pending(drain_timeout_sec)
        exporter.force_flush(drain_timeout_sec)
        exporter.shutdown()
