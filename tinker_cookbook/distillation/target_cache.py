"""A file of teacher targets in the run directory: what a teacher has scored is not scored again.

The file is a sequence of records, each a header and two arrays. Records are only appended. If a
crash cuts the last record, opening the file removes it.
"""

from __future__ import annotations

import logging
import struct
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["TARGETS_FILE", "TargetCache", "Targets"]

logger = logging.getLogger(__name__)

TARGETS_FILE = "teacher_targets.bin"
KEY_BYTES = 32
HEADER = struct.Struct(f"<4s{KEY_BYTES}sIII")
"""Magic, key, positions, tokens per position, CRC-32 of the arrays."""
MAGIC = b"tgt1"


@dataclass(frozen=True)
class Targets:
    """What a teacher says about n positions of a sequence: K tokens with their log probabilities.

    The tokens are the most likely ones, or tokens drawn from the teacher.
    """

    tokens_nK: np.ndarray
    """int32."""
    logprobs_nK: np.ndarray
    """float32."""


class TargetCache:
    """Targets by key, on disk. Only the places of the records are kept in memory."""

    def __init__(self, folder: str | Path) -> None:
        """Open the file of a run directory, or create it."""
        self._path = Path(folder) / TARGETS_FILE
        self._lock = threading.Lock()
        self._offsets: dict[bytes, int] = {}
        self._end = 0
        self._path.touch()
        self._index()

    def __len__(self) -> int:
        return len(self._offsets)

    def get(self, key: bytes) -> Targets | None:
        """Return the targets of a key; None if they are not in the file."""
        offset = self._offsets.get(key)
        if offset is None:
            return None
        with open(self._path, "rb") as file:
            file.seek(offset)
            _, _, rows, columns, _ = HEADER.unpack(file.read(HEADER.size))
            size = rows * columns
            tokens = np.frombuffer(file.read(4 * size), "<i4").reshape(rows, columns)
            logprobs = np.frombuffer(file.read(4 * size), "<f4").reshape(rows, columns)
        return Targets(tokens, logprobs)

    def put(self, key: bytes, targets: Targets) -> None:
        """Append the targets of a key, unless the file has them."""
        rows, columns = targets.tokens_nK.shape
        body = targets.tokens_nK.astype("<i4").tobytes()
        body += targets.logprobs_nK.astype("<f4").tobytes()
        record = HEADER.pack(MAGIC, key, rows, columns, zlib.crc32(body)) + body
        with self._lock:
            if key in self._offsets:
                return
            with open(self._path, "ab") as file:
                file.write(record)
            self._offsets[key] = self._end
            self._end += len(record)

    def _index(self) -> None:
        """Find the records; cut the file behind the last whole one."""
        size = self._path.stat().st_size
        with open(self._path, "rb") as file:
            while len(header := file.read(HEADER.size)) == HEADER.size:
                magic, key, rows, columns, checksum = HEADER.unpack(header)
                length = 8 * rows * columns
                if magic != MAGIC or self._end + HEADER.size + length > size:
                    break
                if zlib.crc32(file.read(length)) != checksum:
                    break
                self._offsets[key] = self._end
                self._end += HEADER.size + length
        if self._end < size:
            logger.warning("%s: %d damaged bytes at its end removed", self._path, size - self._end)
            with open(self._path, "r+b") as file:
                file.truncate(self._end)
