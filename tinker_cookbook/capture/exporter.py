"""Export of records in the background: a bounded queue, sent in batches to a sink.

The code that is recorded never waits. If the sink is slower than the records come, the queue fills
and further records are dropped and counted. (The recording endpoint is different: it answers only
after its record is kept.)
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

from tinker_cookbook.stores.storage import Storage

__all__ = ["CaptureExporter", "CaptureRecord", "CaptureSink", "JsonlFileSink"]

logger = logging.getLogger(__name__)

CaptureRecord: TypeAlias = dict[str, Any]


class CaptureSink(Protocol):
    """Keeps records."""

    def export(self, records: Sequence[CaptureRecord], timeout: float | None = None) -> None:
        """Keep some records. An error drops them and is logged."""
        ...


class JsonlFileSink:
    """Appends records to a file of a storage, one JSON object per line."""

    def __init__(self, storage: Storage, prefix: str = "") -> None:
        """The file is `PREFIX/captures.jsonl`."""
        self._storage = storage
        self._path = f"{prefix.rstrip('/')}/captures.jsonl" if prefix else "captures.jsonl"

    def export(self, records: Sequence[CaptureRecord], timeout: float | None = None) -> None:
        """Append the records."""
        lines = "".join(f"{json.dumps(record, separators=(',', ':'))}\n" for record in records)
        self._storage.append(self._path, lines.encode())


class CaptureExporter:
    """Sends records to a sink on a separate thread."""

    def __init__(
        self,
        sink: CaptureSink,
        *,
        max_queue_size: int = 4096,
        max_batch_size: int = 256,
        flush_interval_sec: float = 1.0,
        export_timeout_sec: float = 10.0,
    ) -> None:
        """Start the thread.

        Args:
            sink: Keeps the records.
            max_queue_size: Maximum records that wait; further ones are dropped.
            max_batch_size: Maximum records per export.
            flush_interval_sec: Longest time that a record waits for others of its batch.
            export_timeout_sec: Passed to the sink.
        """
        self.num_dropped = 0
        """Records that were lost because the queue was full or the sink failed."""
        self._sink = sink
        self._queue: queue.Queue[CaptureRecord] = queue.Queue(max_queue_size)
        self._max_batch = max_batch_size
        self._interval = flush_interval_sec
        self._timeout = export_timeout_sec
        self._changed = threading.Condition()
        self._num_pending = 0
        self._num_unsent = 0
        self._wants_flush = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="capture-exporter", daemon=True)
        self._thread.start()

    def enqueue(self, record: CaptureRecord) -> None:
        """Add a record without waiting."""
        with self._changed:
            try:
                if self._is_closed:
                    raise queue.Full
                self._queue.put_nowait(record)
                self._num_unsent += 1
            except queue.Full:
                self._drop(1)
            if self._queue.qsize() >= self._max_batch:
                self._changed.notify_all()

    def track_pending(self) -> None:
        """Count a call that has begun and will be enqueued when it ends."""
        with self._changed:
            self._num_pending += 1

    def pending_done(self) -> None:
        """Count the end of such a call."""
        with self._changed:
            self._num_pending -= 1
            self._changed.notify_all()

    def wait_pending(self, timeout: float | None = None) -> bool:
        """Wait until no call is pending; return whether that happened in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._num_pending <= 0, timeout)

    def force_flush(self, timeout: float | None = None) -> bool:
        """Send what is queued; return whether everything was sent in time."""
        with self._changed:
            self._wants_flush = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._num_unsent == 0, timeout)

    def shutdown(self, timeout: float = 5.0) -> None:
        """Send what is queued and end the thread. Later records are dropped."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout)

    def _drop(self, count: int) -> None:
        if not self.num_dropped:
            logger.warning("a capture record was dropped: the queue is full or the sink failed")
        self.num_dropped += count

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._is_due, self._interval)
                self._wants_flush = False
                is_last = self._is_closed
            self._send_all()
            if is_last:
                return

    def _is_due(self) -> bool:
        return self._is_closed or self._wants_flush or self._queue.qsize() >= self._max_batch

    def _send_all(self) -> None:
        while not self._queue.empty():
            size = min(self._queue.qsize(), self._max_batch)
            batch = [self._queue.get_nowait() for _ in range(size)]
            try:
                self._sink.export(batch, self._timeout)
            # A sink may fail in any way; the recorded program must not notice.
            except Exception as error:
                logger.warning("%d capture records could not be kept: %s", len(batch), error)
                with self._changed:
                    self._drop(len(batch))
                time.sleep(0)
            with self._changed:
                self._num_unsent -= len(batch)
                self._changed.notify_all()
