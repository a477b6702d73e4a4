"""The metrics of a run as columns, read from the file without parsing whole rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tinker_cookbook.stores.storage import Storage, storage_join
from tinker_cookbook.utils.run_files import METRICS_FILE

__all__ = ["AXES", "Column", "MetricColumns"]

SECONDS_AXIS, TOKENS_AXIS = "axis/seconds", "axis/tokens"
AXES = {SECONDS_AXIS: "time/step", TOKENS_AXIS: "num_tokens"}
"""Columns that are running sums of a metric: other horizontal axes than the step."""
NOT_METRICS = ("step", "epoch", "progress", "progress/batch", "progress/done_frac")
SEEN_BYTES = 256
"""Bytes before the end of what was read that are compared, to notice that a file was replaced."""
SPOT_BYTES, NUM_SPOTS = 16_384, 24
"""The names of the metrics are read at this many places of the file."""
MAX_COLUMNS = 40
"""Columns of a run that are kept in memory."""
STEP = b'"step":'


@dataclass
class Column:
    """The values of a metric in the order of their steps."""

    steps: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    values: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    offset: int = 0
    """Number of bytes of the file that have been read."""
    used: int = 0
    """Number of the last request for this column."""

    def append(self, steps: np.ndarray, values: np.ndarray) -> None:
        """Add points; a step that is known already gets the newer value."""
        all_steps = np.concatenate([self.steps, steps.astype(np.int32)])
        all_values = np.concatenate([self.values, values.astype(np.float32)])
        if len(all_steps) > 1 and not np.all(np.diff(all_steps) > 0):
            # The first of the reversed points of a step is the newest one.
            all_steps, first = np.unique(all_steps[::-1], return_index=True)
            all_values = all_values[::-1][first]
        self.steps, self.values = all_steps, all_values


class MetricColumns:
    """The columns of a run's file of metrics; each byte is read once per column.

    Args:
        storage: Where the run is.
        prefix: The run's folder.
    """

    def __init__(self, storage: Storage, prefix: str) -> None:
        self._storage = storage
        self._path = storage_join(prefix, METRICS_FILE)
        self._columns: dict[str, Column] = {}
        self._keys: list[str] = []
        self._keys_offset = -1
        self._seen: tuple[int, bytes] = (0, b"")
        self._num_requests = 0

    def keys(self) -> list[str]:
        """Return the names of the metrics, sorted; found at many places of the file."""
        size = self._check_file()
        if size == self._keys_offset:
            return self._keys
        spots = np.linspace(0, max(0, size - SPOT_BYTES), NUM_SPOTS).astype(int).tolist()
        if size <= SPOT_BYTES * NUM_SPOTS:
            blocks = [self._read(0, size)]
        else:
            blocks = [self._read(spot, SPOT_BYTES) for spot in spots]
        found = set(self._keys)
        for number, block in enumerate(blocks):
            lines = block.split(b"\n")[int(number > 0) : -1]
            found.update(key for line in lines for key in _numeric_keys(line))
        self._keys, self._keys_offset = sorted(found), size
        return self._keys

    def read(self, names: Sequence[str]) -> dict[str, Column]:
        """Return columns; a metric that the run does not have is left out."""
        self._num_requests += 1
        size = self._check_file()
        sources = {name: AXES.get(name, name) for name in names}
        wanted = sorted(set(sources.values()))
        by_offset: dict[int, list[str]] = {}
        for name in wanted:
            column = self._columns.setdefault(name, Column())
            column.used = self._num_requests
            if column.offset < size:
                by_offset.setdefault(column.offset, []).append(name)
        for offset, group in by_offset.items():
            self._extend(group, offset, size)
        found = {name: self._columns[source] for name, source in sources.items()}
        self._forget()
        return {
            name: _sum_up(column) if name in AXES else column
            for name, column in found.items()
            if len(column.steps)
        }

    def _extend(self, names: Iterable[str], offset: int, size: int) -> None:
        data = self._read(offset, size - offset)
        data = data[: data.rfind(b"\n") + 1]
        lines = data.split(b"\n")
        steps = [_number_after(line, STEP) for line in lines]
        for name in names:
            column = self._columns[name]
            column.offset = offset + len(data)
            mark = json.dumps(name).encode() + b":"
            found = [
                (step, value)
                for step, line in zip(steps, lines, strict=True)
                if step is not None and (value := _number_after(line, mark)) is not None
            ]
            if found:
                found_steps, values = np.array(found).T
                column.append(found_steps, values)
        end = offset + len(data)
        start = max(0, end - SEEN_BYTES)
        seen = data[start - offset :] if start >= offset else self._read(start, end - start)
        self._seen = (end, seen)

    def _check_file(self) -> int:
        """Return the size of the file; forget everything if it is not the file that was read."""
        found = self._storage.stat(self._path)
        size = 0 if found is None else found.size
        end, seen = self._seen
        if size < end or (seen and self._read(end - len(seen), len(seen)) != seen):
            self._columns, self._keys, self._keys_offset, self._seen = {}, [], -1, (0, b"")
        return size

    def _read(self, offset: int, length: int) -> bytes:
        try:
            return self._storage.read_range(self._path, offset, length)
        except FileNotFoundError:
            return b""

    def _forget(self) -> None:
        """Drop the columns that were not asked for longest."""
        excess = len(self._columns) - MAX_COLUMNS
        oldest = sorted(self._columns, key=lambda name: self._columns[name].used)
        for name in oldest[: max(0, excess)]:
            if self._columns[name].used < self._num_requests:
                del self._columns[name]


def _number_after(line: bytes, mark: bytes) -> float | None:
    """Return the number after a key of a JSON object; None if the key is missing or not finite.

    A key in a text cannot be found, because its quotation marks have a backslash there. This is
    three times as fast as a regular expression, and does not need an object for the rest of the row.
    """
    start = line.find(mark)
    if start < 0:
        return None
    end = line.find(b",", start)
    try:
        value = float(line[start + len(mark) : end if end >= 0 else -1])
    except ValueError:  # null, or a text
        return None
    return value if -math.inf < value < math.inf else None


def _numeric_keys(line: bytes) -> Iterable[str]:
    try:
        row = json.loads(line)
    except ValueError:
        return ()
    if not isinstance(row, dict):
        return ()
    numbers = {k for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return numbers.difference(NOT_METRICS)


def _sum_up(column: Column) -> Column:
    sums = np.cumsum(column.values.astype(np.float64))
    return Column(column.steps, sums, column.offset)
