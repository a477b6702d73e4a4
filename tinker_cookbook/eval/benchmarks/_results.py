"""Stored evaluations: trajectories, results, and grading again without sampling.

save_dir/summary.json                    the results of all benchmarks
save_dir/BENCHMARK/settings.json         what the replies depend on
save_dir/BENCHMARK/trajectories.jsonl    one reply per line, with its grade
save_dir/BENCHMARK/result.json           the result
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tinker_cookbook.eval.benchmarks._grading import grade_in_time
from tinker_cookbook.eval.benchmarks._registry import find_benchmark
from tinker_cookbook.eval.benchmarks._settings import SETTINGS_FILE, grader_name, read_settings
from tinker_cookbook.eval.benchmarks._types import (
    BenchmarkBuilder,
    BenchmarkConfig,
    BenchmarkResult,
    Grade,
    Logs,
    Metrics,
    StoredTrajectory,
    is_correct,
)
from tinker_cookbook.eval.statistics import (
    PairedComparison,
    compare_paired,
    pass_at_k,
    standard_error,
)
from tinker_cookbook.exceptions import DataFormatError, DataValidationError, EvalGradingError
from tinker_cookbook.utils.durable_files import write_atomically
from tinker_cookbook.utils.jsonl_log import change_rows, read_rows

__all__ = [
    "RESULT_FILE",
    "TRAJECTORIES_FILE",
    "compare_results",
    "load_result",
    "load_summary",
    "load_trajectories",
    "print_trajectory",
    "regrade_trajectories",
    "summarize",
    "write_result",
]

TRAJECTORIES_FILE = "trajectories.jsonl"
RESULT_FILE = "result.json"
SUMMARY_FILE = "summary.json"
Aggregate = Callable[[list[float], list[Metrics]], BenchmarkResult]


def load_result(save_dir: str, benchmark_name: str) -> BenchmarkResult | None:
    """Return the stored result of a benchmark; None if it has not been run to its end."""
    record = _read_json(Path(save_dir).expanduser() / benchmark_name / RESULT_FILE)
    return None if record is None else BenchmarkResult.from_dict(record)


def load_summary(save_dir: str) -> dict[str, dict]:
    """Return the stored results of all benchmarks by name, as JSON objects."""
    return _read_json(Path(save_dir).expanduser() / SUMMARY_FILE) or {}


def load_trajectories(
    save_dir: str,
    benchmark_name: str,
    correct_only: bool = False,
    incorrect_only: bool = False,
    errors_only: bool = False,
) -> list[StoredTrajectory]:
    """Return the stored trajectories of a benchmark, ordered by example and sample.

    Args:
        save_dir: The folder of the evaluation.
        benchmark_name: The benchmark.
        correct_only: Only replies with the full reward.
        incorrect_only: Only graded replies with less than that.
        errors_only: Only replies without a grade.
    """
    path = Path(save_dir).expanduser() / benchmark_name / TRAJECTORIES_FILE
    newest = {}
    for row in read_rows(path):
        found = StoredTrajectory.from_dict(row)
        newest[found.example_id, found.sample] = found
    return [
        found
        for found in sorted(newest.values(), key=lambda each: (each.idx, each.sample))
        if not (errors_only and found.error is None)
        and not (correct_only and (found.error or not is_correct(found.reward)))
        and not (incorrect_only and (found.error or is_correct(found.reward)))
    ]


def print_trajectory(traj: StoredTrajectory) -> None:
    """Print a trajectory: its turns, its grade, and what the grader found."""
    verdict = f"error: {traj.error}" if traj.error else f"reward {traj.reward:g}"
    cut = ", truncated" if traj.is_truncated else ""
    print(f"=== {traj.benchmark} {traj.example_id}, sample {traj.sample}: {verdict}{cut}")
    for turn in traj.turns:
        tokens = f" ({turn.token_count} tokens)" if turn.token_count else ""
        print(f"--- {turn.metadata.get('role', turn.role)}{tokens}\n{turn.content}")
    for kind, values in (("metrics", traj.metrics), ("logs", traj.logs)):
        if values:
            print(f"--- {kind}")
            for name, value in values.items():
                print(f"{name}: {value}")


def regrade_trajectories(
    save_dir: str,
    benchmark_name: str,
    grade_fn: Callable[[str, Logs], float] | None = None,
    aggregate_fn: Aggregate | None = None,
) -> BenchmarkResult:
    """Grade the stored replies again, without sampling.

    Truncated replies stay truncated, and errors stay errors. With `grade_fn`, the stored files do
    not change. Without it, the benchmark's current grader is used, and grades and result are
    written, so that an evaluation with an older grader can be resumed.

    Args:
        save_dir: The folder of the evaluation.
        benchmark_name: The benchmark.
        grade_fn: Returns the reward of a reply, from its text and the logs of its trajectory.
        aggregate_fn: Makes the result; None: the benchmark's `aggregate`.

    Raises:
        DataValidationError: if no replies are stored.
    """
    trajectories = load_trajectories(save_dir, benchmark_name)
    if not trajectories:
        raise DataValidationError(
            f"{save_dir} has no replies of {benchmark_name}; run the benchmark with this save_dir."
        )
    benchmark = find_benchmark(benchmark_name)
    config = BenchmarkConfig(grade_fn=grade_fn)
    graded = asyncio.run(_regrade_all(benchmark, trajectories, config))
    samples = 1 + max(each.sample for each in graded)
    result = summarize(benchmark, graded, num_samples=samples, aggregate=aggregate_fn)
    if grade_fn is None:
        folder = Path(save_dir).expanduser() / benchmark_name
        by_key = {(each.example_id, each.sample): dict(each.to_dict()) for each in graded}
        change_rows(
            folder / TRAJECTORIES_FILE, lambda row: by_key[row["example_id"], row["sample"]]
        )
        settings = (read_settings(folder) or {}) | {"grader": grader_name(benchmark, config)}
        write_atomically(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
        write_result(save_dir, result)
    return result


async def _regrade_all(
    benchmark: BenchmarkBuilder, trajectories: list[StoredTrajectory], config: BenchmarkConfig
) -> list[StoredTrajectory]:
    limit = asyncio.Semaphore(config.agent_concurrency)

    async def regrade(found: StoredTrajectory) -> StoredTrajectory:
        if found.is_truncated or (found.error is not None and not found.logs):
            return found
        async with limit:
            try:
                grade = await grade_in_time(benchmark, found.reply, found.logs, config)
            except EvalGradingError as error:
                return _with_grade(found, Grade(0.0), f"EvalGradingError: {error}")
        return _with_grade(found, grade, None)

    return await asyncio.gather(*map(regrade, trajectories))


def _with_grade(found: StoredTrajectory, grade: Grade, error: str | None) -> StoredTrajectory:
    record = found.to_dict()
    record |= {
        "reward": grade.reward,
        "metrics": found.metrics | grade.metrics,
        "logs": found.logs | grade.logs,
        "error": error,
    }
    return StoredTrajectory.from_dict(record)


def compare_results(save_dir_a: str, save_dir_b: str, benchmark_name: str) -> PairedComparison:
    """Compare two evaluations on the examples that both have without an error.

    The score of an example is the share of its replies that are correct.

    Raises:
        DataValidationError: if the data differ, or no example is in both.
    """
    settings = [
        read_settings(Path(folder).expanduser() / benchmark_name) or {}
        for folder in (save_dir_a, save_dir_b)
    ]
    data = [each.get("data") for each in settings]
    if data[0] != data[1]:
        raise DataValidationError(
            f"{benchmark_name} was run on {data[0]!r} and on {data[1]!r}; compare evaluations of "
            "the same data."
        )
    scores_a, scores_b = (
        example_scores(load_trajectories(folder, benchmark_name))
        for folder in (save_dir_a, save_dir_b)
    )
    common = [name for name in scores_a if name in scores_b]
    if not common:
        raise DataValidationError(
            f"{save_dir_a} and {save_dir_b} have no graded example of {benchmark_name} in common."
        )
    return compare_paired([scores_a[name] for name in common], [scores_b[name] for name in common])


def example_scores(trajectories: Iterable[StoredTrajectory]) -> dict[str, float]:
    """Return the share of correct replies of each example, without replies that have an error."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for found in trajectories:
        if found.error is None:
            verdicts[found.example_id].append(is_correct(found.reward))
    return {name: sum(found) / len(found) for name, found in verdicts.items()}


def summarize(
    benchmark: BenchmarkBuilder,
    trajectories: list[StoredTrajectory],
    *,
    num_samples: int,
    time_seconds: float = 0.0,
    aggregate: Aggregate | None = None,
) -> BenchmarkResult:
    """Return the result of all trajectories of a benchmark."""
    graded = [each for each in trajectories if each.error is None]
    result = (aggregate or benchmark.aggregate)(
        [each.reward for each in graded], [each.metrics for each in graded]
    )
    result.num_examples = len({each.example_id for each in trajectories})
    result.num_samples = num_samples
    result.num_correct = sum(is_correct(each.reward) for each in graded)
    result.num_errors = len(trajectories) - len(graded)
    result.num_truncated = sum(each.is_truncated for each in graded)
    result.time_seconds = round(time_seconds, 3)
    result.standard_error = standard_error(list(example_scores(graded).values()))
    if num_samples > 1:
        result.pass_at_k = _pass_at_k(graded, num_samples)
    return result


def _pass_at_k(graded: list[StoredTrajectory], num_samples: int) -> dict[int, float]:
    """Return the mean of pass@k for k = 1, 2, 4, ... and n, over examples without an error."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for found in graded:
        verdicts[found.example_id].append(is_correct(found.reward))
    counts = [sum(found) for found in verdicts.values() if len(found) == num_samples]
    if not counts:
        return {}
    ks = [2**power for power in range(num_samples.bit_length()) if 2**power < num_samples]
    return {
        k: sum(pass_at_k(num_samples, correct, k) for correct in counts) / len(counts)
        for k in [*ks, num_samples]
    }


def write_result(save_dir: str, result: BenchmarkResult) -> None:
    """Write a result to its benchmark's folder and to the summary."""
    folder = Path(save_dir).expanduser()
    record = result.to_dict()
    write_atomically(folder / result.name / RESULT_FILE, json.dumps(record, indent=2) + "\n")
    summary = load_summary(save_dir) | {result.name: record}
    write_atomically(folder / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataFormatError(f"{path}: not JSON ({error}); run the benchmark again.") from error
