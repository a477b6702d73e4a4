"""Find the runs in a folder and below it, and tell the state of each."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.runs import lock
from tinker_cookbook.stores.run_facts import Best, Facts, TrainingType, find_best, read_facts
from tinker_cookbook.stores.run_index import Entry, RunIndex
from tinker_cookbook.stores.storage import LocalStorage, Storage, storage_join
from tinker_cookbook.stores.training_store import ITERATION, TrainingRunStore
from tinker_cookbook.utils.nearest_name import did_you_mean
from tinker_cookbook.utils.recipe_code import CODE_FILE
from tinker_cookbook.utils.run_files import CHECKPOINTS_FILE, CONFIG_FILE, METRICS_FILE, TIMING_FILE

if TYPE_CHECKING:
    from tinker_cookbook.stores.eval_store import EvalStore

__all__ = ["RunInfo", "RunRegistry", "Status", "TrainingType"]

Status = Literal["running", "completed", "failed"]
EVAL_PREFIXES = ("evals", "eval")
MAX_DEPTH = 4
"""Levels of folders that are searched; a recipe's run is two levels below the folder of runs."""


@dataclass(frozen=True)
class RunInfo:
    """A run, as far as the ends of its files tell."""

    run_id: str
    """Path of the run below its storage."""
    prefix: str
    has_config: bool
    has_metrics: bool
    has_checkpoints: bool
    has_timing: bool
    iteration_count: int
    """Number of steps with recorded rollouts."""
    status: Status
    """`running`: a process uses the run directory. `completed`: the final checkpoint is recorded.
    `failed`: the run ended before its last step, by an error, by Ctrl-C or by a kill."""
    facts: Facts

    @property
    def last_updated(self) -> float | None:
        """Time of the newest row or record, in seconds since 1970."""
        return self.facts.last_updated

    @property
    def training_type(self) -> TrainingType | None:
        """Kind of training; None if the settings do not tell."""
        return self.facts.training_type


@dataclass(frozen=True)
class RunDetails:
    """What costs more time to find than a list may take."""

    best: Best | None
    disk_bytes: int


class RunRegistry:
    """The runs of some storages.

    What was read is kept in a file below `$TINKER_COOKBOOK_HOME`, so that the next program reads
    only the runs that have changed since.

    Args:
        storages: Where to look for runs.
        eval_prefixes: Folders of the first storage that may hold an `EvalStore`.
    """

    def __init__(
        self, storages: list[Storage], eval_prefixes: tuple[str, ...] = EVAL_PREFIXES
    ) -> None:
        if not storages:
            raise ConfigurationError("storages=[] is empty; give at least one storage.")
        self.eval_prefixes = eval_prefixes
        self._storages = list(storages)
        self._indexes = [RunIndex(storage) for storage in self._storages]
        self._runs: dict[str, tuple[int, RunInfo]] = {}
        self._has_looked = False

    @property
    def storage_count(self) -> int:
        """Number of storages."""
        return len(self._storages)

    @property
    def primary_storage(self) -> Storage:
        """The first storage."""
        return self._storages[0]

    def storage_for(self, run_id: str) -> Storage:
        """Return the storage of a run."""
        return self._storages[self._find(run_id)[0]]

    def refresh(self) -> list[RunInfo]:
        """Look for runs again, and return all of them, the newest first."""
        self._has_looked = True
        self._runs = {}
        for number, index in enumerate(self._indexes):
            found = [*self._walk(number, "", 0)]
            index.keep_only({run.prefix for run in found})
            index.save()
            for run in found:
                if run.run_id in self._runs:  # another storage has a run with this path
                    run = replace(run, run_id=self._storages[number].url(run.prefix))
                self._runs[run.run_id] = (number, run)
        return self.get_runs()

    def get_runs(self) -> list[RunInfo]:
        """Return the runs of the last `refresh`, the newest first."""
        if not self._has_looked:
            return self.refresh()
        runs = [run for _, run in self._runs.values()]
        return sorted(runs, key=lambda run: (-(run.last_updated or 0.0), run.run_id))

    def get_run(self, run_id: str) -> RunInfo | None:
        """Return a run; None if there is none with this id."""
        self.get_runs()
        return self._runs[run_id][1] if run_id in self._runs else None

    def get_training_store(self, run_id: str) -> TrainingRunStore:
        """Return the files of a run."""
        number, run = self._find(run_id)
        return TrainingRunStore(self._storages[number], run.prefix)

    def get_eval_store(self) -> EvalStore | None:
        """Return the evaluations in the first storage; None if it has none."""
        from tinker_cookbook.stores.eval_store import EvalStore

        storage = self.primary_storage
        if not isinstance(storage, LocalStorage):
            return None
        found = (p for p in self.eval_prefixes if storage.exists(storage_join(p, "runs")))
        prefix = next(found, None)
        return None if prefix is None else EvalStore(storage, prefix)

    def get_details(self, run_id: str) -> RunDetails:
        """Return the best value and the size of a run; its whole file of metrics is read once."""
        number, run = self._find(run_id)
        storage, index = self._storages[number], self._indexes[number]
        entry = index.get(run.prefix) or self._read_entry(number, run.prefix)
        if entry is None:
            return RunDetails(None, 0)
        if not entry.has_best or entry.disk_bytes is None:
            metric = run.facts.held_out_metric or run.facts.train_metric
            entry.best = find_best(storage, run.prefix, metric) if metric else None
            entry.has_best = True
            entry.disk_bytes = _count_bytes(storage, run.prefix)
            entry.changed = True
        return RunDetails(entry.best, entry.disk_bytes)

    def save(self) -> None:
        """Keep what `get_details` has read for the next program."""
        for index in self._indexes:
            index.save()

    def _find(self, run_id: str) -> tuple[int, RunInfo]:
        self.get_runs()
        if run_id not in self._runs:
            near = did_you_mean(run_id, list(self._runs))
            places = ", ".join(storage.url() for storage in self._storages)
            raise ConfigurationError(f"run_id={run_id} is not a run in {places}.{near}")
        return self._runs[run_id]

    def _walk(self, number: int, prefix: str, depth: int) -> list[RunInfo]:
        """Return the run in a folder, or the runs below it."""
        entry = self._indexes[number].get(prefix) or self._read_entry(number, prefix)
        if entry is not None:
            return [_describe(self._storages[number], prefix, entry)]
        if depth == MAX_DEPTH:
            return []
        names = [n for n in self._storages[number].list_dir(prefix) if not n.startswith(".")]
        children = [storage_join(prefix, name) for name in names]
        return [run for child in children for run in self._walk(number, child, depth + 1)]

    def _read_entry(self, number: int, prefix: str) -> Entry | None:
        """Read a folder; None if it is not a run."""
        storage, index = self._storages[number], self._indexes[number]
        listed_at = time.time()
        signature = index.signature(prefix)
        names = storage.list_dir(prefix)
        if not _is_run(names):
            return None
        files = [name for name in names if not ITERATION.fullmatch(name)]
        facts = read_facts(storage, prefix, files)
        entry = Entry(signature, listed_at, files, len(names) - len(files), facts)
        index.put(prefix, entry)
        return entry


def _is_run(names: list[str]) -> bool:
    """Return whether a folder is a run; a model's folder has a config.json too."""
    found = set(names)
    has_start = CONFIG_FILE in found and bool({CODE_FILE, lock.LOCK_FILE} & found)
    return has_start or bool({METRICS_FILE, CHECKPOINTS_FILE} & found)


def _describe(storage: Storage, prefix: str, entry: Entry) -> RunInfo:
    names = set(entry.names)
    return RunInfo(
        run_id=prefix or storage.url().rstrip("/").rpartition("/")[2],
        prefix=prefix,
        has_config=entry.facts.has_config,
        has_metrics=METRICS_FILE in names,
        has_checkpoints=CHECKPOINTS_FILE in names,
        has_timing=TIMING_FILE in names,
        iteration_count=entry.iteration_count,
        status=_status(storage, prefix, entry),
        facts=entry.facts,
    )


def _status(storage: Storage, prefix: str, entry: Entry) -> Status:
    if lock.LOCK_FILE in entry.names and _is_in_use(storage, prefix):
        return "running"
    return "completed" if entry.facts.is_complete else "failed"


def _is_in_use(storage: Storage, prefix: str) -> bool:
    """Return whether a process uses a run; elsewhere than here, only the lock file tells."""
    if isinstance(storage, LocalStorage):
        return lock.is_in_use(Path(storage.url(prefix)))
    return storage.exists(storage_join(prefix, lock.LOCK_FILE))


def _count_bytes(storage: Storage, prefix: str, depth: int = 0) -> int:
    found = storage.stat(prefix)
    if found is None or depth == MAX_DEPTH:
        return 0
    if not found.is_dir:
        return found.size
    children = [storage_join(prefix, name) for name in storage.list_dir(prefix)]
    return sum(_count_bytes(storage, child, depth + 1) for child in children)
