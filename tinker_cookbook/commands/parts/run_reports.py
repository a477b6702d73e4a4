"""What `tinker-cookbook runs` reports about runs: objects for programs, and text for people."""

from __future__ import annotations

import itertools
import math
import re
import shlex
import textwrap
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.commands.parts.recipe_files import find_recipes, run_prefix
from tinker_cookbook.runs.directory import compare_settings
from tinker_cookbook.runs.report import sample_command
from tinker_cookbook.utils.byte_sizes import format_bytes
from tinker_cookbook.utils.durations import format_duration
from tinker_cookbook.utils.jsonl_log import Row
from tinker_cookbook.utils.metric_names import lower_is_better
from tinker_cookbook.utils.ml_log import RECIPE_SETTINGS
from tinker_cookbook.utils.recipe_code import compare_code
from tinker_cookbook.utils.terminal_text import escape_controls

if TYPE_CHECKING:
    from tinker_cookbook.stores import RunInfo, RunRegistry, TrainingRunStore

__all__ = [
    "compare_runs",
    "describe_comparison",
    "describe_list",
    "describe_run",
    "list_row",
    "run_object",
]

NOT_METRICS = ("step", "epoch", "progress", "progress/batch", "progress/done_frac")
NOT_SHOWN = ("time/", "num_tokens:", "num_steps")
"""Starts of the metrics that are reported only if `--metric` names them."""
HIGHER_IS_BETTER = re.compile(r"(^|[/_])(reward|reward/total|correct|accuracy|score|win_rate)$")
"""Metrics with a best value, in addition to those of which a lower value is better."""
SHOWN_METRICS = 24
CURVE_WIDTH = 24
BARS = "▁▂▃▄▅▆▇█"
LABEL = 12


def list_row(registry: RunRegistry, run: RunInfo) -> Row:
    """Return what the list reports about a run."""
    facts, details = run.facts, registry.get_details(run.run_id)
    last = dict(facts.last)
    if details.best is not None:
        last[details.best.metric] = details.best.last
    best = details.best
    return {
        "run": run.run_id,
        "path": registry.get_training_store(run.run_id).url(),
        "recipe": facts.recipe,
        "model": facts.model,
        "data": facts.data,
        "state": run.status,
        "step": facts.steps_done,
        "total_steps": facts.total_steps,
        "last": last,
        "best": best and {"metric": best.metric, "value": best.value, "step": best.step},
        "last_updated": run.last_updated,
        "disk_bytes": details.disk_bytes,
    }


def describe_list(rows: Sequence[Row]) -> list[str]:
    """Return a table of the rows of `list_row`, with a line of names above it."""
    head = ("RECIPE", "STATE", "STEP", "METRIC", "LAST", "BEST", "AGE", "DISK", "MODEL", "DATA")
    return _table([(*head, "RUN"), *map(_cells, rows)], right={2, 4, 5, 6, 7})


def run_object(registry: RunRegistry, run: RunInfo, metrics: str | None = None) -> Row:
    """Return what `show` reports about a run.

    Args:
        registry: The registry of the run.
        run: The run.
        metrics: Start of the metrics to report; by default, all except times and counts.
    """
    store = registry.get_training_store(run.run_id)
    config = store.read_config() or {}
    settings = config.get(RECIPE_SETTINGS)
    return {
        **list_row(registry, run),
        "settings": settings if isinstance(settings, dict) else config,
        "metrics": _summarize(store.read_metrics(), metrics),
        "checkpoints": store.read_checkpoints(),
        "base_url": run.facts.base_url,
        "resume": _resume_command(run, store.url()) if run.status == "failed" else None,
    }


def describe_run(report: Row) -> list[str]:
    """Return the lines of `show`."""
    age = _age(report["last_updated"])
    lines = [
        _line("run", report["run"]),
        _line("state", f"{report['state']}, {_progress(report)}, last changed {age} ago"),
        *(_line(key, report[key]) for key in ("recipe", "model", "data") if report[key]),
        _line("files", f"{report['path']}  ({format_bytes(report['disk_bytes'])})"),
        *_settings_lines(report["settings"]),
        "",
        *_metric_lines(report["metrics"]),
        "",
        *_checkpoint_lines(report["checkpoints"]),
    ]
    weights = [
        record["sampler_path"] for record in report["checkpoints"] if "sampler_path" in record
    ]
    if weights:
        command = sample_command(
            weights[-1], model_name=report["model"], base_url=report["base_url"]
        )
        lines.append(_line("sample", command))
    if report["resume"]:
        lines.append(_line("resume", report["resume"]))
    return lines


def compare_runs(old: TrainingRunStore, new: TrainingRunStore, metrics: str | None = None) -> Row:
    """Return what `diff` reports: settings and code that differ, and the ends of both curves."""
    before, after = old.read_metrics(), new.read_metrics()
    both = min(_last_step(before), _last_step(after))
    curves = {}
    summaries = _summarize(before, metrics), _summarize(after, metrics)
    at_step = _values_until(before, both), _values_until(after, both)
    for key in sorted(summaries[0] | summaries[1], key=_order):
        ends = [summary.get(key, {}).get("last") for summary in summaries]
        same = [values.get(key) for values in at_step]
        curves[key] = {"last": ends, "at_common_step": same}
    settings = compare_settings(old.read_config() or {}, new.read_config() or {})
    return {
        "settings": {key: list(values) for key, values in settings.items()},
        "code": compare_code(Path(old.url()), Path(new.url())),
        "steps": [_last_step(before), _last_step(after)],
        "common_step": both,
        "metrics": curves,
    }


def describe_comparison(names: Sequence[str], report: Row) -> list[str]:
    """Return the lines of `diff`."""
    lines = [f"A  {names[0]}", f"B  {names[1]}", ""]
    settings = [(key, *map(_value, values)) for key, values in report["settings"].items()]
    lines += _table([("SETTING", "A", "B"), *settings]) if settings else ["The settings agree."]
    lines += ["", *report["code"]] if report["code"] else []
    return list(map(escape_controls, [*lines, "", *_compared_metrics(report)]))


def _compared_metrics(report: Row) -> list[str]:
    common, steps = report["common_step"], report["steps"]
    rows = []
    for key, values in report["metrics"].items():
        (a, b), (a_then, b_then) = values["last"], values["at_common_step"]
        if a == b and a_then == b_then:
            continue
        row = (key, _number(a), _number(b), _change(a, b))
        rows.append(row if steps[0] == steps[1] else (*row, _number(a_then), _number(b_then)))
    head = ("METRIC", "A", "B", "B - A")
    if steps[0] != steps[1]:
        head = (*head, f"A, STEP {common}", f"B, STEP {common}")
    return _table([head, *rows], right=range(1, 6)) if rows else ["The metrics agree."]


def _resume_command(run: RunInfo, path: str) -> str | None:
    """Return the command that continues a run; None if it is not a run of an installed recipe."""
    recipe = run.facts.recipe
    if recipe is None or recipe not in find_recipes() or not run.has_config:
        return None
    words = ["python", "-m", f"{run_prefix()}{recipe}", f"config={path}", f"log_path={path}"]
    return shlex.join(words)


def _cells(row: Row) -> tuple[str, ...]:
    best = row["best"] or {}
    metric = best.get("metric") or next(iter(row["last"]), "")
    recipe, run = row["recipe"] or "", row["run"]
    step = f"{row['step']}/{row['total_steps']}" if row["total_steps"] else str(row["step"])
    return (
        recipe,
        row["state"],
        step,
        metric,
        _number(row["last"].get(metric)),
        _number(best.get("value")),
        _age(row["last_updated"]),
        format_bytes(row["disk_bytes"]),
        (row["model"] or "").rpartition("/")[2],
        (row["data"] or "").rstrip("/").rpartition("/")[2],
        run.removeprefix(f"{recipe}/"),
    )


def _table(rows: Sequence[tuple[str, ...]], right: Iterable[int] = ()) -> list[str]:
    """Return aligned lines; the columns in `right` are aligned at their ends."""
    rows = [tuple(map(escape_controls, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ends = set(right)
    return [
        "  ".join(
            cell.rjust(width) if number in ends else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _summarize(rows: Sequence[Row], start: str | None) -> dict[str, Row]:
    """Return first, last and best value and a curve of each metric; held-out metrics first."""
    series: dict[str, list[tuple[int | None, float]]] = {}
    for row in rows:
        for key, value in row.items():
            if _is_reported(key, start) and isinstance(value, int | float):
                series.setdefault(key, []).append((row.get("step"), float(value)))
    return {key: _summary(key, series[key]) for key in sorted(series, key=_order)}


def _order(key: str) -> tuple[bool, str]:
    """Sort held-out metrics first."""
    return not key.startswith("test/"), key


def _is_reported(key: str, start: str | None) -> bool:
    if start is not None:
        return key.startswith(start)
    return key not in NOT_METRICS and not key.startswith(NOT_SHOWN)


def _summary(key: str, points: list[tuple[int | None, float]]) -> Row:
    finite = [point for point in points if math.isfinite(point[1])]
    better = min if lower_is_better(key) else max if HIGHER_IS_BETTER.search(key) else None
    step, value = None, None
    if better is not None and finite:
        step, value = better(finite, key=lambda point: point[1])
    values = [value for _, value in points]
    return {
        "first": values[0],
        "last": values[-1],
        "best": value,
        "best_step": step,
        "count": len(values),
        "curve": _thin([value for _, value in finite]),
    }


def _thin(values: list[float]) -> list[float]:
    """Return at most CURVE_WIDTH means of equal parts of a curve."""
    count = min(len(values), CURVE_WIDTH)
    borders = [len(values) * number // max(1, count) for number in range(count + 1)]
    parts = [values[a:b] for a, b in itertools.pairwise(borders)]
    return [sum(part) / len(part) for part in parts]


def _values_until(rows: Sequence[Row], step: int) -> Row:
    """Return the last value of each key in the rows up to a step."""
    values: Row = {}
    for row in rows:
        if isinstance(row.get("step"), int) and row["step"] <= step:
            values |= row
    return values


def _last_step(rows: Sequence[Row]) -> int:
    return max((row["step"] for row in rows if isinstance(row.get("step"), int)), default=-1)


def _metric_lines(metrics: dict[str, Row]) -> list[str]:
    if not metrics:
        return [_line("metrics", "none")]
    keys = list(metrics)[:SHOWN_METRICS]
    rows = [
        (
            key,
            *(_number(metrics[key][name]) for name in ("first", "last", "best")),
            "" if metrics[key]["best_step"] is None else str(metrics[key]["best_step"]),
            _draw(metrics[key]["curve"]),
        )
        for key in keys
    ]
    lines = _table(
        [("METRIC", "FIRST", "LAST", "BEST", "STEP", "CURVE"), *rows], right={1, 2, 3, 4}
    )
    hidden = len(metrics) - len(keys)
    return [*lines, f"... and {hidden} more; --metric START shows them"] if hidden else lines


def _draw(curve: list[float]) -> str:
    if len(curve) < 2:
        return ""
    low, high = min(curve), max(curve)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in curve)


def _settings_lines(settings: Row) -> list[str]:
    shown = " ".join(
        f"{key}={_value(value)}" for key, value in settings.items() if value not in (None, "", [])
    )
    wrapped = textwrap.wrap(escape_controls(shown), 100, break_on_hyphens=False)
    return [_line("settings" if not number else "", text) for number, text in enumerate(wrapped)]


def _checkpoint_lines(records: Sequence[Row]) -> list[str]:
    if not records:
        return ["No checkpoint is saved."]
    rows = [
        (
            str(record.get("name", "")),
            _number(record.get("best_value")),
            str(record.get("state_path", "")),
            str(record.get("sampler_path", "")),
        )
        for record in records
    ]
    return [*_table([("CHECKPOINT", "BEST VALUE", "STATE", "WEIGHTS"), *rows]), ""]


def _progress(report: Row) -> str:
    total = report["total_steps"]
    return f"{report['step']} of {total} steps" if total else f"{report['step']} steps"


def _line(label: str, text: str) -> str:
    return f"{label:<{LABEL}}{escape_controls(text)}"


def _age(then: float | None) -> str:
    return "?" if then is None else format_duration(time.time() - then)


def _value(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _change(a: float | None, b: float | None) -> str:
    return "-" if a is None or b is None else f"{b - a:+.4g}"
