"""The train loop of a pointwise judge: Bradley-Terry on pairs of completions."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import chz
import numpy as np

from tinker_cookbook.eval.evaluators import Evaluator, EvaluatorBuilder
from tinker_cookbook.exceptions import TrainingError
from tinker_cookbook.preference.bradley_terry import (
    PointwiseDataset,
    PointwiseDatasetBuilder,
    bradley_terry,
    read_scores,
    score_weights,
)
from tinker_cookbook.runs.custom_gradient import submit_custom_gradient
from tinker_cookbook.runs.open_run import Run, RunResult, open_run
from tinker_cookbook.runs.options import SharedOptions, check_options, expand_path
from tinker_cookbook.runs.training_client import failed_step
from tinker_cookbook.runs.workload import Workload
from tinker_cookbook.supervised.schedule import Schedule, epoch_seed
from tinker_cookbook.supervised.train import due_evaluators, run_evals
from tinker_cookbook.supervised.work import count_batches
from tinker_cookbook.utils import trace

if TYPE_CHECKING:
    import tinker

__all__ = ["Config", "PointwiseOptions", "RunResult", "count_work", "main"]


@chz.chz
class PointwiseOptions(SharedOptions):
    """The settings of every run that trains a pointwise judge; a recipe's config adds its own."""

    num_epochs: int = chz.field(default=1, doc="Number of passes over the comparisons.")

    @chz.validate
    def _check(self) -> None:
        check_options(self)


@chz.chz
class Config(PointwiseOptions):
    """All settings of the loop."""

    # Narrower than in the options: a chz object never changes, so this is safe.
    log_path: str = chz.field(munger=expand_path, doc="Run directory.")  # pyright: ignore[reportIncompatibleVariableOverride]
    model_name: str = chz.field(doc="Base model; a name or a folder.")  # pyright: ignore[reportIncompatibleVariableOverride]
    recipe_name: str = chz.field(default="reward_model", doc="Name recorded with the session.")
    dataset_builder: PointwiseDatasetBuilder = chz.field(doc="Builder of the comparisons.")
    evaluator_builders: list[EvaluatorBuilder] = chz.field(
        default_factory=list, doc="Builders of evaluators that run every eval_every steps."
    )


async def main(config: Config) -> RunResult:
    """Train, evaluate and save; the same config again resumes an interrupted run.

    Raises:
        ConfigurationError: if a setting, the service or the old run directory forbids the run.
        DataError: if the data cannot be used.
        TrainingError: if the run cannot continue; it can be resumed from its last checkpoint.
    """
    async with open_run(config, config.recipe_name) as run:
        dataset, _ = await asyncio.to_thread(config.dataset_builder)
        schedule = _schedule(config, dataset)
        for line in dataset.summary:
            print(f"data     {line}", flush=True)
        has_begun = await run.begin(
            schedule.total_steps,
            step_of=schedule.step_of,
            renderer_name=config.dataset_builder.common_config.renderer_name,
        )
        if not has_begun:
            return run.result()
        return await _Loop(run, schedule, dataset).train()


def count_work(config: Config) -> Workload:
    """Render every batch of a run, without a service, and count its rows and tokens.

    Raises:
        DataError: if the data cannot be used.
    """
    dataset, _ = config.dataset_builder()
    return count_batches(
        dataset,
        _schedule(config, dataset),
        seed=config.seed,
        model_name=config.model_name,
        has_example=False,
    )


def _schedule(config: Config, dataset: PointwiseDataset) -> Schedule:
    return Schedule(len(dataset), config.num_epochs, 1, config.max_steps)


class _Loop:
    """The state of a run between its first and last step."""

    def __init__(self, run: Run[Config], schedule: Schedule, dataset: PointwiseDataset) -> None:
        self._run = run
        self._config = run.config
        self._schedule = schedule
        self._dataset = dataset
        self._evaluators: list[Evaluator] = [build() for build in run.config.evaluator_builders]
        self._epoch = -1

    async def train(self) -> RunResult:
        """Do the remaining steps, then evaluate and save."""
        total = self._run.total_steps
        for step in range(self._run.start_step, total):
            await self._step(step)
        with trace.trace_iteration(total) as window:
            evaluated = await self._evaluate(total)
        if evaluated:
            self._run.write_row(total, evaluated | window.get_timing_metrics())
        return await self._run.finish(self._loop_state(total), evaluated)

    async def _step(self, step: int) -> None:
        """Evaluate, submit one step, wait for it, and write its row."""
        import tinker

        run, data = self._run, self._load(step)
        with trace.trace_iteration(step) as window:
            evaluated = await self._evaluate(step)
            try:
                gradients, scores_D = await self._submit_gradient(data)
                update = run.training_client.optim_step(run.adam_params(step))
                saving = run.submit_checkpoint(self._loop_state(step + 1), steps_done=step + 1)
                for gradient in gradients:
                    await gradient
                result = await update
            except (tinker.TinkerError, ValueError) as error:
                raise failed_step(error, step) from error
        metrics = self._metrics(step, data, scores_D) | (result.metrics or {}) | evaluated
        await run.finish_step(step, metrics, window, saving)

    async def _submit_gradient(
        self, data: list[tinker.Datum]
    ) -> tuple[list[tinker.APIFuture[tinker.ForwardBackwardOutput]], np.ndarray]:
        """Submit the gradient of the mean loss; return its requests and the scores before it."""
        num_pairs, found = len(data) // 2, []

        def weigh(part: slice, logprobs: list[np.ndarray]) -> list[np.ndarray]:
            lengths = [datum.model_input.length for datum in data[part]]
            scores_D = read_scores(
                [rows.reshape(length, 2) for rows, length in zip(logprobs, lengths, strict=True)]
            )
            _, by_chosen_P, by_rejected_P = bradley_terry(scores_D[0::2], scores_D[1::2])
            slopes_D = np.stack([by_chosen_P, by_rejected_P], axis=1).reshape(-1)
            found.append(scores_D)
            return score_weights(slopes_D / num_pairs, lengths)

        gradients = await submit_custom_gradient(
            self._run.training_client, data, weigh, group_size=2
        )
        return gradients, np.concatenate(found)

    def _load(self, step: int) -> list[tinker.Datum]:
        epoch, batch = self._schedule.position(step)
        if epoch != self._epoch:
            self._dataset.set_epoch(seed=epoch_seed(self._config.seed, epoch))
            self._epoch = epoch
        return self._dataset.get_batch(batch)

    def _metrics(
        self, step: int, data: list[tinker.Datum], scores_D: np.ndarray
    ) -> dict[str, float]:
        loss_P, _, _ = bradley_terry(scores_D[0::2], scores_D[1::2])
        margin_P = scores_D[0::2] - scores_D[1::2]
        if not np.isfinite(loss_P).all():
            raise TrainingError(
                f"step {step}: the loss is not finite, the run has diverged; lower learning_rate="
                f"{self._config.learning_rate} and start over."
            )
        return {
            "loss": float(loss_P.mean()),
            "accuracy": float(((margin_P > 0) + 0.5 * (margin_P == 0)).mean()),
            "margin": float(margin_P.mean()),
            "epoch": self._schedule.position(step)[0],
            "progress": step / self._run.total_steps,
            "learning_rate": self._run.learning_rate(step),
            "num_pairs": len(loss_P),
            "num_tokens": sum(datum.model_input.length for datum in data),
        }

    async def _evaluate(self, step: int) -> dict[str, float]:
        due = due_evaluators(
            step, self._run.total_steps, (self._evaluators, self._config.eval_every)
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
