"""What the page asks for, as JSON objects: runs, curves, and the details of one run."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.runs.directory import flatten_settings
from tinker_cookbook.stores.registry import RunInfo, RunRegistry
from tinker_cookbook.stores.storage import Storage, storage_join
from tinker_cookbook.stores.training_store import TrainingRunStore
from tinker_cookbook.utils.jsonl_log import Row
from tinker_cookbook.utils.ml_log import RECIPE_SETTINGS
from tinker_cookbook.utils.run_files import CHECKPOINTS_FILE, METRICS_FILE
from tinker_cookbook.viewer.columns import MetricColumns
from tinker_cookbook.viewer.evaluations import read_evaluations
from tinker_cookbook.viewer.rollouts import read_rollouts, read_samples
from tinker_cookbook.viewer.thinning import Curve, thin_curve

__all__ = ["Answers"]

RECENT_STEPS = 50
"""Steps of the second mean of the times."""


@dataclass
class _Opened:
    """What is kept in memory about a run."""

    store: TrainingRunStore
    columns: MetricColumns
    lock: threading.Lock = field(default_factory=threading.Lock)


class Answers:
    """Answers the questions of a page about the runs of a registry.

    Args:
        registry: The runs.
        only: Ids of the runs to show; None: all.
    """

    def __init__(self, registry: RunRegistry, only: Collection[str] | None = None) -> None:
        self._registry = registry
        self._only = None if only is None else set(only)
        self._opened: dict[str, _Opened] = {}
        self._lock = threading.Lock()
        self._is_first = True

    def runs(self) -> list[Row]:
        """Return the runs, the newest first."""
        with self._lock:
            # The first list was made when the program found the runs.
            found = self._registry.get_runs() if self._is_first else self._registry.refresh()
            self._is_first = False
            shown = [run for run in found if self._only is None or run.run_id in self._only]
            return [self._summarize(run) for run in shown]

    def keys(self, runs: Sequence[str]) -> dict[str, list[str]]:
        """Return the names of the metrics of each run."""
        found = {}
        for run in runs:
            opened = self._open(run)
            with opened.lock:
                found[run] = opened.columns.keys()
        return found

    def curves(
        self,
        runs: Sequence[str],
        metrics: Sequence[str],
        parts: int,
        between: tuple[int, int] | None = None,
    ) -> dict[str, dict[str, Curve]]:
        """Return the curve of each metric of each run that has it.

        Args:
            runs: Ids of the runs.
            metrics: Names of the metrics, or of other horizontal axes.
            parts: Number of intervals to which a curve is reduced.
            between: First and last step; None: all steps.
        """
        answer: dict[str, dict[str, Curve]] = {metric: {} for metric in metrics}
        for run in runs:
            opened = self._open(run)
            with opened.lock:
                columns = opened.columns.read(metrics)
            for metric, column in columns.items():
                steps, values = column.steps, column.values
                if between is not None:
                    inside = _around(steps, *between)
                    steps, values = steps[inside], values[inside]
                if len(steps):
                    answer[metric][run] = thin_curve(steps, values, parts)
        return answer

    def run(self, run: str) -> Row:
        """Return the details of a run, except its curves and rollouts."""
        store = self._open(run).store
        config = store.read_config() or {}
        own = config.pop(RECIPE_SETTINGS, None)
        settings = flatten_settings(own if isinstance(own, dict) else config)
        iterations = [
            {"step": info.iteration, "splits": _splits(info.has_train_rollouts, info.eval_labels)}
            for info in store.list_iterations()
        ]
        return {
            "id": run,
            "path": store.url(),
            "settings": settings,
            "checkpoints": store.read_checkpoints(),
            "iterations": [each for each in iterations if each["splits"]],
            "samples": read_samples(store),
            "times": self._times(run),
            "timed_steps": [row["step"] for row in store.read_timing() if row.get("spans")],
        }

    def rollouts(self, run: str, step: int, split: str) -> list[Row]:
        """Return the groups of a step with their rollouts.

        Raises:
            ConfigurationError: if there is no such evaluation.
        """
        if "/" in split:
            raise ConfigurationError(f"split={split} is not the name of an evaluation.")
        return read_rollouts(self._open(run).store, step, split)

    def spans(self, run: str, step: int) -> list[Row]:
        """Return the timed spans of a step; `start` is in seconds since the first one began."""
        rows = [row for row in self._open(run).store.read_timing() if row.get("step") == step]
        spans = [span for row in rows for span in row.get("spans", [])]
        begin = min((span["wall_start"] for span in spans), default=0.0)
        return [
            {
                "name": span["name"],
                "start": round(span["wall_start"] - begin, 4),
                "seconds": round(span["duration_seconds"], 4),
            }
            for span in sorted(spans, key=lambda span: span["wall_start"])
        ]

    def evaluations(self) -> list[Row]:
        """Return the stored evaluations of the folder, the oldest first."""
        return read_evaluations(self._registry)

    def place(self) -> str:
        """Return where the runs are."""
        return self._registry.primary_storage.url()

    def storage_of(self, run: str) -> Storage:
        """Return the storage of a run."""
        return self._registry.storage_for(run)

    def _open(self, run: str) -> _Opened:
        with self._lock:
            if run not in self._opened:
                store = self._registry.get_training_store(run)
                found = self._registry.get_run(run)
                assert found is not None, "the registry has opened it"
                columns = MetricColumns(self._registry.storage_for(run), found.prefix)
                self._opened[run] = _Opened(store, columns)
            return self._opened[run]

    def _summarize(self, run: RunInfo) -> Row:
        facts = run.facts
        known = [key for key in (facts.held_out_metric, facts.train_metric) if key]
        # The held-out metric may be missing in the last rows.
        metric = next((key for key in known if key in facts.last), None)
        return {
            "id": run.run_id,
            "recipe": facts.recipe,
            "model": facts.model,
            "data": facts.data,
            "kind": facts.training_type,
            "state": run.status,
            "step": facts.steps_done,
            "total": facts.total_steps,
            "metric": metric,
            "value": facts.last.get(metric) if metric else None,
            "main": known,
            "updated": facts.last_updated,
            "iterations": run.iteration_count,
            "version": self._version(run),
        }

    def _version(self, run: RunInfo) -> str:
        """Return a text that changes when the files of the run do."""
        storage = self._registry.storage_for(run.run_id)
        stats = [
            storage.stat(storage_join(run.prefix, name))
            for name in (METRICS_FILE, CHECKPOINTS_FILE)
        ]
        sizes = [found.size if found else 0 for found in stats]
        return "-".join(map(str, [run.status, run.iteration_count, *sizes]))

    def _times(self, run: str) -> list[Row]:
        """Return the mean seconds per step of each timed part of a step."""
        opened = self._open(run)
        with opened.lock:
            names = [name for name in opened.columns.keys() if name.startswith("time/")]  # noqa: SIM118
            columns = opened.columns.read(names)
        longest = max((len(column.steps) for column in columns.values()), default=0)
        rows = [
            {
                "name": name.removeprefix("time/"),
                # A part that does not run in every step counts as 0 in the others.
                "mean": _rounded(float(column.values.sum()) / longest),
                "recent": _rounded(_recent_mean(column.steps, column.values)),
            }
            for name, column in columns.items()
            if not name.endswith("_per_second")
        ]
        return sorted(rows, key=lambda row: -row["mean"])


def _splits(has_train: bool, labels: Sequence[str]) -> list[str]:
    return [*(["train"] if has_train else []), *labels]


def _around(steps: np.ndarray, first: int, last: int) -> slice:
    """Return the part of the steps in an interval, with one more step at each end."""
    start = int(np.searchsorted(steps, first, side="left"))
    end = int(np.searchsorted(steps, last, side="right"))
    return slice(max(0, start - 1), end + 1)


def _recent_mean(steps: np.ndarray, values: np.ndarray) -> float:
    is_recent = steps > steps[-1] - RECENT_STEPS
    return float(values[is_recent].sum()) / min(RECENT_STEPS, int(steps[-1] - steps[0]) + 1)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
