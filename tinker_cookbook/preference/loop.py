"""The loop that every kind of preference training shares.

A step needs the log probabilities of a batch under the model in training and under the reference
model. The reference scores the next batch while the current one is trained (`reference`). What is
special to a kind of training, its batches and its gradient, is an `Objective`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import chz
import numpy as np

from tinker_cookbook.eval.evaluators import Evaluator, EvaluatorBuilder
from tinker_cookbook.exceptions import DataFormatError, TrainingError
from tinker_cookbook.preference.reference import ReferenceScorer
from tinker_cookbook.runs.open_run import Run, RunResult
from tinker_cookbook.runs.options import SharedOptions, check_options, expand_path
from tinker_cookbook.runs.training_client import failed_step
from tinker_cookbook.supervised.schedule import Schedule, epoch_seed
from tinker_cookbook.supervised.train import due_evaluators, run_evals
from tinker_cookbook.supervised.types import ChatDatasetBuilder, SupervisedDataset
from tinker_cookbook.utils import trace
from tinker_cookbook.utils.lr_scheduling import LRSchedule
from tinker_cookbook.utils.sdk_compat import create_client

if TYPE_CHECKING:
    import tinker

__all__ = [
    "Batch",
    "LoopConfig",
    "LoopOptions",
    "Objective",
    "PreferenceLoop",
    "SubmittedGradient",
    "build_schedule",
    "open_reference",
]


@chz.chz
class LoopOptions(SharedOptions):
    """The settings of every preference run."""

    learning_rate: float = 1e-5
    lr_schedule: LRSchedule = "linear"
    num_epochs: int = chz.field(default=1, doc="Number of passes over the data.")
    dpo_beta: float = chz.field(
        default=0.1, doc="Strength of the pull towards the reference model (beta of the loss)."
    )
    reference_model_name: str | None = chz.field(
        default=None,
        doc="Reference model: a base model, or the tinker:// path of saved weights; default: what "
        "the run starts from.",
    )

    @chz.validate
    def _check(self) -> None:
        check_options(self)


@chz.chz
class LoopConfig(LoopOptions):
    """Everything the loop needs."""

    # Narrower than in the options: a chz object never changes, so this is safe.
    log_path: str = chz.field(munger=expand_path, doc="Run directory.")  # pyright: ignore[reportIncompatibleVariableOverride]
    model_name: str = chz.field(doc="Base model; a name or a folder.")  # pyright: ignore[reportIncompatibleVariableOverride]
    recipe_name: str = chz.field(default="preference", doc="Recipe name, recorded by the service.")
    dataset_builder: ChatDatasetBuilder = chz.field(
        doc="Builder of the training and held-out data."
    )
    num_replicas: int = chz.field(default=8, doc="Accepted for older programs; not used.")
    evaluator_builders: list[EvaluatorBuilder] = chz.field(
        default_factory=list, doc="Evaluators that run every eval_every steps."
    )
    infrequent_evaluator_builders: list[EvaluatorBuilder] = chz.field(
        default_factory=list, doc="Evaluators that run every infrequent_eval_every steps."
    )


C = TypeVar("C", bound=LoopConfig)


@dataclass(frozen=True)
class Batch:
    """The datums of a step."""

    data: list[tinker.Datum]
    is_good_S: np.ndarray | None = None
    """Booleans, one per reply; None for pairs."""


@dataclass(frozen=True)
class SubmittedGradient:
    """A step whose gradient has been submitted."""

    gradients: Sequence[tinker.APIFuture[tinker.ForwardBackwardOutput]]
    """Await these before the step counts as done."""
    metrics: Mapping[str, float]
    """Metrics of the batch from before the step; `dpo_loss` is the mean loss."""


class Objective(Protocol):
    """What a kind of preference training does with a batch."""

    def load(self, dataset: SupervisedDataset, index: int) -> Batch:
        """Return batch `index` of the current epoch."""
        ...

    async def submit(
        self, client: tinker.TrainingClient, batch: Batch, reference: np.ndarray
    ) -> SubmittedGradient:
        """Submit the gradient of a batch.

        Args:
            client: The model in training.
            batch: The datums.
            reference: float64 [N], their sequence log probabilities under the reference model.
        """
        ...

    def watch(self, step: int, metrics: Mapping[str, float]) -> None:
        """Warn about metrics that show a problem."""
        ...


async def open_reference(run: Run[C]) -> ReferenceScorer:
    """Create the reference model: what the run started from, or the one that is named."""
    config, service = run.config, run.service_client
    named = config.reference_model_name or config.load_checkpoint_path
    if named is not None and named.startswith("tinker://"):
        client = await create_client(service.create_training_client_from_state, named)
    else:
        # A new adapter changes nothing, so this is the base model; its rank does not matter.
        client = await create_client(
            service.create_lora_training_client, named or config.model_name, rank=1
        )
    return ReferenceScorer(client, run.log_path, named or config.model_name)


def build_schedule(config: LoopConfig, dataset: SupervisedDataset) -> Schedule:
    """Return the steps of a run.

    Raises:
        DataFormatError: if the data do not fill one batch.
    """
    schedule = Schedule(len(dataset), config.num_epochs, 1, config.max_steps)
    if schedule.total_steps == 0:
        raise DataFormatError(
            "the data do not fill one batch; use more data or a smaller batch_size."
        )
    return schedule


class PreferenceLoop(Generic[C]):
    """The state of a run between its first and last step."""

    def __init__(
        self,
        run: Run[C],
        schedule: Schedule,
        dataset: SupervisedDataset,
        reference: ReferenceScorer,
        objective: Objective,
    ) -> None:
        config = run.config
        self._run = run
        self._config = config
        self._schedule = schedule
        self._dataset = dataset
        self._reference = reference
        self._objective = objective
        self._evaluators: list[Evaluator] = [build() for build in config.evaluator_builders]
        self._infrequent = [build() for build in config.infrequent_evaluator_builders]
        self._epoch = -1

    def add_held_out(self, evaluator: Evaluator) -> None:
        """Evaluate held-out data before the other evaluators."""
        self._evaluators.insert(0, evaluator)

    async def train(self) -> RunResult:
        """Do the remaining steps, then evaluate and save."""
        total = self._run.total_steps
        prepared = asyncio.create_task(self._prepare(self._run.start_step))
        try:
            for step in range(self._run.start_step, total):
                batch, scores = await prepared
                if step + 1 < total:
                    # Scored while this step is trained.
                    prepared = asyncio.create_task(self._prepare(step + 1))
                await self._step(step, batch, scores)
        finally:
            prepared.cancel()
        with trace.trace_iteration(total) as window:
            evaluated = await self._evaluate(total)
        if evaluated:
            self._run.write_row(total, evaluated | window.get_timing_metrics())
        return await self._run.finish(self._loop_state(total), evaluated)

    async def _prepare(self, step: int) -> tuple[Batch, np.ndarray]:
        """Return the datums of a step and their log probabilities under the reference."""
        epoch, index = self._schedule.position(step)
        if epoch != self._epoch:
            self._dataset.set_epoch(seed=epoch_seed(self._config.seed, epoch))
            self._epoch = epoch
        batch = await asyncio.to_thread(self._objective.load, self._dataset, index)
        return batch, await self._reference.score(batch.data)

    async def _step(self, step: int, batch: Batch, scores: np.ndarray) -> None:
        """Evaluate, submit one step, wait for it, and write its row."""
        import tinker

        run = self._run
        with trace.trace_iteration(step) as window:
            evaluated = await self._evaluate(step)
            try:
                submitted = await self._objective.submit(run.training_client, batch, scores)
                update = run.training_client.optim_step(run.adam_params(step))
                saving = run.submit_checkpoint(self._loop_state(step + 1), steps_done=step + 1)
                for gradient in submitted.gradients:
                    await gradient
                result = await update
            except (tinker.TinkerError, ValueError) as error:
                raise failed_step(error, step) from error
        metrics = self._metrics(step, batch, submitted)
        await run.finish_step(
            step, {**metrics, **(result.metrics or {}), **evaluated}, window, saving
        )

    def _metrics(self, step: int, batch: Batch, submitted: SubmittedGradient) -> dict[str, float]:
        metrics = submitted.metrics
        if not np.isfinite(metrics["dpo_loss"]):
            raise TrainingError(
                f"step {step}: dpo_loss={metrics['dpo_loss']}, the run has diverged; lower "
                f"learning_rate={self._config.learning_rate} and start over."
            )
        self._objective.watch(step, metrics)
        return {
            **metrics,
            "epoch": self._schedule.position(step)[0],
            "progress": step / self._run.total_steps,
            "learning_rate": self._run.learning_rate(step),
            "num_tokens": sum(datum.model_input.length for datum in batch.data),
            "reference/scored": self._reference.num_scored,
        }

    async def _evaluate(self, step: int) -> dict[str, float]:
        """Run the evaluators that are due before `step`."""
        due = due_evaluators(
            step,
            self._run.total_steps,
            (self._evaluators, self._config.eval_every),
            (self._infrequent, self._config.infrequent_eval_every),
        )
        if not due:
            return {}
        async with trace.scope_span("evals"):
            return await run_evals(due, self._run.training_client, step)

    def _loop_state(self, next_step: int) -> dict[str, int]:
        epoch, batch = self._schedule.position(next_step)
        if next_step == self._run.total_steps:
            epoch, batch = self._config.num_epochs, 0
        return {"epoch": epoch, "batch": batch}
