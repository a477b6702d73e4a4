"""Run the runs of a sweep as processes on one service, some at a time, and report them."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.commands.parts.recipe_files import find_recipe, run_prefix
from tinker_cookbook.commands.parts.sweep_plan import PlannedRun, SweepPlan
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.utils.durations import format_duration
from tinker_cookbook.utils.metric_names import lower_is_better

if TYPE_CHECKING:
    from tinker_cookbook.service import Connection
    from tinker_cookbook.stores import RunRegistry

__all__ = ["Finished", "describe_results", "find_module", "run_all"]

CHILD = "tinker_cookbook.commands.parts.sweep_child"
LOGS = "logs"
POLL_SECONDS = 0.05
NEWS_SECONDS = 30.0
USER_ERROR = 2
STOP_SECONDS = 25.0


@dataclass(frozen=True)
class Finished:
    """A run of the sweep that has ended, now or in an earlier start."""

    run: PlannedRun
    status: int
    seconds: float | None
    """None for a run that an earlier start completed."""


def find_module(recipe: str) -> str:
    """Return the module or the file of a recipe.

    Raises:
        ConfigurationError: if there is no such recipe.
    """
    if recipe.endswith(".py") and Path(recipe).is_file():
        return recipe
    module = f"{run_prefix()}{recipe.removeprefix('recipes.')}"
    if "." in recipe.removeprefix("recipes."):
        try:
            if importlib.util.find_spec(module) is not None:
                return module
        except ModuleNotFoundError:
            pass
    return f"{run_prefix()}{find_recipe(recipe).name}"


def run_all(
    plan: SweepPlan,
    folder: Path,
    connection: Connection,
    *,
    num_parallel: int,
    is_complete: Callable[[str], bool],
) -> list[Finished]:
    """Run everything that is not complete yet.

    Args:
        plan: The runs.
        folder: Folder of the sweep; each run gets a folder in it.
        connection: The service of all runs.
        num_parallel: Maximum number of runs at a time.
        is_complete: Returns whether the run of a name has been completed before.

    Returns:
        All runs in the order in which they ended.

    Raises:
        ConfigurationError: if a run refuses its settings; the others are then stopped.
    """
    module = find_module(plan.recipe)
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    done = [Finished(run, 0, None) for run in plan.runs if is_complete(run.name)]
    known = {each.run.name for each in done}
    waiting = [run for run in plan.runs if run.name not in known]
    if done:
        print(f"skipped  {len(done)} runs that are complete", flush=True)
    active: list[_Active] = []
    last_news = time.monotonic()
    try:
        while waiting or active:
            while waiting and len(active) < num_parallel:
                active.append(_start(plan, waiting.pop(0), module, folder, connection))
            for each in [each for each in active if each.process.poll() is not None]:
                active.remove(each)
                done.append(each.finish(f"{len(done) + 1}/{len(plan.runs)}"))
            if time.monotonic() - last_news > NEWS_SECONDS:
                last_news = time.monotonic()
                print(f"running  {'; '.join(each.run.name for each in active)}", flush=True)
            time.sleep(POLL_SECONDS)
    finally:
        _stop(active)
    return done


@dataclass
class _Active:
    run: PlannedRun
    process: subprocess.Popen[bytes]
    log: Path
    started: float

    def finish(self, number: str) -> Finished:
        seconds = time.monotonic() - self.started
        if self.process.stdin is not None:
            self.process.stdin.close()
        status = self.process.returncode
        if status == USER_ERROR:
            raise ConfigurationError(f"run {self.run.name}: {_last_line(self.log)}")
        state = "done   " if status == 0 else "FAILED "
        print(f"{state}  {number} {self.run.name} in {format_duration(seconds)}", flush=True)
        if status != 0:
            print(f"         {_last_line(self.log)}  (log: {self.log})", flush=True)
        return Finished(self.run, status, seconds)


def _start(
    plan: SweepPlan, run: PlannedRun, module: str, folder: Path, connection: Connection
) -> _Active:
    log = folder / LOGS / f"{run.name}.log"
    own = {key: value for key, value in (plan.fixed | run.settings).items() if key != "base_url"}
    words = [f"{key}={value}" for key, value in own.items()] + [f"log_path={folder / run.name}"]
    environment = {**os.environ, "TINKER_BASE_URL": connection.base_url}
    if connection.api_key is not None:
        environment["TINKER_API_KEY"] = connection.api_key
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", CHILD, module, *words],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            process_group=0,  # Ctrl-C reaches only the sweep, which then closes the pipes
        )
    return _Active(run, process, log, time.monotonic())


def _stop(active: Sequence[_Active]) -> None:
    """End the runs that are left: they save nothing more, and can be resumed."""
    for each in active:
        if each.process.stdin is not None:
            each.process.stdin.close()
    deadline = time.monotonic() + STOP_SECONDS
    for each in active:
        try:
            each.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            each.process.kill()
            each.process.wait()


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it wrote nothing"


@dataclass(frozen=True)
class _Result:
    run: PlannedRun
    state: str
    steps: int
    last: float | None
    best: float | None
    best_step: int | None


def describe_results(
    registry: RunRegistry, plan: SweepPlan, *, metric: str | None, direction: str | None
) -> list[str]:
    """Return the table of a sweep: the best run first, and means over seeds.

    Args:
        registry: The runs of the sweep's folder.
        plan: The sweep.
        metric: Metric that is compared; None: the held-out metric of the runs.
        direction: `min` or `max`, whichever is better; None: judged by the metric's name.
    """
    infos = {run.run_id: run for run in registry.refresh()}
    known = [infos[run.name] for run in plan.runs if run.name in infos]
    chosen = metric or _common_metric(known)
    lower = lower_is_better(chosen) if direction is None else direction == "min"
    results = [_read_result(registry, run, chosen, lower) for run in plan.runs]
    worst = math.inf if lower else -math.inf
    results.sort(
        key=lambda each: (worst if each.last is None else each.last) * (1 if lower else -1)
    )
    head = [*plan.axes, "STATE", "STEPS", "LAST", "BEST", "AT STEP"]
    rows = [
        [
            *(each.run.settings[axis] for axis in plan.axes),
            each.state,
            str(each.steps),
            _number(each.last),
            _number(each.best),
            "-" if each.best_step is None else str(each.best_step),
        ]
        for each in results
    ]
    word = "lower" if lower else "higher"
    lines = [f"{chosen}, {word} is better; the best run is first", "", *_table([head, *rows])]
    if "seed" in plan.axes and len(plan.axes) > 1:
        lines += ["", *_means_over_seeds(plan, results)]
    if results and results[0].last is not None:
        best = " ".join(plan.words(results[0].run))
        lines += ["", f"best     python -m {find_module(plan.recipe)} {best}"]
    return lines


def _common_metric(runs: Sequence) -> str:
    facts = [run.facts for run in runs]
    held_out = [each.held_out_metric for each in facts if each.held_out_metric]
    trained = [each.train_metric for each in facts if each.train_metric]
    found = held_out or trained
    return max(set(found), key=found.count) if found else "train_mean_nll"


def _read_result(registry: RunRegistry, run: PlannedRun, metric: str, lower: bool) -> _Result:
    info = registry.get_run(run.name)
    if info is None:
        return _Result(run, "not begun", 0, None, None, None)
    rows = registry.get_training_store(run.name).read_metrics()
    points = [(row.get("step"), row[metric]) for row in rows if _is_finite(row.get(metric))]
    if not points:
        return _Result(run, info.status, info.facts.steps_done, None, None, None)
    step, best = (min if lower else max)(points, key=lambda point: point[1])
    return _Result(run, info.status, info.facts.steps_done, points[-1][1], best, step)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _means_over_seeds(plan: SweepPlan, results: Sequence[_Result]) -> list[str]:
    """Return a table with the mean over seeds and its standard error."""
    axes = [axis for axis in plan.axes if axis != "seed"]
    groups: dict[tuple[str, ...], list[float]] = {}
    for each in results:
        if each.last is not None:
            groups.setdefault(tuple(each.run.settings[axis] for axis in axes), []).append(each.last)
    rows = []
    for key, values in groups.items():
        mean = sum(values) / len(values)
        error = None
        if len(values) > 1:
            variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
            error = math.sqrt(variance / len(values))
        rows.append([*key, str(len(values)), _number(mean), _number(error)])
    return _table([[*axes, "SEEDS", "MEAN", "STANDARD ERROR"], *rows])


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
