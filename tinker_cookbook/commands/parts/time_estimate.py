"""How long a run will take: from an earlier run like it, or from a few steps that are done now."""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chz

from tinker_cookbook.commands.parts.saved_checkpoints import open_checkpoint_store
from tinker_cookbook.runs.directory import compare_settings, runs_path
from tinker_cookbook.runs.options import SharedOptions
from tinker_cookbook.runs.workload import Workload
from tinker_cookbook.stores import LocalStorage, RunRegistry, TrainingRunStore
from tinker_cookbook.utils.jsonl_log import Row
from tinker_cookbook.utils.ml_log import dump_config
from tinker_cookbook.utils.run_files import CHECKPOINTS_FILE, CONFIG_FILE

__all__ = [
    "StepTimes",
    "describe_time",
    "estimate_seconds",
    "find_recorded_times",
    "probe_times",
    "read_times",
]

PROBE_STEPS = 3
MIN_STEPS = 3
"""Number of steps of a recorded run that is used."""
MAX_RECORDED = 200
"""Number of the newest runs that are looked at."""
SCALED = (
    *("learning_rate", "lr_schedule", "warmup_steps", "weight_decay", "grad_clip_norm"),
    *("adam_beta1", "adam_beta2", "adam_eps", "seed", "max_steps", "num_epochs", "num_batches"),
    *("save_every", "eval_every", "infrequent_eval_every", "keep_checkpoints", "ttl_seconds"),
    *("log_path", "dry_run_probe", "prices"),
)
"""Ends of the settings that may differ: they do not change the time per token or per evaluation."""


@dataclass(frozen=True)
class StepTimes:
    """Measured seconds of a run."""

    step: float
    """Mean seconds per step, without evaluations."""
    tokens: float | None
    """Mean tokens per step; None if they are not known before a run."""
    evaluation: float
    """Mean seconds per evaluation; 0 if there was none."""
    around: float
    """Seconds before the first step and after the last one: the service, the end of the run."""
    source: str
    """Where the times come from."""


def estimate_seconds(times: StepTimes, loop: SharedOptions, work: Workload) -> float:
    """Return the expected seconds of a run, from the start of its command."""
    scale = 1.0
    if times.tokens and work.num_tokens:
        scale = work.num_tokens / work.total_steps / times.tokens
    evaluations = math.ceil(work.total_steps / loop.eval_every) if loop.eval_every else 0
    steps = work.total_steps * times.step * scale
    return steps + evaluations * times.evaluation + times.around


def read_times(rows: Sequence[Row], around: float, source: str) -> StepTimes | None:
    """Return the times of a run; None if it has too few steps.

    Args:
        rows: Its metrics.
        around: Seconds of the whole run.
        source: Description of the run.
    """
    steps = [row for row in rows if "time/step" in row]
    if len(steps) < MIN_STEPS - 1:
        return None
    evaluations = [row["time/evals"] for row in steps if row.get("time/evals")]
    total = sum(row["time/step"] for row in steps)
    counted = [row["num_tokens"] for row in steps if "num_tokens" in row]
    samples = any(key.startswith("env/") for row in steps for key in row)
    return StepTimes(
        step=max(0.0, total - sum(evaluations)) / len(steps),
        # Reinforcement learning samples its tokens: their number is not known before.
        tokens=sum(counted) / len(counted) if counted and not samples else None,
        evaluation=sum(evaluations) / len(evaluations) if evaluations else 0.0,
        around=max(0.0, around - total),
        source=source,
    )


def find_recorded_times(loop: SharedOptions, folder: Path | None = None) -> StepTimes | None:
    """Return the times of the newest complete run that does the same per step; None without one.

    Args:
        loop: Settings of the planned run.
        folder: Folder of runs; by default that of all runs.
    """
    registry = RunRegistry([LocalStorage(folder or runs_path(), mkdir=False)])
    wanted = dump_config(loop)
    for run in registry.refresh()[:MAX_RECORDED]:
        if run.status != "completed" or run.facts.model != loop.model_name:
            continue
        store = registry.get_training_store(run.run_id)
        path = Path(store.url())
        whole = _seconds_between(path / CONFIG_FILE, path / CHECKPOINTS_FILE)
        rows = store.read_metrics()
        if whole is None or not _does_the_same(store.read_config() or {}, wanted):
            continue
        times = read_times(rows, whole, f"recorded in {run.run_id}")
        if times is not None and whole >= sum(row.get("time/step", 0.0) for row in rows):
            return times
    return None


def probe_times(loop: SharedOptions, run: Callable[[Any], object]) -> StepTimes | None:
    """Do a few steps of the run in a temporary folder; return their times.

    Args:
        loop: Settings of the planned run.
        run: Runs a train loop to its end.
    """
    with tempfile.TemporaryDirectory(prefix="tinker-cookbook-probe-") as name:
        changed: dict[str, Any] = {"log_path": name, "max_steps": PROBE_STEPS, "save_every": 0}
        changed |= {"dry_run": False, "behavior_if_log_dir_exists": "resume"}
        if loop.eval_every:
            changed["eval_every"] = PROBE_STEPS
        # The builders of evaluators may write into the run directory too.
        changed |= {
            key: [_in_folder(builder, name) for builder in value]
            for key in chz.chz_fields(loop)
            if isinstance(value := getattr(loop, key), list)
        }
        own = {key: value for key, value in changed.items() if key in chz.chz_fields(loop)}
        started = time.perf_counter()
        with _quiet():
            run(chz.replace(loop, **own))
        seconds = time.perf_counter() - started
        store = TrainingRunStore(LocalStorage(name))
        _delete_checkpoints(store, loop.base_url)
        return read_times(store.read_metrics(), seconds, f"measured in {PROBE_STEPS} steps now")


def describe_time(times: StepTimes, seconds: float, work: Workload) -> str:
    """Return the line of the expected time."""
    evaluation = f", {times.evaluation:.1f} s per evaluation" if times.evaluation else ""
    return (
        f"time     {_minutes(seconds)}, {seconds / work.total_steps:.2f} s per step"
        f"{evaluation} ({times.source})"
    )


def _in_folder(builder: Any, folder: str) -> Any:
    """Return a builder that writes into another run directory, if it writes into one."""
    if chz.is_chz(builder) and "log_path" in chz.chz_fields(builder):
        return chz.replace(builder, log_path=folder)
    return builder


def _delete_checkpoints(store: TrainingRunStore, base_url: str | None) -> None:
    """Delete what the probe has saved on the service."""
    records = store.read_checkpoint_records()
    paths = {path for each in records for path in (each.state_path, each.sampler_path) if path}
    saved = open_checkpoint_store(base_url)
    try:
        for path in saved.sizes(paths):
            saved.delete(path)
    finally:
        saved.close()


def _minutes(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _does_the_same(recorded: Row, wanted: Row) -> bool:
    different = compare_settings(recorded, wanted)
    return all(key.rpartition(".")[2] in SCALED for key in different)


def _seconds_between(first: Path, last: Path) -> float | None:
    try:
        return last.stat().st_mtime - first.stat().st_mtime
    except OSError:
        return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield
