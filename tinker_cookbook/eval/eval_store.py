"""Many evaluations in one folder: which model, which settings, which scores.

FOLDER/runs/RUN_ID/metadata.json     the model, the benchmarks, and their scores
FOLDER/runs/RUN_ID/BENCHMARK/...     what `run_benchmark` writes with `save_dir=run_dir(RUN_ID)`
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tinker_cookbook.eval.benchmarks import load_result, load_summary, load_trajectories
from tinker_cookbook.eval.benchmarks._results import TRAJECTORIES_FILE, write_result
from tinker_cookbook.eval.benchmarks._types import BenchmarkResult, StoredTrajectory
from tinker_cookbook.exceptions import ConfigurationError, DataFormatError
from tinker_cookbook.stores.storage import LocalStorage
from tinker_cookbook.utils.durable_files import write_atomically
from tinker_cookbook.utils.jsonl_log import append_row

__all__ = ["EvalStore", "RunMetadata"]

METADATA_FILE = "metadata.json"
_RUN_ID = re.compile(r"[A-Za-z0-9][\w.\-]*")


@dataclass
class RunMetadata:
    """One evaluation: a model on some benchmarks."""

    run_id: str
    model_name: str
    checkpoint_path: str | None
    checkpoint_name: str | None
    benchmarks: list[str]
    timestamp: str
    """When the evaluation was created, in UTC."""
    config: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    """Score by benchmark, once the evaluation is finalized."""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> RunMetadata:
        """Read a JSON object that `to_dict` wrote; unknown keys are ignored."""
        known = {each.name for each in dataclasses.fields(cls)}
        try:
            return cls(**{key: value for key, value in d.items() if key in known})
        except TypeError as error:
            raise DataFormatError(f"the metadata of an evaluation lack a key: {error}") from error


class EvalStore:
    """Reads and writes the evaluations in a folder."""

    def __init__(self, storage_or_path: LocalStorage | str | Path, prefix: str = "") -> None:
        """Set the folder; it is created with the first evaluation.

        Args:
            storage_or_path: A folder, or the storage of one.
            prefix: Folder below it.
        """
        is_storage = isinstance(storage_or_path, LocalStorage)
        root = storage_or_path.root if is_storage else Path(storage_or_path).expanduser()
        self._folder = root / prefix / "runs"

    def url(self, path: str = "") -> str:
        """Return the full path of the store or of a file in it."""
        return str(self._folder.parent / path) if path else str(self._folder.parent)

    def create_run(
        self,
        model_name: str,
        benchmarks: list[str],
        checkpoint_path: str | None = None,
        checkpoint_name: str | None = None,
        config: dict[str, Any] | None = None,
        run_id: str | None = None,
    ) -> str:
        """Record a new evaluation and return its id.

        Raises:
            ConfigurationError: if `run_id` exists already, or is not a file name.
        """
        now = datetime.now(UTC)
        name = run_id or f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        folder = Path(self.run_dir(name))
        if folder.exists():
            raise ConfigurationError(f"run_id={name} exists already; choose another one.")
        folder.mkdir(parents=True)
        self._write(
            RunMetadata(
                name,
                model_name,
                checkpoint_path,
                checkpoint_name,
                list(benchmarks),
                now.isoformat(timespec="seconds"),
                dict(config or {}),
            )
        )
        return name

    def run_dir(self, run_id: str) -> str:
        """Return the folder of an evaluation: the `save_dir` of its benchmarks."""
        if not _RUN_ID.fullmatch(run_id):
            raise ConfigurationError(
                f"run_id={run_id!r} is not a file name; use letters, digits, '-', '_' and '.'."
            )
        return str(self._folder / run_id)

    def finalize_run(self, run_id: str) -> RunMetadata:
        """Record the scores of the results that are stored, and return the metadata."""
        metadata = self.read_run(run_id)
        found = {name: self.read_result(run_id, name) for name in self.list_benchmarks(run_id)}
        metadata.scores = {name: each.score for name, each in found.items() if each is not None}
        self._write(metadata)
        return metadata

    def list_runs(self) -> list[RunMetadata]:
        """Return all evaluations, oldest first."""
        paths = sorted(self._folder.glob(f"*/{METADATA_FILE}"))
        found = [self.read_run(path.parent.name) for path in paths]
        return sorted(found, key=lambda each: each.timestamp)

    def read_run(self, run_id: str) -> RunMetadata:
        """Return the metadata of an evaluation.

        Raises:
            ConfigurationError: if there is no such evaluation.
        """
        path = Path(self.run_dir(run_id)) / METADATA_FILE
        if not path.exists():
            raise ConfigurationError(f"run_id={run_id} is unknown; {self._folder} has no such run.")
        return RunMetadata.from_dict(json.loads(path.read_text(encoding="utf-8")))

    def list_benchmarks(self, run_id: str) -> list[str]:
        """Return the benchmarks that have replies or a result in an evaluation."""
        summary = load_summary(self.run_dir(run_id))
        stored = Path(self.run_dir(run_id)).glob(f"*/{TRAJECTORIES_FILE}")
        return sorted({*summary, *(path.parent.name for path in stored)})

    def read_result(self, run_id: str, benchmark: str) -> BenchmarkResult | None:
        """Return the result of a benchmark; None if it has not ended."""
        return load_result(self.run_dir(run_id), benchmark)

    def read_trajectories(
        self,
        run_id: str,
        benchmark: str,
        *,
        correct_only: bool = False,
        incorrect_only: bool = False,
        errors_only: bool = False,
    ) -> list[StoredTrajectory]:
        """Return the trajectories of a benchmark; see `load_trajectories`."""
        return load_trajectories(
            self.run_dir(run_id), benchmark, correct_only, incorrect_only, errors_only
        )

    def read_single_trajectory(
        self, run_id: str, benchmark: str, idx: int
    ) -> StoredTrajectory | None:
        """Return the first reply to example number `idx`; None if it is not stored."""
        found = self.read_trajectories(run_id, benchmark)
        return next((each for each in found if each.idx == idx), None)

    def read_summary(self, run_id: str) -> dict[str, Any] | None:
        """Return the results of all benchmarks as JSON objects; None if there are none."""
        return load_summary(self.run_dir(run_id)) or None

    def write_result(self, run_id: str, result: BenchmarkResult) -> None:
        """Write the result of a benchmark that ran elsewhere."""
        (Path(self.run_dir(run_id)) / result.name).mkdir(parents=True, exist_ok=True)
        write_result(self.run_dir(run_id), result)

    def write_trajectory(self, run_id: str, benchmark: str, traj: StoredTrajectory) -> None:
        """Append a trajectory of a benchmark that ran elsewhere."""
        folder = Path(self.run_dir(run_id)) / benchmark
        folder.mkdir(parents=True, exist_ok=True)
        append_row(folder / TRAJECTORIES_FILE, dict(traj.to_dict()))

    def write_summary(self, run_id: str, results: dict[str, BenchmarkResult]) -> None:
        """Write several results."""
        for result in results.values():
            self.write_result(run_id, result)

    def delete_run(self, run_id: str) -> None:
        """Delete an evaluation with all its replies."""
        self.read_run(run_id)
        shutil.rmtree(self.run_dir(run_id))

    async def alist_runs(self) -> list[RunMetadata]:
        """Run `list_runs` in a thread."""
        return await asyncio.to_thread(self.list_runs)

    async def aread_trajectories(
        self, run_id: str, benchmark: str, **only: bool
    ) -> list[StoredTrajectory]:
        """Run `read_trajectories` in a thread."""
        return await asyncio.to_thread(self.read_trajectories, run_id, benchmark, **only)

    async def aread_result(self, run_id: str, benchmark: str) -> BenchmarkResult | None:
        """Run `read_result` in a thread."""
        return await asyncio.to_thread(self.read_result, run_id, benchmark)

    def _write(self, metadata: RunMetadata) -> None:
        text = json.dumps(metadata.to_dict(), indent=2, ensure_ascii=False, default=str)
        write_atomically(Path(self.run_dir(metadata.run_id)) / METADATA_FILE, text + "\n")
