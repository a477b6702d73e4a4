"""Supervised fine-tuning: the loop.

Batches are submitted ahead of their results, so that the service never waits for the client. The
service executes the requests of a run in the order of their submission. Evaluations and
checkpoints are requests in that queue too, so a resumed run repeats an uninterrupted one exactly.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import chz

from tinker_cookbook.eval.evaluators import Evaluator, EvaluatorBuilder, SamplingClientEvaluator
from tinker_cookbook.exceptions import ConfigurationError, TrainingError
from tinker_cookbook.runs.best_checkpoint import BestWeights
from tinker_cookbook.runs.checkpoint_manager import FinishSave
from tinker_cookbook.runs.open_run import Run, RunResult, open_run
from tinker_cookbook.runs.options import SharedOptions, check_options, expand_path
from tinker_cookbook.runs.training_client import add_service_metrics, failed_step, snapshot_weights
from tinker_cookbook.runs.workload import Workload
from tinker_cookbook.supervised.schedule import Schedule, epoch_seed
from tinker_cookbook.supervised.types import SupervisedDataset, SupervisedDatasetBuilder
from tinker_cookbook.supervised.work import count_batches, num_loss_tokens, num_tokens
from tinker_cookbook.utils import trace
from tinker_cookbook.utils.sdk_compat import service_message

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = [
    "Config",
    "RunOptions",
    "RunResult",
    "Schedule",
    "SubmittedBatch",
    "count_work",
    "main",
    "run_evals",
]

logger = logging.getLogger(__name__)


@chz.chz
class RunOptions(SharedOptions):
    """Supervised training; a recipe's config adds its own settings."""

    num_epochs: int = chz.field(default=1, doc="Number of passes over the data.")
    gradient_accumulation: int = chz.field(
        default=1, doc="Number of batches whose gradients are summed for one optimizer step."
    )
    best_metric: str | None = chz.field(
        default=None,
        doc="Name of the metric, such as test/nll, whose best value marks the best checkpoint; the "
        "lowest value of a loss is best, the highest of anything else. None: none is marked.",
    )
    early_stopping_evals: int = chz.field(
        default=0,
        doc="Number of evaluations without a better best_metric after which the run stops; 0: it "
        "does not stop early.",
    )
    submit_ahead: int = chz.field(
        default=1, doc="Number of steps submitted before the result of the current one is awaited."
    )

    @chz.validate
    def _check(self) -> None:
        check_options(self)
        if self.early_stopping_evals and self.best_metric is None:
            raise ConfigurationError(
                f"early_stopping_evals={self.early_stopping_evals} needs a metric to judge by; set "
                "best_metric=test/nll."
            )


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


@dataclass
class SubmittedBatch:
    """A step whose requests are in the queue of the service."""

    step: int
    data: list[tinker.Datum]
    fwd_bwd_futures: list[tinker.APIFuture[tinker.ForwardBackwardOutput]]
    optim_step_future: tinker.APIFuture[tinker.OptimStepResponse]
    metrics: dict[str, Any]
    window: trace.IterationWindow
    finish_checkpoint: FinishSave | None = None


def due_evaluators(
    step: int, total_steps: int, *groups: tuple[list[Evaluator], int]
) -> list[Evaluator]:
    """Return the evaluators that run before a step.

    Args:
        step: Number of optimizer steps done so far.
        total_steps: Optimizer steps of the whole run; at its end every group is due.
        groups: Evaluators, each group with the steps between its evaluations; 0: never.
    """
    last = step == total_steps
    return [
        evaluator
        for evaluators, every in groups
        if every and (last or step % every == 0)
        for evaluator in evaluators
    ]


async def run_evals(
    evaluators: list[Evaluator], training_client: tinker.TrainingClient, step: int
) -> dict[str, float]:
    """Run evaluators in sequence on the current weights.

    Args:
        evaluators: Those that sample share one snapshot of the weights.
        training_client: The training client of the run.
        step: Number of optimizer steps done so far.

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
        TrainingError: if the run cannot continue; it can be resumed from its last checkpoint.
    """
    async with open_run(config, config.recipe_name) as run:
        with _open_data(config) as (dataset, test_dataset):
            schedule = _build_schedule(config, len(dataset))
            for line in dataset.summary:
                print(f"data     {line}", flush=True)
            has_begun = await run.begin(
                schedule.total_steps,
                step_of=schedule.step_of,
                data_fingerprint=dataset.fingerprint,
                renderer_name=_renderer_name(config),
            )
            if not has_begun:
                return run.result()
            loop = _Loop(run, schedule, dataset)
            loop.add_held_out(test_dataset)
            return await loop.train()


def count_work(config: Config) -> Workload:
    """Render every batch of a run, without a service, and count its rows and tokens.

    Raises:
        DataError: if the data cannot be used.
    """
    with _open_data(config) as (dataset, _):
        schedule = _build_schedule(config, len(dataset))
        return count_batches(dataset, schedule, seed=config.seed, model_name=str(config.model_name))


@contextlib.contextmanager
def _open_data(config: Config) -> Iterator[tuple[SupervisedDataset, SupervisedDataset | None]]:
    """Open the training and the held-out data, and close them at the end of the block."""
    dataset, test_dataset = config.dataset_builder()
    try:
        yield dataset, test_dataset
    finally:
        for opened in filter(None, (dataset, test_dataset)):
            opened.close()


class _Loop:
    """The state of a run between its first and last step."""

    def __init__(self, run: Run[Config], schedule: Schedule, dataset: SupervisedDataset) -> None:
        from tinker_cookbook import tokenizer_utils

        config = run.config
        self._config = config
        self._run = run
        self._schedule = schedule
        self._dataset = dataset
        self._tokenizer: Tokenizer = tokenizer_utils.get_tokenizer(config.model_name)
        self._evaluators = [build() for build in config.evaluator_builders]
        self._infrequent = [build() for build in config.infrequent_evaluator_builders]
        self._best = BestWeights(run, config.best_metric, patience=config.early_stopping_evals)
        self._epoch = -1
        self._introduced = False
        self._total_steps = run.total_steps
        """Fewer than planned if the run stops early."""
        self._elapsed_tokens = 0
        if run.checkpoint is not None:
            self._elapsed_tokens = int(run.checkpoint.get("elapsed_tokens", 0))
            run.checkpoints.restore_last_saved_tokens(self._elapsed_tokens)

    def add_held_out(self, test_dataset: SupervisedDataset | None) -> None:
        """Evaluate the loss on held-out data too."""
        if test_dataset is None or len(test_dataset) == 0 or not self._config.eval_every:
            return
        from tinker_cookbook.supervised.nll_evaluator import NLLEvaluator

        held_out = NLLEvaluator.from_dataset(test_dataset, "test", self._tokenizer)
        self._evaluators.insert(0, held_out)

    async def train(self) -> RunResult:
        """Do the remaining steps, then evaluate and save."""
        in_flight: deque[SubmittedBatch] = deque()
        for step in range(self._run.start_step, self._run.total_steps):
            submitted = await self._submit(step)
            if submitted is None:
                self._total_steps = step
                break
            in_flight.append(submitted)
            while len(in_flight) > self._config.submit_ahead:
                await self._finish(in_flight.popleft())
        while in_flight:
            await self._finish(in_flight.popleft())
        return await self._end()

    async def _submit(self, step: int) -> SubmittedBatch | None:
        """Queue the evaluation, gradients, optimizer step and checkpoint of one step.

        Returns None, without a request, if the evaluation ends the run.
        """
        run = self._run
        client = run.training_client
        with trace.trace_iteration(step) as window:
            batches = await self._load_batches(step)
            self._introduce(batches[0][0])
            evaluated = await self._evaluate(step)
            if self._best.is_exhausted:
                run.progress.message(self._best.describe())
                return None
            gradients = [client.forward_backward(batch, "cross_entropy") for batch in batches]
            optimizer = client.optim_step(run.adam_params(step))
        data = [datum for batch in batches for datum in batch]
        self._elapsed_tokens += num_tokens(data)
        # Directly behind the optimizer step, so that it contains exactly the steps up to this one.
        saving = run.submit_checkpoint(
            self._loop_state(step + 1), steps_done=step + 1, elapsed_tokens=self._elapsed_tokens
        )
        epoch, _ = self._schedule.position(step)
        metrics = {
            "epoch": epoch,
            "progress": step / run.total_steps,
            "learning_rate": run.learning_rate(step),
            "tokens/elapsed": self._elapsed_tokens,
            **evaluated,
        }
        return SubmittedBatch(step, data, gradients, optimizer, metrics, window, saving)

    async def _finish(self, batch: SubmittedBatch) -> None:
        """Wait for a step, write its row, then the record of its checkpoint."""
        with trace.trace_iteration(batch.step, window=batch.window):
            logprobs = await self._await_step(batch)
        metrics = self._batch_metrics(batch, logprobs)
        await self._run.finish_step(batch.step, metrics, batch.window, batch.finish_checkpoint)

    async def _await_step(self, batch: SubmittedBatch) -> list[tinker.TensorData]:
        """Wait for a step, including its optimizer step.

        Returns:
            The log probabilities of the target tokens, [N] per datum.
        """
        import tinker

        logprobs = []
        try:
            async with trace.scope_span("forward_backward"):
                for future in batch.fwd_bwd_futures:
                    result = await future
                    logprobs += [output["logprobs"] for output in result.loss_fn_outputs]
                    add_service_metrics(batch.metrics, result.metrics)
            async with trace.scope_span("optim_step"):
                add_service_metrics(batch.metrics, (await batch.optim_step_future).metrics)
        except (tinker.TinkerError, ValueError) as error:
            raise self._failed_step(batch.step, error) from error
        return logprobs

    def _failed_step(self, step: int, error: Exception) -> TrainingError:
        text = service_message(error)
        return self._diverged(step, text) if "nan" in text.lower() else failed_step(error, step)

    def _diverged(self, step: int, text: str) -> TrainingError:
        return TrainingError(
            f"step {step}: the run has diverged ({text}); lower "
            f"learning_rate={self._config.learning_rate} or set grad_clip_norm, and start over."
        )

    def _batch_metrics(
        self, batch: SubmittedBatch, logprobs: list[tinker.TensorData]
    ) -> dict[str, Any]:
        from tinker_cookbook.supervised.nll_evaluator import nll_metrics

        loss = nll_metrics(logprobs, batch.data, self._tokenizer, prefix="train_mean_")
        loss_tokens = num_loss_tokens(batch.data)
        if loss_tokens and not math.isfinite(loss["train_mean_nll"]):
            raise self._diverged(batch.step, f"train_mean_nll={loss['train_mean_nll']}")
        counts = {
            "num_sequences": len(batch.data),
            "num_tokens": num_tokens(batch.data),
            "num_loss_tokens": loss_tokens,
        }
        return batch.metrics | counts | loss

    async def _evaluate(self, step: int) -> dict[str, float]:
        """Run the evaluators that are due before `step`."""
        due = due_evaluators(
            step,
            self._total_steps,
            (self._evaluators, self._config.eval_every),
            (self._infrequent, self._config.infrequent_eval_every),
        )
        if not due:
            return {}
        if step == 0:
            self._run.progress.message("evaluating the model before training ...")
        async with trace.scope_span("evals"):
            metrics = await run_evals(due, self._run.training_client, step)
        await self._best.update(step, metrics)
        return metrics

    async def _load_batches(self, step: int) -> list[list[tinker.Datum]]:
        epoch, _ = self._schedule.position(step)
        with trace.scope_span_sync("get_batch"):
            if epoch != self._epoch:
                self._dataset.set_epoch(seed=epoch_seed(self._config.seed, epoch))
                self._epoch = epoch
            indices = self._schedule.batches(step)
            return [await asyncio.to_thread(self._dataset.get_batch, index) for index in indices]

    async def _end(self) -> RunResult:
        """Evaluate, write that row, and save; in this order, so that a crash loses nothing."""
        total = self._total_steps
        with trace.trace_iteration(total) as window:
            evaluated = await self._evaluate(total)
        if evaluated:
            row = {"tokens/elapsed": self._elapsed_tokens, **evaluated}
            self._run.write_row(total, row | window.get_timing_metrics())
        return await self._run.finish(self._loop_state(total), evaluated)

    def _loop_state(self, next_step: int) -> dict[str, int]:
        epoch, batch = self._schedule.position(next_step)
        if next_step == self._run.total_steps:
            epoch, batch = self._config.num_epochs, 0
        return {"epoch": epoch, "batch": batch, "elapsed_tokens": self._elapsed_tokens}

    def _introduce(self, datum: tinker.Datum) -> None:
        """Show the first example, before the first wait."""
        if self._introduced:
            return
        self._introduced = True
        from tinker_cookbook.display import describe_example

        self._run.progress.message(describe_example(datum, self._tokenizer))


def _build_schedule(config: Config, num_batches: int) -> Schedule:
    schedule = Schedule(
        num_batches, config.num_epochs, config.gradient_accumulation, config.max_steps
    )
    if schedule.total_steps == 0:
        raise ConfigurationError(
            f"the data makes {num_batches} batches, which is too few for one optimizer step; use "
            "a smaller batch_size, or more data."
        )
    return schedule


def _renderer_name(config: Config) -> str | None:
    common = getattr(config.dataset_builder, "common_config", None)
    return config.renderer_name or getattr(common, "renderer_name", None)
