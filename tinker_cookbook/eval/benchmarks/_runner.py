"""Run benchmarks: many examples at a time, resumed by example, with every reply stored."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.eval.benchmarks._example import Example, Outcome, run_example
from tinker_cookbook.eval.benchmarks._registry import find_benchmark
from tinker_cookbook.eval.benchmarks._results import (
    TRAJECTORIES_FILE,
    load_result,
    load_summary,
    load_trajectories,
    print_trajectory,
    regrade_trajectories,
    summarize,
    write_result,
)
from tinker_cookbook.eval.benchmarks._settings import collect_settings, open_folder
from tinker_cookbook.eval.benchmarks._types import (
    BenchmarkBuilder,
    BenchmarkConfig,
    BenchmarkResult,
    ScoringEnv,
    StoredTrajectory,
)
from tinker_cookbook.eval.endpoint import EndpointClient
from tinker_cookbook.exceptions import ConfigurationError, DataValidationError, EvalError
from tinker_cookbook.utils.jsonl_log import append_row, keep_rows

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers.base import Renderer

__all__ = [
    "load_result",
    "load_summary",
    "load_trajectories",
    "print_trajectory",
    "regrade_trajectories",
    "run_benchmark",
    "run_benchmarks",
]

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 15.0


async def run_benchmark(
    benchmark: BenchmarkBuilder | str,
    sampling_client: tinker.SamplingClient | EndpointClient,
    renderer: Renderer,
    config: BenchmarkConfig | None = None,
) -> BenchmarkResult:
    """Run a benchmark, or the rest of one whose replies are partly stored.

    Args:
        benchmark: A benchmark, or the name of a registered one.
        sampling_client: The model.
        renderer: Its chat format; `endpoint_format()` for an `EndpointClient`.
        config: Limits, sampling settings, and the folder in which everything is saved.

    Raises:
        ConfigurationError: if `save_dir` holds replies of other settings or prompts.
        DataError: if the benchmark's data cannot be found.
        EvalError: if not a single example could be graded; the message has the first reason.
    """
    config = config or BenchmarkConfig()
    found = find_benchmark(benchmark) if isinstance(benchmark, str) else benchmark
    run = _Run(found, sampling_client, renderer, config)
    started = time.monotonic()
    await run.open()
    await run.run_all()
    result = summarize(
        found,
        run.trajectories(),
        num_samples=run.num_samples,
        time_seconds=time.monotonic() - started,
    )
    if config.save_dir is not None:
        write_result(config.save_dir, result)
    run.refuse_only_errors()
    return result


async def run_benchmarks(
    names: list[str],
    sampling_client: tinker.SamplingClient | EndpointClient,
    renderer: Renderer,
    config: BenchmarkConfig | None = None,
    parallel: bool = True,
) -> dict[str, BenchmarkResult]:
    """Run several benchmarks and return their results by name.

    With `parallel`, they run at the same time, each with its own limit of concurrent examples.
    """
    for name in names:
        find_benchmark(name)
    runs = [run_benchmark(name, sampling_client, renderer, config) for name in names]
    if parallel:
        results = await asyncio.gather(*runs)
    else:
        results = [await run for run in runs]
    return dict(zip(names, results, strict=True))


@dataclass
class _Run:
    benchmark: BenchmarkBuilder
    client: tinker.SamplingClient | EndpointClient
    renderer: Renderer
    config: BenchmarkConfig
    folder: Path | None = None
    num_samples: int = 1
    _ids: list[str] = field(default_factory=list)
    _done: dict[str, list[StoredTrajectory]] = field(default_factory=dict)
    """Trajectories by example, of examples that are in the data now."""
    _shown: float = field(default_factory=time.monotonic)

    async def open(self) -> None:
        """Make the examples, and find out which of them are done."""
        examples = await self._make_examples()
        self._ids = [each.example_id for each in examples]
        if self.config.save_dir is None:
            return
        self.folder = Path(self.config.save_dir).expanduser() / self.benchmark.name
        settings = await collect_settings(self.benchmark, self.client, self.renderer, self.config)
        open_folder(self.folder, settings, self.config)
        self._take_stored(examples, self.config.save_dir, self.folder)

    def _take_stored(self, examples: list[Example], save_dir: str, folder: Path) -> None:
        stored = defaultdict(list)
        for found in load_trajectories(save_dir, self.benchmark.name):
            if found.error is None:
                stored[found.example_id].append(found)
        for example in examples:
            rows = stored[example.example_id]
            if len(rows) == self.num_samples:
                self._check_prompt(example, rows[0])
                self._done[example.example_id] = rows
        # Errors and incomplete examples of this data are run again.
        again = set(self._ids) - self._done.keys()
        keep_rows(folder / TRAJECTORIES_FILE, lambda row: row["example_id"] not in again)
        if self._done:
            logger.info(
                "%s: %d of %d examples are already in %s",
                self.benchmark.name,
                len(self._done),
                len(examples),
                folder,
            )

    def _check_prompt(self, example: Example, stored: StoredTrajectory) -> None:
        if stored.prompt_key == example.prompt_key:
            return
        raise ConfigurationError(
            f"{self.folder} holds replies to other prompts: example {example.example_id} has "
            "changed. Use another save_dir, or delete that folder."
        )

    async def run_all(self) -> None:
        """Run the examples that are not done; failures of the service or in time again."""
        pending = [name for name in self._ids if name not in self._done]
        pause = self.config.retry_pause_seconds
        for attempt in range(1, self.config.max_attempts + 1):
            if not pending:
                return
            if attempt > 1:
                logger.warning(
                    "%s: attempt %d at %d examples", self.benchmark.name, attempt, len(pending)
                )
                await asyncio.sleep(pause)
                pause *= 2
            pending = await self._attempt(set(pending), last=attempt == self.config.max_attempts)

    async def _attempt(self, names: set[str], *, last: bool) -> list[str]:
        """Run some examples; return those that are worth another attempt."""
        examples = [each for each in await self._make_examples() if each.example_id in names]
        width = self.config.concurrency
        if self.benchmark.multi_turn:
            width = min(width, self.config.agent_concurrency)
        limit = asyncio.Semaphore(width)

        async def run(example: Example) -> str | None:
            async with limit:
                outcomes = await run_example(example, self.client, self.renderer, self.config)
            if not last and any(each.may_retry for each in outcomes):
                return example.example_id
            self._store(example, outcomes)
            return None

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(run(example)) for example in examples]
        except ExceptionGroup as errors:  # such as a full disk; the other tasks are cancelled
            raise errors.exceptions[0] from errors
        return [name for task in tasks if (name := task.result()) is not None]

    def _store(self, example: Example, outcomes: list[Outcome]) -> None:
        found = [each.trajectory for each in outcomes]
        self._done[example.example_id] = found
        if self.folder is not None:
            for each in found:
                append_row(self.folder / TRAJECTORIES_FILE, dict(each.to_dict()))
        if time.monotonic() - self._shown > _PROGRESS_SECONDS:
            self._shown = time.monotonic()
            logger.info("%s: %d of %d", self.benchmark.name, len(self._done), len(self._ids))

    def trajectories(self) -> list[StoredTrajectory]:
        """Return the trajectories of all examples, in order."""
        return [found for name in self._ids for found in self._done[name]]

    def refuse_only_errors(self) -> None:
        """Raise an error if there is nothing to take a score from."""
        errors = [found.error for found in self.trajectories()]
        if errors and all(errors):
            raise EvalError(
                f"{self.benchmark.name}: none of {len(errors)} replies has a grade; the first "
                f"reason: {errors[0]}"
            )

    async def _make_examples(self) -> list[Example]:
        """Return the examples, each with new environments."""
        first = await asyncio.to_thread(self.benchmark.make_envs, self.renderer, self.config)
        columns = [list(first)[: self.config.max_examples]]
        if not columns[0]:
            raise DataValidationError(f"benchmark={self.benchmark.name} has no examples.")
        scores = isinstance(columns[0][0], ScoringEnv)
        self.num_samples = 1 if scores else self.config.num_samples
        for _ in range(self.num_samples - 1):
            more = self.benchmark.make_envs(self.renderer, self.config)
            columns.append(list(more)[: self.config.max_examples])
        examples = []
        for index, envs in enumerate(zip(*columns, strict=True)):
            name = _named(envs[0], "example_id") or f"{self.benchmark.name}-{index}"
            key = _named(envs[0], "prompt_key")
            examples.append(Example(index, self.benchmark.name, name, key, envs))
        _check_unique(examples)
        return examples


def _named(env: object, attribute: str) -> str:
    """Return an attribute of an environment, or of the message environment in it, or ''."""
    for holder in (env, getattr(env, "message_env", None)):
        value = getattr(holder, attribute, "")
        if value:
            return str(value)
    return ""


def _check_unique(examples: list[Example]) -> None:
    seen: set[str] = set()
    for example in examples:
        if example.example_id in seen:
            raise DataValidationError(
                f"example_id={example.example_id!r} occurs twice in {example.benchmark}; every "
                "example needs its own."
            )
        seen.add(example.example_id)
