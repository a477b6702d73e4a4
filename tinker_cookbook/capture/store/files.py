"""A file of recorded calls, one JSON object per line, that survives the end of its process.

`append` returns after the operating system has the whole line, so a killed process loses nothing
that was appended. A line that a kill cut in half was never acknowledged; it is dropped when the
file is read, and cut off when it is opened to continue.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from tinker_cookbook.capture.calls import RecordedCall, call_from_json, call_to_json
from tinker_cookbook.exceptions import DataFormatError

__all__ = ["CallLog", "read_lines"]

_READ_AT_ONCE = 2**16


class CallLog:
    """The writer of such a file. Only one process may write a file at a time."""

    def __init__(self, path: str | Path, *, sync_to_disk: bool = False) -> None:
        """Open the file to append, and make its folder.

        Args:
            path: The file.
            sync_to_disk: Whether to wait for the disk on every call, so that records also survive
                a power failure. Costs some milliseconds per call.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._sync = sync_to_disk
        self._lock = threading.Lock()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        self._size = _end_of_last_line(self._file)
        os.ftruncate(self._file, self._size)

    def append(self, call: RecordedCall) -> None:
        """Write a call.

        Raises:
            OSError: the call could not be written, for instance because the disk is full. The file
                is as before.
        """
        line = json.dumps(call_to_json(call), separators=(",", ":")).encode() + b"\n"
        with self._lock:
            try:
                self._write(line)
            except OSError:
                os.ftruncate(self._file, self._size)
                raise
            self._size += len(line)

    def _write(self, line: bytes) -> None:
        done = 0
        while done < len(line):
            done += os.pwrite(self._file, line[done:], self._size + done)
        if self._sync:
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> CallLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_lines(path: str | Path) -> Iterator[RecordedCall]:
    """Yield the calls of a file, without a last line that was cut in half.

    Raises:
        DataFormatError: a complete line is not a recorded call.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                call = call_from_json(json.loads(line))
            except (ValueError, TypeError) as error:
                raise DataFormatError(
                    f"{path}, line {number} is not a recorded call ({error}); "
                    "remove the line, or use another file."
                ) from error
            yield call


def _end_of_last_line(file: int) -> int:
    """Return the offset after the last line break, or 0."""
    end = os.fstat(file).st_size
    while end > 0:
        start = max(0, end - _READ_AT_ONCE)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
