"""Supervised fine-tuning: the loop.

Batches are submitted ahead of their results, so the service never waits for the client. Every
request of a run is executed in the order of its submission; evaluations and checkpoints stand in
that queue too, which is why a resumed run repeats an unbroken one exactly.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chz

from tinker_cookbook import checkpoint_utils, service
from tinker_cookbook.eval.evaluators import Evaluator, EvaluatorBuilder, SamplingClientEvaluator
from tinker_cookbook.exceptions import ConfigurationError, TrainingError
from tinker_cookbook.runs.directory import open_log_dir
from tinker_cookbook.runs.options import (
    CheckpointOptions,
    ModelOptions,
    OptimizerOptions,
    TrackingOptions,
    check_options,
    expand_path,
)
from tinker_cookbook.runs.report import report_complete
from tinker_cookbook.runs.training_client import (
    TrainingRun,
    adam_params,
    add_service_metrics,
    build_checkpoint_manager,
    create_training_client,
    open_loggers,
    open_service_client,
    report_saved,
    service_message,
    snapshot_weights,
)
from tinker_cookbook.supervised.schedule import Schedule
from tinker_cookbook.supervised.types import SupervisedDataset, SupervisedDatasetBuilder
from tinker_cookbook.utils import trace
from tinker_cookbook.utils.lr_scheduling import compute_schedule_lr_multiplier
from tinker_cookbook.utils.progress import ProgressReporter

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.checkpoint_utils import CheckpointRecord
    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["Config", "RunOptions", "RunResult", "Schedule", "SubmittedBatch", "main", "run_evals"]

logger = logging.getLogger(__name__)


@chz.chz
class RunOptions(TrackingOptions, CheckpointOptions, OptimizerOptions, ModelOptions):
    """Supervised training; a recipe's config adds its own settings."""

    num_epochs: int = chz.field(default=1, doc="Number of passes over the data.")
    gradient_accumulation: int = chz.field(
        default=1, doc="Number of batches whose gradients are summed for one optimizer step."
    )
    submit_ahead: int = chz.field(
        default=1, doc="Number of steps submitted before the result of the current one is awaited."
    )

    @chz.validate
    def _check(self) -> None:
        check_options(self)


@chz.chz
class Config(RunOptions):
    """All settings of the supervised loop."""

    # The type is narrower than in the options. This is safe, since chz objects never change.
    log_path: str = chz.field(munger=expand_path, doc="Run directory.")  # pyright: ignore[reportIncompatibleVariableOverride]
    model_name: str = chz.field(doc="Base model to train, as a name or a folder.")  # pyright: ignore[reportIncompatibleVariableOverride]
    recipe_name: str = chz.field(default="supervised", doc="Name recorded with the session.")
    dataset_builder: SupervisedDatasetBuilder = chz.field(
        doc="Builder of the training and held-out data."
    )
    evaluator_builders: list[EvaluatorBuilder] = chz.field(
        default_factory=list, doc="Builders of evaluators that run every eval_every steps."
    )
    infrequent_evaluator_builders: list[EvaluatorBuilder] = chz.field(
        default_factory=list,
        doc="Builders of evaluators that run every infrequent_eval_every steps.",
    )


@dataclass(frozen=True)
class RunResult:
    """Where a finished run left its weights, and its last held-out numbers."""

    log_path: str
    model_name: str
    state_path: str
    sampler_path: str
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the final evaluation; empty if the run had been complete before."""


@dataclass
class SubmittedBatch:
    """One step on its way."""

    step: int
    data: list[tinker.Datum]
    fwd_bwd_futures: list[Any]
    optim_step_future: Any
    metrics: dict[str, Any]
    window: trace.IterationWindow
    finish_checkpoint: Callable[[], Any] | None = None


async def run_evals(
    evaluators: list[Evaluator], training_client: tinker.TrainingClient, step: int
) -> dict[str, float]:
    """Run evaluators one after the other on the weights as they are now.

    Args:
        evaluators: Those that sample share one snapshot of the weights.
        training_client: The run.
        step: Optimizer steps done so far.

    Returns:
        All metrics in one dict.
    """
    metrics: dict[str, float] = {}
    sampling_client = None
    for evaluator in evaluators:
        if isinstance(evaluator, SamplingClientEvaluator):
            if sampling_client is None:
                sampling_client = await snapshot_weights(training_client)
            metrics |= await evaluator(sampling_client)
        else:
            metrics |= await evaluator(training_client)
    logger.info("evaluation after %d steps: %s", step, metrics)
    return metrics


async def main(config: Config) -> RunResult:
    """Train, evaluate and save; the same config again resumes an interrupted run.

    Returns:
        Where the weights are.

    Raises:
        ConfigurationError: if a setting, the service or the old run directory forbids the run.
        DataError: if the data cannot be used.
        TrainingError: if the run cannot go on; it can be resumed from its last checkpoint.
    """
    with open_log_dir(config.log_path, config.behavior_if_log_dir_exists, config):
        return await _connect_and_run(config)


async def _connect_and_run(config: Config) -> RunResult:
    choice = service.choose_service(config.base_url)
    print(f"{choice.describe(config.model_name)}\nrun      {config.log_path}", flush=True)
    with service.connect(config.base_url, config.model_name) as connection:
        config = chz.replace(config, model_name=connection.model_name)
        dataset, test_dataset = config.dataset_builder()
        try:
            return await _run(config, connection, dataset, test_dataset)
        finally:
            for opened in filter(None, (dataset, test_dataset)):
                opened.close()


async def _run(
    config: Config,
    connection: service.Connection,
    dataset: SupervisedDataset,
    test_dataset: SupervisedDataset | None,
) -> RunResult:
    schedule = _build_schedule(config, len(dataset))
    for line in dataset.summary:
        print(f"data     {line}", flush=True)
    checkpoint = checkpoint_utils.get_last_checkpoint(config.log_path)
    start_step = 0 if checkpoint is None else schedule.step_of(checkpoint)
    if checkpoint is not None and start_step >= schedule.total_steps:
        return _already_complete(config, checkpoint)
    if checkpoint is not None:
        _check_same_data(config, checkpoint, dataset)
    from tinker_cookbook import tokenizer_utils

    tokenizer = tokenizer_utils.get_tokenizer(config.model_name)
    renderer_name = _renderer_name(config)
    with open_loggers(config, start_step) as metrics:
        async with open_service_client(connection, config, config.recipe_name) as service_client:
            training_client = await create_training_client(
                service_client, config, checkpoint, renderer_name=renderer_name
            )
            run = TrainingRun(service_client, training_client, metrics)
            loop = _Loop(config, run, schedule, dataset, tokenizer)
            loop.add_held_out(test_dataset)
            result = await loop.train(start_step, checkpoint)
            await report_saved(service_client, config.log_path)
            return result


class _Loop:
    """The state of a run between its first and last step."""

    def __init__(
        self,
        config: Config,
        run: TrainingRun,
        schedule: Schedule,
        dataset: SupervisedDataset,
        tokenizer: Tokenizer,
    ) -> None:
        self._config = config
        self._run = run
        self._schedule = schedule
        self._dataset = dataset
        self._tokenizer = tokenizer
        self._evaluators = [build() for build in config.evaluator_builders]
        self._infrequent = [build() for build in config.infrequent_evaluator_builders]
        self._checkpoints = build_checkpoint_manager(config, run)
        self._epoch = -1
        self._introduced = False
        self._elapsed_tokens = 0
        self._last_finish = time.perf_counter()

    def add_held_out(self, test_dataset: SupervisedDataset | None) -> None:
        """Measure the loss on held-out data too."""
        if test_dataset is None or len(test_dataset) == 0 or not self._config.eval_every:
            return
        from tinker_cookbook.supervised.nll_evaluator import NLLEvaluator

        held_out = NLLEvaluator.from_dataset(test_dataset, "test", self._tokenizer)
        self._evaluators.insert(0, held_out)

    async def train(self, start_step: int, checkpoint: CheckpointRecord | None) -> RunResult:
        """Do the steps from `start_step` on, then evaluate and save."""
        total = self._schedule.total_steps
        if checkpoint is not None:
            self._elapsed_tokens = int(checkpoint.get("elapsed_tokens", 0))
            self._checkpoints.restore_last_saved_tokens(self._elapsed_tokens)
            print(f"resumed  after step {start_step} of {total}", flush=True)
        self._progress = ProgressReporter(total, start_step)
        in_flight: deque[SubmittedBatch] = deque()
        try:
            for step in range(start_step, total):
                in_flight.append(await self._submit(step))
                while len(in_flight) > self._config.submit_ahead:
                    await self._finish(in_flight.popleft())
            while in_flight:
                await self._finish(in_flight.popleft())
        finally:
            self._progress.close()
        return await self._end()

    async def _submit(self, step: int) -> SubmittedBatch:
        """Queue evaluation, gradients, optimizer step and checkpoint of one step."""

        client = self._run.training_client
        with trace.trace_iteration(step) as window:
            batches = await self._load_batches(step)
            self._introduce(batches[0][0])
            evaluated = await self._evaluate(step)
            learning_rate = self._learning_rate(step)
            gradients = [client.forward_backward(batch, "cross_entropy") for batch in batches]
            optimizer = client.optim_step(adam_params(self._config, learning_rate))
        data = [datum for batch in batches for datum in batch]
        self._elapsed_tokens += _num_tokens(data)
        saving = None
        if step + 1 < self._schedule.total_steps:
            # Directly behind the optimizer step, so that it holds exactly the steps up to this one.
            saving = self._checkpoints.submit_due(
                step + 1, self._loop_state(step + 1), elapsed_tokens=self._elapsed_tokens
            )
        epoch, _ = self._schedule.position(step)
        metrics = {
            "epoch": epoch,
            "progress": step / self._schedule.total_steps,
            "learning_rate": learning_rate,
            "tokens/elapsed": self._elapsed_tokens,
            **evaluated,
        }
        return SubmittedBatch(step, data, gradients, optimizer, metrics, window, saving)

    async def _finish(self, batch: SubmittedBatch) -> None:
        """Wait for a step, write its row, then the record of its checkpoint."""
        with trace.trace_iteration(batch.step, window=batch.window):
            outputs = await self._await_step(batch)
        logprobs = [output["logprobs"] for output in outputs]
        metrics = self._batch_metrics(batch, logprobs)
        window = batch.window
        self._write_spans(window, batch.step)
        now = time.perf_counter()
        seconds, self._last_finish = now - self._last_finish, now
        timing = {"time/step": seconds, "time/tokens_per_second": metrics["num_tokens"] / seconds}
        self._run.metrics.log_metrics(
            metrics | window.get_timing_metrics() | timing, step=batch.step
        )
        self._progress.step(metrics)
        if batch.finish_checkpoint is not None:
            await batch.finish_checkpoint()

    def _write_spans(self, window: trace.IterationWindow, step: int) -> None:
        folder, every = Path(self._config.log_path), self._config.span_chart_every
        window.write_spans_jsonl(folder / "timing_spans.jsonl", step)
        if every and step % every == 0:
            chart = folder / f"iteration_{step:06d}" / "timing_gantt.html"
            trace.save_gantt_chart_html(window, step, chart)

    async def _await_step(self, batch: SubmittedBatch) -> list[Any]:
        """The loss outputs of a step's datums, once its optimizer step is done too."""
        import tinker

        outputs = []
        try:
            async with trace.scope_span("forward_backward"):
                for future in batch.fwd_bwd_futures:
                    result = await future
                    outputs.extend(result.loss_fn_outputs)
                    add_service_metrics(batch.metrics, result.metrics)
            async with trace.scope_span("optim_step"):
                add_service_metrics(batch.metrics, (await batch.optim_step_future).metrics)
        except (tinker.TinkerError, ValueError) as error:
            raise self._failed_step(batch.step, error) from error
        return outputs

    def _failed_step(self, step: int, error: Exception) -> TrainingError:
        text = service_message(error)
        if "nan" in text.lower():
            return self._diverged(step, text)
        return TrainingError(
            f"step {step} failed on the service: {text} The same command resumes from the last "
            "checkpoint."
        )

    def _diverged(self, step: int, text: str) -> TrainingError:
        return TrainingError(
            f"step {step}: the run has diverged ({text}); lower "
            f"learning_rate={self._config.learning_rate} or set grad_clip_norm, and start anew."
        )

    def _batch_metrics(self, batch: SubmittedBatch, logprobs: list[Any]) -> dict[str, Any]:
        from tinker_cookbook.supervised.nll_evaluator import nll_metrics

        loss = nll_metrics(logprobs, batch.data, self._tokenizer, prefix="train_mean_")
        num_loss_tokens = _num_loss_tokens(batch.data)
        if num_loss_tokens and not math.isfinite(loss["train_mean_nll"]):
            raise self._diverged(batch.step, f"train_mean_nll={loss['train_mean_nll']}")
        counts = {
            "num_sequences": len(batch.data),
            "num_tokens": _num_tokens(batch.data),
            "num_loss_tokens": num_loss_tokens,
        }
        return batch.metrics | counts | loss

    async def _evaluate(self, step: int) -> dict[str, float]:
        """The metrics of the evaluators that are due before `step`."""
        last = step == self._schedule.total_steps
        due: list[Evaluator] = []
        for evaluators, every in (
            (self._evaluators, self._config.eval_every),
            (self._infrequent, self._config.infrequent_eval_every),
        ):
            if every and (last or step % every == 0):
                due += evaluators
        if not due:
            return {}
        if step == 0:
            self._progress.message("evaluating the model as it is ...")
        async with trace.scope_span("evals"):
            return await run_evals(due, self._run.training_client, step)

    async def _load_batches(self, step: int) -> list[list[tinker.Datum]]:
        epoch, _ = self._schedule.position(step)
        with trace.scope_span_sync("get_batch"):
            if epoch != self._epoch:
                self._dataset.set_epoch(seed=_epoch_seed(self._config.seed, epoch))
                self._epoch = epoch
            indices = self._schedule.batches(step)
            return [await asyncio.to_thread(self._dataset.get_batch, index) for index in indices]

    async def _end(self) -> RunResult:
        """Evaluate, write that row, and save; in this order, so that a crash loses nothing."""
        total = self._schedule.total_steps
        with trace.trace_iteration(total) as window:
            evaluated = await self._evaluate(total)
        if evaluated:
            row = {"tokens/elapsed": self._elapsed_tokens, **evaluated}
            self._run.metrics.log_metrics(row | window.get_timing_metrics(), step=total)
        paths = await self._checkpoints.save_final_async(self._loop_state(total))
        return RunResult(
            self._config.log_path,
            self._config.model_name,
            paths["state_path"],
            paths["sampler_path"],
            evaluated,
        )

    def _learning_rate(self, step: int) -> float:
        return self._config.learning_rate * compute_schedule_lr_multiplier(
            self._config.lr_schedule,
            step,
            self._schedule.total_steps,
            warmup_steps=self._config.warmup_steps,
        )

    def _loop_state(self, next_step: int) -> dict[str, Any]:
        epoch, batch = self._schedule.position(next_step)
        if next_step == self._schedule.total_steps:
            epoch, batch = self._config.num_epochs, 0
        state = {"epoch": epoch, "batch": batch, "elapsed_tokens": self._elapsed_tokens}
        fingerprint = self._dataset.fingerprint
        return state if fingerprint is None else state | {"data_fingerprint": fingerprint}

    def _introduce(self, datum: tinker.Datum) -> None:
        """Show the first example before the first wait."""
        if self._introduced:
            return
        self._introduced = True
        from tinker_cookbook.display import describe_example

        self._progress.message(describe_example(datum, self._tokenizer))


def _build_schedule(config: Config, num_batches: int) -> Schedule:
    schedule = Schedule(
        num_batches, config.num_epochs, config.gradient_accumulation, config.max_steps
    )
    if schedule.total_steps == 0:
        raise ConfigurationError(
            f"the data makes {num_batches} batches, which is no optimizer step; use a smaller "
            "batch_size, or more data."
        )
    return schedule


def _already_complete(config: Config, checkpoint: CheckpointRecord) -> RunResult:
    report_complete(config.log_path)
    return RunResult(
        config.log_path,
        config.model_name,
        checkpoint.state_path or "",
        checkpoint.sampler_path or "",
    )


def _check_same_data(
    config: Config, checkpoint: CheckpointRecord, dataset: SupervisedDataset
) -> None:
    """Other data would make other batches: the steps done could be repeated, or rows left out."""
    before, now = checkpoint.get("data_fingerprint", None), dataset.fingerprint
    if before is None or now is None or before == now:
        return
    difference = f"the data has changed since {config.log_path} was begun ({before} -> {now})"
    if config.behavior_if_log_dir_exists == "resume":
        logger.warning("%s; the run goes on with the new data, as asked", difference)
        return
    raise ConfigurationError(
        f"{difference}; its batches would not be those of the interrupted run. Restore the data, "
        "or go on with it anyway (behavior_if_log_dir_exists=resume), or train anew "
        "(behavior_if_log_dir_exists=delete)."
    )


def _renderer_name(config: Config) -> str | None:
    common = getattr(config.dataset_builder, "common_config", None)
    return config.renderer_name or getattr(common, "renderer_name", None)


def _epoch_seed(seed: int, epoch: int) -> int:
    """Seed 0 gives the epoch itself; other seeds give series that do not meet it."""
    return (seed * 1_000_003 + epoch) % 2**32


def _num_tokens(data: list[tinker.Datum]) -> int:
    return sum(datum.model_input.length for datum in data)


def _num_loss_tokens(data: list[tinker.Datum]) -> int:
    return sum(int((datum.loss_fn_inputs["weights"].to_numpy() != 0).sum()) for datum in data)
