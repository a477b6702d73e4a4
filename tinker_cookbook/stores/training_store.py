"""The files of one run, read and written by name.

Every reader skips a half-written last line, so a run can be read while it is written.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinker_cookbook.stores._incremental import IncrementalReader
from tinker_cookbook.stores.checkpoint_record import CheckpointRecord
from tinker_cookbook.stores.storage import LocalStorage, Storage, storage_join
from tinker_cookbook.utils.jsonl_log import Row, append_row
from tinker_cookbook.utils.run_files import (
    CHECKPOINTS_FILE,
    CODE_DIFF_FILE,
    CONFIG_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    TIMING_FILE,
)

__all__ = ["IterationInfo", "TrainingRunStore", "join_steps"]

ITERATION = re.compile(r"iteration_(\d+)")
ROLLOUTS_END = "_rollout_summaries.jsonl"
TOKENS_END = "_tokens.jsonl"
LOGTREE_END = "_logtree.json"
TRAIN = "train"


@dataclass
class IterationInfo:
    """What a run has recorded about one step of reinforcement learning."""

    iteration: int
    has_train_rollouts: bool = False
    has_train_logtree: bool = False
    eval_labels: list[str] = field(default_factory=list)
    """Names of the evaluations with recorded rollouts, such as `eval_test`."""


class TrainingRunStore:
    """Reads and writes the files of a run.

    Args:
        storage: Where the run is.
        prefix: The run's folder in the storage.
    """

    def __init__(self, storage: Storage, prefix: str = "") -> None:
        self._storage = storage
        self._prefix = prefix.strip("/")
        self._metrics = IncrementalReader(storage, self._path(METRICS_FILE))

    def url(self, path: str = "") -> str:
        """Return the full path of the run or of one of its files."""
        return self._storage.url(self._path(path))

    def read_config(self) -> Row | None:
        """Return the settings of the run; None if they are missing or incomplete."""
        return self._read_object(CONFIG_FILE)

    def read_metrics(self) -> list[Row]:
        """Return one row per step, and the rows without a step, in the order of the file.

        Rows of the same step are joined; the later value of a key counts.
        """
        self._metrics.read()
        return join_steps(self._metrics.records)

    def read_new_metrics(self) -> list[Row]:
        """Return the rows that were appended since the last call of any `read_*metrics`."""
        return self._metrics.read()

    def metric_keys(self) -> set[str]:
        """Return the keys of all rows of metrics."""
        self._metrics.read()
        return self._metrics.known_keys

    def read_rollouts(self, iteration: int, base_name: str = TRAIN) -> list[Row]:
        """Return the summaries of the rollouts of a step.

        Args:
            iteration: The step.
            base_name: `train`, or the name of an evaluation such as `eval_test`.
        """
        return self._read_rows(_iteration_path(iteration, base_name, ROLLOUTS_END))

    def read_single_rollout(
        self, iteration: int, group_idx: int, traj_idx: int, base_name: str = TRAIN
    ) -> Row | None:
        """Return the summary of one rollout; None if it was not recorded."""
        rows = self.read_rollouts(iteration, base_name)
        wanted = (group_idx, traj_idx)
        return next((r for r in rows if (r.get("group_idx"), r.get("traj_idx")) == wanted), None)

    def read_tokens(self, iteration: int, base_name: str = TRAIN) -> list[Row]:
        """Return the sampled tokens of the rollouts on the transcript page of a step."""
        return self._read_rows(_iteration_path(iteration, base_name, TOKENS_END))

    def read_samples(self) -> list[Row]:
        """Return the sampled answers, oldest first."""
        return self._read_rows(SAMPLES_FILE)

    def read_checkpoints(self) -> list[Row]:
        """Return the records of checkpoints, oldest first."""
        return self._read_rows(CHECKPOINTS_FILE)

    def read_checkpoint_records(self) -> list[CheckpointRecord]:
        """Return the records of checkpoints as objects, oldest first."""
        return [CheckpointRecord.from_dict(row) for row in self.read_checkpoints()]

    def read_timing(self) -> list[Row]:
        """Return the timed spans of each step."""
        return self._read_rows(TIMING_FILE)

    def read_logtree(self, iteration: int, base_name: str = TRAIN) -> Row | None:
        """Return a report of a step; None if there is none."""
        return self._read_object(_iteration_path(iteration, base_name, LOGTREE_END))

    def list_logtrees(self, iteration: int) -> list[str]:
        """Return the names of the reports of a step."""
        names = self._storage.list_dir(self._path(_iteration_folder(iteration)))
        return [name.removesuffix(LOGTREE_END) for name in names if name.endswith(LOGTREE_END)]

    def list_iterations(self) -> list[IterationInfo]:
        """Return what was recorded of each step, in the order of the steps."""
        found = [ITERATION.fullmatch(name) for name in self._storage.list_dir(self._prefix)]
        steps = sorted((int(match[1]), match[0]) for match in found if match)
        return [self._iteration(step, folder) for step, folder in steps]

    def write_config(self, config: Row) -> None:
        """Write the settings of the run."""
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        self._storage.write(self._path(CONFIG_FILE), text.encode())

    def write_metrics(self, metrics: Row, step: int | None = None) -> None:
        """Append a row of metrics."""
        self._append(METRICS_FILE, ({} if step is None else {"step": step}) | metrics)

    def truncate_metrics(self, from_step: int) -> int:
        """Drop the rows of a step and of those after it; return the number of dropped rows."""
        rows = self._read_rows(METRICS_FILE)
        kept = [row for row in rows if not _is_step(row) or row["step"] < from_step]
        if len(kept) < len(rows):
            self._storage.write(self._path(METRICS_FILE), _encode(kept))
        return len(rows) - len(kept)

    def write_timing_spans(self, step: int, spans: list[Row]) -> None:
        """Append the timed spans of a step."""
        self._append(TIMING_FILE, {"step": step, "spans": spans})

    def write_checkpoint(self, record: Row) -> None:
        """Append the record of a checkpoint."""
        self._append(CHECKPOINTS_FILE, record)

    def write_rollouts(self, iteration: int, records: list[Row], base_name: str = TRAIN) -> None:
        """Write the summaries of the rollouts of a step."""
        path = self._path(_iteration_path(iteration, base_name, ROLLOUTS_END))
        self._storage.write(path, _encode(records))

    def write_tokens(self, iteration: int, rows: list[Row], base_name: str = TRAIN) -> None:
        """Write the sampled tokens of the rollouts on the transcript page of a step."""
        path = self._path(_iteration_path(iteration, base_name, TOKENS_END))
        self._storage.write(path, _encode(rows))

    def write_sample(self, row: Row) -> None:
        """Append a sampled answer."""
        self._append(SAMPLES_FILE, row)

    def write_logtree(self, iteration: int, data: Row, base_name: str = TRAIN) -> None:
        """Write a report of a step."""
        path = self._path(_iteration_path(iteration, base_name, LOGTREE_END))
        self._storage.write(path, json.dumps(data, ensure_ascii=False).encode())

    def write_code_diff(self, diff: str) -> None:
        """Write the uncommitted changes of the code."""
        self._storage.write(self._path(CODE_DIFF_FILE), diff.encode())

    async def aread_config(self) -> Row | None:
        """Run `read_config` in a thread."""
        return await asyncio.to_thread(self.read_config)

    async def aread_metrics(self) -> list[Row]:
        """Run `read_metrics` in a thread."""
        return await asyncio.to_thread(self.read_metrics)

    async def aread_new_metrics(self) -> list[Row]:
        """Run `read_new_metrics` in a thread."""
        return await asyncio.to_thread(self.read_new_metrics)

    async def aread_rollouts(self, iteration: int, base_name: str = TRAIN) -> list[Row]:
        """Run `read_rollouts` in a thread."""
        return await asyncio.to_thread(self.read_rollouts, iteration, base_name)

    async def aread_checkpoints(self) -> list[Row]:
        """Run `read_checkpoints` in a thread."""
        return await asyncio.to_thread(self.read_checkpoints)

    async def aread_timing(self) -> list[Row]:
        """Run `read_timing` in a thread."""
        return await asyncio.to_thread(self.read_timing)

    async def aread_logtree(self, iteration: int, base_name: str = TRAIN) -> Row | None:
        """Run `read_logtree` in a thread."""
        return await asyncio.to_thread(self.read_logtree, iteration, base_name)

    async def awrite_metrics(self, metrics: Row, step: int | None = None) -> None:
        """Run `write_metrics` in a thread."""
        await asyncio.to_thread(self.write_metrics, metrics, step)

    async def awrite_checkpoint(self, record: Row) -> None:
        """Run `write_checkpoint` in a thread."""
        await asyncio.to_thread(self.write_checkpoint, record)

    def _path(self, path: str) -> str:
        return storage_join(self._prefix, path)

    def _read_rows(self, path: str) -> list[Row]:
        return IncrementalReader(self._storage, self._path(path)).read()

    def _read_object(self, path: str) -> Row | None:
        try:
            value = json.loads(self._storage.read(self._path(path)))
        except (FileNotFoundError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def _append(self, path: str, row: Row) -> None:
        """Append a row; a half-written last line that a killed process has left is cut off."""
        full = self._path(path)
        if isinstance(self._storage, LocalStorage):
            target = Path(self._storage.url(full))
            target.parent.mkdir(parents=True, exist_ok=True)
            append_row(target, row)
            return
        found = self._storage.stat(full)
        if found and found.size and self._storage.read_range(full, found.size - 1, 1) != b"\n":
            data = self._storage.read(full)
            self._storage.write(full, data[: data.rfind(b"\n") + 1])
        self._storage.append(full, _encode([row]))

    def _iteration(self, step: int, folder: str) -> IterationInfo:
        names = self._storage.list_dir(self._path(folder))
        recorded = {name.removesuffix(ROLLOUTS_END) for name in names if ROLLOUTS_END in name}
        has_logtree = f"{TRAIN}{LOGTREE_END}" in names
        return IterationInfo(step, TRAIN in recorded, has_logtree, sorted(recorded - {TRAIN}))


def join_steps(rows: Iterable[Row]) -> list[Row]:
    """Join the rows of the same step; the later value of a key counts."""
    joined: list[Row] = []
    by_step: dict[int, Row] = {}
    for row in rows:
        known = by_step.get(row["step"]) if _is_step(row) else None
        if known is not None:
            known |= row
            continue
        joined.append(dict(row))
        if _is_step(row):
            by_step[row["step"]] = joined[-1]
    return joined


def _is_step(row: Row) -> bool:
    return isinstance(row.get("step"), int)


def _iteration_folder(iteration: int) -> str:
    return f"iteration_{iteration:06d}"


def _iteration_path(iteration: int, base_name: str, end: str) -> str:
    return f"{_iteration_folder(iteration)}/{base_name}{end}"


def _encode(rows: Iterable[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
