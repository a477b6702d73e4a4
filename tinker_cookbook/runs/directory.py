"""The run directory: its default path, and what happens if it already holds a run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinker_cookbook.exceptions import ConfigurationError, DataFormatError
from tinker_cookbook.runs import lock
from tinker_cookbook.runs.options import LogdirBehavior
from tinker_cookbook.utils.disk_errors import optional_file
from tinker_cookbook.utils.jsonl_log import Row, keep_rows, read_rows
from tinker_cookbook.utils.ml_log import RECIPE_SETTINGS, dump_config
from tinker_cookbook.utils.recipe_code import CODE_FILE, code_differences
from tinker_cookbook.utils.run_files import (
    CHECKPOINTS_FILE,
    CONFIG_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    TIMING_FILE,
)
from tinker_cookbook.utils.session_naming import slugify

__all__ = [
    "compare_settings",
    "config_differences",
    "default_log_path",
    "delete_run",
    "describe_interruption",
    "describe_next_start",
    "flatten_settings",
    "forget_failed_starts",
    "holds_a_run",
    "open_log_dir",
    "prepare_log_dir",
    "runs_path",
    "truncate_metrics",
]

RUNS_DIR_ENV_VAR = "TINKER_COOKBOOK_RUNS_DIR"
DEFAULT_RUNS_DIR = "~/tinker-runs"
SHOWN_DIFFERENCES = 12
UNSET = "unset"
"""Value of a setting that a config does not have, in a comparison."""
RUN_FILES = (CONFIG_FILE, METRICS_FILE, CHECKPOINTS_FILE)
# The files that a deletion removes. The record of checkpoints comes first: if the deletion is
# interrupted, nothing is resumed from a part of a run.
RUN_PATTERNS = (
    CHECKPOINTS_FILE,
    f"{METRICS_FILE}*",
    CONFIG_FILE,
    CODE_FILE,
    "code.diff",
    "logs.log",
    SAMPLES_FILE,
    TIMING_FILE,
    "trace_events.jsonl",
    "iteration_[0-9]*",
    "transcripts.html",
)

# A run may be resumed with other values of these fields: they do not change what is computed.
FREE_FIELDS = frozenset(
    {
        RECIPE_SETTINGS,
        "log_path",
        "base_url",
        "dry_run",
        "dry_run_probe",
        "prices",
        "behavior_if_log_dir_exists",
        "wandb_project",
        "wandb_name",
        "loggers",
        "session_name",
        "enable_trace",
        "span_chart_every",
        "submit_ahead",
        "save_every",
        "save_every_tokens",
        "save_every_seconds",
        "keep_checkpoints",
        "ttl_seconds",
        "rolling_save_every",
        "rolling_ttl_seconds",
        "async_periodic_saves",
    }
)


def runs_path(*parts: str) -> str:
    """Return a path below the folder of all runs: $TINKER_COOKBOOK_RUNS_DIR or ~/tinker-runs."""
    root = os.environ.get(RUNS_DIR_ENV_VAR) or DEFAULT_RUNS_DIR
    return str(Path(root).expanduser().joinpath(*parts))


def default_log_path(recipe_name: str, *parts: str, config: object) -> str:
    """Return a run directory named after the settings, so that the same command finds it again.

    Args:
        recipe_name: Name of the folder below the folder of all runs.
        parts: Readable parts of the name: data set, model, ...
        config: All settings; eight digits of their hash distinguish different runs.
    """
    relevant = _relevant(dump_config(config))
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:8]
    return runs_path(recipe_name, "-".join([*map(slugify, parts), digest]))


def holds_a_run(log_dir: str | Path) -> bool:
    """Return whether a folder contains any of the files of a run."""
    return any((Path(log_dir) / name).exists() for name in RUN_FILES)


def config_differences(log_dir: str | Path, config: object) -> list[str]:
    """Compare a config with the one that a run directory was created with.

    Returns:
        One line `key: old -> new` per difference that changes what is computed; settings that both
        configs have come first. Empty without differences, or without a config.json.
    """
    path = Path(log_dir) / CONFIG_FILE
    if not path.exists():
        return []
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataFormatError(f"{path} is not JSON ({error}); delete it or the folder.") from error
    changed = compare_settings(old, dump_config(config))
    return [f"{key}: {before} -> {after}" for key, (before, after) in changed.items()]


def flatten_settings(config: Row) -> Row:
    """Return the settings of a config.json that change what is computed, by dotted key."""
    return _flatten(_relevant(config))


def compare_settings(old: Row, new: Row) -> dict[str, tuple[Any, Any]]:
    """Compare the contents of two config.json files.

    Returns:
        The old and the new value of each setting that changes what is computed and differs, by
        dotted key; `unset` where a config does not have it. Settings that both have come first.
    """
    before, after = flatten_settings(old), flatten_settings(new)
    keys = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    keys.sort(key=lambda key: (key not in before or key not in after, key))
    return {key: (before.get(key, UNSET), after.get(key, UNSET)) for key in keys}


@contextlib.contextmanager
def open_log_dir(
    log_dir: str | Path, behavior: LogdirBehavior, config: object = None
) -> Iterator[Path]:
    """Open a run directory for the length of a block and lock it against other runs.

    If the run fails before its first step, the files it has written are removed.

    Args:
        log_dir: The run directory.
        behavior: What happens to an old run there; see `prepare_log_dir`.
        config: The settings of the run that is about to start.

    Yields:
        The folder, created if it was missing.

    Raises:
        ConfigurationError: if another process uses the folder, or the run is refused.
    """
    opened = _OpenFolder(Path(log_dir).expanduser())
    _opened.append(opened)
    try:
        with lock.hold(opened.folder):
            _prepare(opened.folder, behavior, config)
            opened.is_new = not holds_a_run(opened.folder)
            try:
                yield opened.folder
            except BaseException:
                with _one_cleans():
                    opened.forget_failed_start()
                raise
    finally:
        with _one_cleans():
            opened.remove_if_empty()
        _opened.remove(opened)


class _OpenFolder:
    """A run directory in use by this process."""

    def __init__(self, folder: Path) -> None:
        global _last_opened
        self.folder = folder
        self.is_new = False
        """True if the folder held no run when it was opened."""
        self._made = _make_folder(folder)
        _last_opened = folder

    def forget_failed_start(self) -> None:
        """Remove the files of a new run that has produced no result."""
        results = (METRICS_FILE, CHECKPOINTS_FILE, SAMPLES_FILE, "iteration_[0-9]*")
        if self.is_new and not any(list(self.folder.glob(pattern)) for pattern in results):
            delete_run(self.folder)

    def remove_if_empty(self) -> None:
        """Remove the folders that were created for this run, if they are empty."""
        for folder in self._made:
            with contextlib.suppress(OSError):  # the folder is gone, or not empty
                folder.rmdir()


_cleaning = threading.Lock()
CLEANING_SECONDS = 1.0


@contextlib.contextmanager
def _one_cleans() -> Iterator[None]:
    """Keep the run and the thread that ends the process from cleaning up at the same time.

    A file that one of them finds gone would end the other's work half-way.
    """
    has_lock = _cleaning.acquire(timeout=CLEANING_SECONDS)
    try:
        yield
    finally:
        if has_lock:
            _cleaning.release()


_opened: list[_OpenFolder] = []
_last_opened: Path | None = None


def forget_failed_starts() -> None:
    """Clean up the open run directories as their blocks would; for a process that ends now."""
    with _one_cleans():
        for opened in list(_opened):
            (opened.folder / lock.LOCK_FILE).unlink(missing_ok=True)
            opened.forget_failed_start()
            opened.remove_if_empty()


def describe_next_start() -> str:
    """Return a sentence part that says what the same command would do now."""
    if _last_opened is None:
        return "the same command starts it"
    try:
        records = read_rows(_last_opened / CHECKPOINTS_FILE)
    except (OSError, DataFormatError):
        records = []
    saved = [record for record in records if record.get("state_path")]
    if not saved:
        return "nothing is saved yet: the same command starts over"
    if saved[-1].get("final"):
        return "the run is complete"
    return f"the same command resumes from checkpoint {saved[-1].get('name')}"


def describe_interruption() -> str:
    """Return the line that is printed after Ctrl-C."""
    begun = "interrupted" if _last_opened else "interrupted before the run began"
    return f"{begun}; {describe_next_start()}"


def prepare_log_dir(log_dir: str | Path, behavior: LogdirBehavior, config: object = None) -> None:
    """Decide what happens to a folder that may hold a run, and create it if it is missing.

    The folder is not locked afterwards; `open_log_dir` locks it as well.

    Args:
        log_dir: The run directory.
        behavior: `resume` keeps the old run; `delete` removes it; `raise` refuses any old run;
            `ask` resumes if `config` and the recipe's code are those of the old run, and otherwise
            asks on a terminal and refuses elsewhere.
        config: The settings of the run that is about to start, for `ask`.

    Raises:
        ConfigurationError: if the run is refused (the differences are listed) or the folder is in
            use.
    """
    folder = Path(log_dir).expanduser()
    lock.refuse_if_held(folder)
    _prepare(folder, behavior, config)
    _make_folder(folder)


def _prepare(folder: Path, behavior: LogdirBehavior, config: object) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"log_path={folder} is a file; name a folder.")
    if holds_a_run(folder):
        _decide(folder, behavior, config)


def _make_folder(folder: Path) -> list[Path]:
    """Create a folder, and return the folders that were created, the innermost first."""
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"log_path={folder} is a file; name a folder.")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"log_path={folder} cannot be created: {error}. Use a folder in which you may write."
        ) from error
    return missing


def _decide(folder: Path, behavior: LogdirBehavior, config: object) -> None:
    if behavior == "delete":
        delete_run(folder)
        return
    if behavior == "resume":
        return
    if behavior == "raise":
        raise ConfigurationError(
            f"log_path={folder} already holds a run; use another folder, or "
            "behavior_if_log_dir_exists=resume or delete."
        )
    differences = []
    if config is not None:
        differences = [*code_differences(folder), *config_differences(folder, config)]
        if not differences:
            return
    if len(differences) > SHOWN_DIFFERENCES:
        rest = f"... and {len(differences) - SHOWN_DIFFERENCES} more: it is a different kind of run"
        differences = [*differences[:SHOWN_DIFFERENCES], rest]
    shown = "".join(f"\n  {line}" for line in differences)
    told = f", and these have changed since its start:{shown}\n" if differences else ". "
    if not sys.stdin.isatty():
        raise ConfigurationError(
            f"log_path={folder} already holds a run{told}Start over "
            "(behavior_if_log_dir_exists=delete, or another log_path), restore the old settings "
            "and code, or resume from its weights anyway (behavior_if_log_dir_exists=resume)."
        )
    _ask(folder, told)


def _ask(folder: Path, told: str) -> None:
    print(f"log_path={folder} already holds a run{told}")
    answer = ""
    while answer not in ("delete", "resume", "exit"):
        try:
            answer = input("delete it, resume it, or exit? [delete/resume/exit] ").strip().lower()
        except EOFError:  # Ctrl-D
            answer = "exit"
    if answer == "delete":
        delete_run(folder)
    elif answer == "exit":
        raise ConfigurationError(f"log_path={folder} is kept, as you asked.")


def delete_run(log_dir: str | Path) -> None:
    """Remove the files that a run writes; other files in the folder stay."""
    folder = Path(log_dir)
    for pattern in RUN_PATTERNS:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def truncate_metrics(log_dir: str | Path, next_step: int) -> int:
    """Drop the rows of metrics, times and samples of steps that a resumed run will repeat.

    If any row is dropped, the old metrics file is kept as `metrics.jsonl.pre_resume_NNNNNN`.

    Returns:
        The number of dropped metric rows.
    """
    folder = Path(log_dir)

    def is_kept(row: Row) -> bool:
        return isinstance(row.get("step"), int) and row["step"] < next_step

    def is_kept_sample(row: Row) -> bool:
        return is_kept(row) or "step" not in row

    backup = folder / f"{METRICS_FILE}.pre_resume_{next_step:06d}"
    with optional_file(folder / TIMING_FILE):
        keep_rows(folder / TIMING_FILE, is_kept)
    keep_rows(folder / SAMPLES_FILE, is_kept_sample)
    return keep_rows(folder / METRICS_FILE, is_kept, backup=backup)


def _relevant(config: Row) -> Row:
    return {key: value for key, value in config.items() if key not in FREE_FIELDS}


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return `{"a": [{"b": 1}]}` as `{"a.0.b": 1}`, without keys that change no number."""
    if isinstance(value, list):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if key not in ("log_path", "num_workers"):
            flat |= _flatten(item, f"{prefix}.{key}" if prefix else key)
    return flat
