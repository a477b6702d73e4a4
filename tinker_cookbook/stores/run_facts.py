"""What the list of runs shows about one run, read from the ends of its files.

A file of metrics may hold gigabytes, so only its first and last rows are read here. The best value
of a metric needs the whole file; `find_best` reads it without parsing the other values.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from tinker_cookbook.runs.report import HELD_OUT
from tinker_cookbook.stores.storage import Storage, storage_join
from tinker_cookbook.stores.training_store import TrainingRunStore, join_steps
from tinker_cookbook.utils.jsonl_log import Row
from tinker_cookbook.utils.metric_names import lower_is_better
from tinker_cookbook.utils.ml_log import RECIPE_SETTINGS
from tinker_cookbook.utils.run_files import CHECKPOINTS_FILE, CONFIG_FILE, METRICS_FILE

__all__ = ["Best", "Facts", "TrainingType", "find_best", "read_facts"]

TrainingType = Literal["rl", "sl", "dpo"]
END_BYTES = 16_384
"""Bytes read at each end of the metrics; four times as many where a row is longer."""
LAST_ROWS = 3
"""Number of last rows whose values are joined: the last row may hold only an evaluation."""
TRAIN_METRICS = ("env/all/reward/total", "train_mean_nll", "dpo_loss", "loss", "reward/mean")
"""Metrics of training that the list shows, the first one that a run has."""
DATA_KEYS = ("data", "file_path", "dataset_name", "dataset", "path")
"""Settings that name the training data, in the order in which they are looked for."""


@dataclass
class Facts:
    """Facts about a run that change only when its files change."""

    recipe: str | None = None
    model: str | None = None
    data: str | None = None
    base_url: str | None = None
    training_type: TrainingType | None = None
    has_config: bool = False
    is_complete: bool = False
    """Whether the final checkpoint is recorded."""
    steps_done: int = 0
    """Number of optimizer steps with a row."""
    total_steps: int | None = None
    """Number of steps of the whole run, if its rows tell."""
    held_out_metric: str | None = None
    train_metric: str | None = None
    last: dict[str, float] = field(default_factory=dict)
    """Values of these two metrics in the last rows."""
    last_updated: float | None = None
    """Time of the newest row or record, in seconds since 1970."""


@dataclass
class Best:
    """The best and the last value of a metric, and the step of the best."""

    metric: str
    value: float
    step: int | None
    last: float
    """The last value of the metric."""


def read_facts(storage: Storage, prefix: str, names: Iterable[str]) -> Facts:
    """Read the facts about a run.

    Args:
        storage: Where the run is.
        prefix: The run's folder.
        names: Names of the files in it.
    """
    store = TrainingRunStore(storage, prefix)
    config = store.read_config()
    facts = _from_config(config or {})
    facts.has_config = config is not None
    facts.is_complete = any(record.get("final") for record in store.read_checkpoints())
    if METRICS_FILE in names:
        first, last = _read_ends(storage, storage_join(prefix, METRICS_FILE))
        _add_metrics(facts, config or {}, first, last)
    facts.last_updated = _newest(storage, prefix, names)
    if facts.recipe is None:
        facts.recipe = prefix.rpartition("/")[0].rpartition("/")[2] or None
    return facts


def find_best(storage: Storage, prefix: str, metric: str) -> Best | None:
    """Return the best value of a metric in the rows of a run; None if it has no finite value."""
    try:
        data = storage.read(storage_join(prefix, METRICS_FILE))
    except FileNotFoundError:
        return None
    key = re.escape(json.dumps(metric).encode())
    values = re.compile(key + rb": ?(-?\d[\d.eE+-]*)[,}]")
    complete = data.rfind(b"\n") + 1
    found = [(float(each[1]), each.start()) for each in values.finditer(data, 0, complete)]
    if not found:
        return None
    better = min if lower_is_better(metric) else max
    value, place = better(found, key=lambda each: each[0])
    line = data[data.rfind(b"\n", 0, place) + 1 : data.find(b"\n", place)]
    step = _parse(line).get("step")
    return Best(metric, value, step if isinstance(step, int) else None, last=found[-1][0])


def _from_config(config: Row) -> Facts:
    recipe_settings = config.get(RECIPE_SETTINGS)
    settings = recipe_settings if isinstance(recipe_settings, dict) else {}
    data = next((d for each in (settings, config) if (d := _find_data(each))), None)
    return Facts(
        recipe=_text(config.get("recipe_name")),
        model=_text(config.get("model_name")) or _text(settings.get("model_name")),
        data=data,
        base_url=_text(config.get("base_url")),
        training_type=_training_type(config),
    )


def _find_data(settings: Row) -> str | None:
    nested = settings.get("dataset_builder")
    places = (settings, nested if isinstance(nested, dict) else {})
    return next((text for p in places for key in DATA_KEYS if (text := _text(p.get(key)))), None)


def _training_type(config: Row) -> TrainingType | None:
    if "dpo_beta" in config:
        return "dpo"
    if "loss_fn" in config and "max_tokens" in config:
        return "rl"
    return "sl" if "dataset_builder" in config else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _read_ends(storage: Storage, path: str) -> tuple[list[Row], list[Row]]:
    """Return the first row and the last rows of a file."""
    found = storage.stat(path)
    size = found.size if found else 0
    for length in (END_BYTES, 4 * END_BYTES, size):
        start = max(0, size - length)
        try:
            data = storage.read_range(path, start, size - start)
        except FileNotFoundError:
            return [], []
        # The first part is everything before the last rows, or a row that the block cuts.
        lines = data[: data.rfind(b"\n") + 1].rsplit(b"\n", LAST_ROWS + 1)
        lines = [line for line in (lines if not start else lines[1:]) if line]
        if not lines and start:
            continue  # the last row is longer than the block
        head = storage.read_range(path, 0, length) if start else data
        end = head.find(b"\n")
        first = [_parse(head[:end])] if end >= 0 else []
        rows = [_parse(line) for line in lines[-LAST_ROWS:]]
        return first, join_steps(row for row in rows if row)
    return [], []


def _add_metrics(facts: Facts, config: Row, first: list[Row], last: list[Row]) -> None:
    rows = [*first, *last]
    values = {k: float(v) for row in rows for k, v in row.items() if _is_number(v)}
    facts.held_out_metric = _held_out(values, config)
    facts.train_metric = next((key for key in TRAIN_METRICS if key in values), None)
    shown = (facts.held_out_metric, facts.train_metric)
    # A held-out metric may be missing in the last rows; `find_best` reads its last value.
    newest = {key: float(v) for row in last for key, v in row.items() if _is_number(v)}
    facts.last = {key: newest[key] for key in shown if key in newest}
    for row in rows:
        step, done = row.get("step"), row.get("progress/done_frac", row.get("progress"))
        # The row after the last step, with the final evaluation, is not a step.
        is_step = any(key.startswith("num_") or key in TRAIN_METRICS for key in row)
        if not isinstance(step, int):
            continue
        facts.steps_done = max(facts.steps_done, step + 1 if is_step else step)
        if isinstance(done, int | float) and 0 < done <= 1:
            reached = step + 1 if "progress/done_frac" in row else step
            facts.total_steps = max(round(reached / done), facts.steps_done)


def _held_out(values: dict[str, float], config: Row) -> str | None:
    best = _text(config.get("best_metric"))
    known = [best, *(key for _, key in HELD_OUT)]
    found = next((key for key in known if key in values), None)
    ends = ("/nll", "/accuracy", "/correct", "/loss", "/reward/total")
    own = sorted(key for key in values if key.startswith("test/") and key.endswith(ends))
    return found or (own[0] if own else None)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


def _parse(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _newest(storage: Storage, prefix: str, names: Iterable[str]) -> float | None:
    files = {CONFIG_FILE, METRICS_FILE, CHECKPOINTS_FILE}.intersection(names)
    stats = [storage.stat(storage_join(prefix, name)) for name in files]
    return max((found.mtime for found in stats if found), default=None)
