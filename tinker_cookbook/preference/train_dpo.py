"""Direct preference optimization and its relatives: the loop.

Data are batches of chosen and rejected completions in turns (`dpo_datasets`). A step needs the log
probabilities of a batch under the model in training and under the reference model. The reference
scores the next batch while the current one is trained (`reference`), and the gradient of the loss
is computed in the client with NumPy (`pair_gradients`), so any loss of `losses` works on any
service.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import chz
import numpy as np

from tinker_cookbook.eval.evaluators import Evaluator, EvaluatorBuilder
from tinker_cookbook.exceptions import ConfigurationError, TrainingError
from tinker_cookbook.preference.losses import PAIR_LOSSES, PairLossFunction
from tinker_cookbook.preference.pair_evaluator import HeldOutPairs
from tinker_cookbook.preference.pair_gradients import PairStep, submit_pair_gradient
from tinker_cookbook.preference.pair_metrics import DisplacementWatch, compute_pair_metrics
from tinker_cookbook.preference.reference import ReferenceScorer
from tinker_cookbook.runs.open_run import Run, RunResult, open_run
from tinker_cookbook.runs.options import SharedOptions, check_options, expand_path
from tinker_cookbook.supervised.schedule import Schedule, epoch_seed
from tinker_cookbook.supervised.train import due_evaluators, run_evals
from tinker_cookbook.supervised.types import ChatDatasetBuilder, SupervisedDataset
from tinker_cookbook.utils import trace
from tinker_cookbook.utils.lr_scheduling import LRSchedule
from tinker_cookbook.utils.nearest_name import nearest_name
from tinker_cookbook.utils.sdk_compat import create_client, service_message

if TYPE_CHECKING:
    import tinker
    import torch

    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = [
    "Config",
    "PreferenceOptions",
    "RunResult",
    "build_loss",
    "compute_dpo_loss",
    "main",
    "print_example",
]

logger = logging.getLogger(__name__)


@chz.chz
class PreferenceOptions(SharedOptions):
    """The settings of every preference run; a recipe's config adds its own."""

    learning_rate: float = 1e-5
    lr_schedule: LRSchedule = "linear"
    num_epochs: int = chz.field(default=1, doc="Number of passes over the pairs.")
    loss: str = chz.field(default="dpo", doc=f"Loss of a pair: {', '.join(PAIR_LOSSES)}.")
    dpo_beta: float = chz.field(
        default=0.1, doc="Strength of the pull towards the reference model (beta of the loss)."
    )
    loss_config: dict[str, float] = chz.field(
        default_factory=dict, doc="Further settings of the loss, such as label_smoothing or gamma."
    )
    reference_model_name: str | None = chz.field(
        default=None,
        doc="Reference model: a base model, or the tinker:// path of saved weights; default: what "
        "the run starts from.",
    )

    @chz.validate
    def _check(self) -> None:
        check_options(self)
        build_loss(self.loss, self.dpo_beta, self.loss_config)


@chz.chz
class Config(PreferenceOptions):
    """Everything the loop needs."""

    # Narrower than in the options: a chz object never changes, so this is safe.
    log_path: str = chz.field(munger=expand_path, doc="Run directory.")  # pyright: ignore[reportIncompatibleVariableOverride]
    model_name: str = chz.field(doc="Base model; a name or a folder.")  # pyright: ignore[reportIncompatibleVariableOverride]
    recipe_name: str = chz.field(default="preference", doc="Recipe name, recorded by the service.")
    dataset_builder: ChatDatasetBuilder = chz.field(
        doc="Builder of the training and held-out pairs."
    )
    num_replicas: int = chz.field(default=8, doc="Accepted for older programs; not used.")
    evaluator_builders: list[EvaluatorBuilder] = chz.field(
        default_factory=list, doc="Evaluators that run every eval_every steps."
    )
    infrequent_evaluator_builders: list[EvaluatorBuilder] = chz.field(
        default_factory=list, doc="Evaluators that run every infrequent_eval_every steps."
    )


def build_loss(name: str, beta: float, settings: dict[str, float]) -> PairLossFunction:
    """Build a loss by name.

    Raises:
        ConfigurationError: if the loss or a setting is unknown, or a setting is out of range.
    """
    builder = PAIR_LOSSES.get(name)
    if builder is None:
        near = nearest_name(name, PAIR_LOSSES)
        hint = f" Did you mean {near}?" if near else ""
        raise ConfigurationError(
            f"loss={name} is unknown; use one of {', '.join(PAIR_LOSSES)}.{hint}"
        )
    accepted = [key for key in inspect.signature(builder).parameters if key != "beta"]
    for key in settings:
        if key not in accepted:
            raise ConfigurationError(
                f"loss_config.{key} is not a setting of {name}; it takes "
                f"{', '.join(accepted) or 'none'} (and beta as dpo_beta)."
            )
    return builder(beta=beta, **settings)


def main(config: Config, *, loss: PairLossFunction | None = None) -> RunResult:
    """Train on pairs; the same config again resumes an interrupted run.

    Args:
        config: The settings.
        loss: Your own loss; by default the one that `config.loss` names.

    Returns:
        Where the weights are.

    Raises:
        ConfigurationError: if a setting, the service or the old run directory forbids the run.
        DataError: if the data cannot be used.
        TrainingError: if the run cannot continue; it can be resumed from its last checkpoint.
    """
    return asyncio.run(train(config, loss=loss))


async def train(config: Config, *, loss: PairLossFunction | None = None) -> RunResult:
    """Do what `main` does, in a running event loop."""
    async with open_run(config, config.recipe_name) as run:
        dataset, test_dataset = await asyncio.to_thread(config.dataset_builder)
        schedule = Schedule(len(dataset), config.num_epochs, 1, config.max_steps)
        for line in dataset.summary:
            print(f"data     {line}", flush=True)
        common = config.dataset_builder.common_config
        has_begun = await run.begin(
            schedule.total_steps, step_of=schedule.step_of, renderer_name=common.renderer_name
        )
        if not has_begun:
            return run.result()
        loop = _Loop(
            run,
            schedule,
            dataset,
            await _open_reference(run),
            loss or build_loss(config.loss, config.dpo_beta, config.loss_config),
        )
        loop.add_held_out(test_dataset)
        return await loop.train()


async def _open_reference(run: Run[Config]) -> ReferenceScorer:
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


class _Loop:
    """The state of a run between its first and last step."""

    def __init__(
        self,
        run: Run[Config],
        schedule: Schedule,
        dataset: SupervisedDataset,
        reference: ReferenceScorer,
        loss: PairLossFunction,
    ) -> None:
        config = run.config
        self._run = run
        self._config = config
        self._schedule = schedule
        self._dataset = dataset
        self._reference = reference
        self._loss = loss
        self._watch = DisplacementWatch()
        self._evaluators: list[Evaluator] = [build() for build in config.evaluator_builders]
        self._infrequent = [build() for build in config.infrequent_evaluator_builders]
        self._epoch = -1

    def add_held_out(self, dataset: Any) -> None:
        """Evaluate held-out pairs too."""
        if dataset is None or not self._config.eval_every:
            return
        held_out = HeldOutPairs(dataset, self._reference, self._loss, self._config.dpo_beta)
        self._evaluators.insert(0, held_out)

    async def train(self) -> RunResult:
        """Do the remaining steps, then evaluate and save."""
        total = self._run.total_steps
        prepared = asyncio.create_task(self._prepare(self._run.start_step))
        try:
            for step in range(self._run.start_step, total):
                data, scores = await prepared
                if step + 1 < total:
                    # Scored while this step is trained.
                    prepared = asyncio.create_task(self._prepare(step + 1))
                await self._step(step, data, scores)
        finally:
            prepared.cancel()
        with trace.trace_iteration(total) as window:
            evaluated = await self._evaluate(total)
        if evaluated:
            self._run.metrics.log_metrics(evaluated | window.get_timing_metrics(), step=total)
        return await self._run.finish(self._loop_state(total), evaluated)

    async def _prepare(self, step: int) -> tuple[list[tinker.Datum], np.ndarray]:
        """Return the datums of a step and their log probabilities under the reference."""
        epoch, batch = self._schedule.position(step)
        if epoch != self._epoch:
            self._dataset.set_epoch(seed=epoch_seed(self._config.seed, epoch))
            self._epoch = epoch
        data = await asyncio.to_thread(self._dataset.get_batch, batch)
        if len(data) % 2:
            logger.warning("step %d: the last datum has no partner and is left out", step)
            data = data[:-1]
        return data, await self._reference.score(data)

    async def _step(self, step: int, data: list[tinker.Datum], scores: np.ndarray) -> None:
        """Evaluate, submit one step, wait for it, and write its row."""
        import tinker

        run = self._run
        with trace.trace_iteration(step) as window:
            evaluated = await self._evaluate(step)
            try:
                submitted = await submit_pair_gradient(
                    run.training_client, data, scores, self._loss
                )
                update = run.training_client.optim_step(run.adam_params(step))
                saving = run.submit_checkpoint(self._loop_state(step + 1), steps_done=step + 1)
                for gradient in submitted.gradients:
                    await gradient
                result = await update
            except (tinker.TinkerError, ValueError) as error:
                raise TrainingError(
                    f"step {step} failed on the service: {service_message(error)} The same "
                    "command resumes from the last checkpoint."
                ) from error
        metrics = self._metrics(step, data, submitted)
        await run.finish_step(
            step, {**metrics, **(result.metrics or {}), **evaluated}, window, saving
        )

    def _metrics(
        self, step: int, data: Sequence[tinker.Datum], submitted: PairStep
    ) -> dict[str, float]:
        metrics = compute_pair_metrics(submitted.batch, submitted.loss, self._config.dpo_beta)
        if not np.isfinite(metrics["dpo_loss"]):
            raise TrainingError(
                f"step {step}: dpo_loss={metrics['dpo_loss']}, the run has diverged; lower "
                f"learning_rate={self._config.learning_rate} and start over."
            )
        self._watch.check(metrics, step)
        return metrics | {
            "epoch": self._schedule.position(step)[0],
            "progress": step / self._run.total_steps,
            "learning_rate": self._run.learning_rate(step),
            "num_tokens": sum(datum.model_input.length for datum in data),
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


def compute_dpo_loss(
    chosen_logprobs: list[torch.Tensor],
    rejected_logprobs: list[torch.Tensor],
    chosen_ref_logprobs: list[torch.Tensor],
    rejected_ref_logprobs: list[torch.Tensor],
    dpo_beta: float,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Compute the DPO loss with torch, for programs that use `forward_backward_custom`.

    Args:
        chosen_logprobs: Sequence log probability of each pair's better completion, 0-d tensors.
        rejected_logprobs: The same of the worse completions.
        chosen_ref_logprobs: The same under the reference model.
        rejected_ref_logprobs: The same of the worse completions.
        dpo_beta: Strength of the pull towards the reference model.

    Returns:
        The mean loss, a 0-d tensor with a gradient, and the metrics of the pairs.

    Source: arXiv:2305.18290.
    """
    import torch

    chosen = torch.stack(chosen_logprobs) - torch.stack(chosen_ref_logprobs)
    rejected = torch.stack(rejected_logprobs) - torch.stack(rejected_ref_logprobs)
    margin = dpo_beta * (chosen - rejected)
    loss = -torch.nn.functional.logsigmoid(margin).mean()
    right = (margin > 0).float() + 0.5 * (margin == 0).float()
    metrics = {
        "dpo_loss": loss.item(),
        "accuracy": right.mean().item(),
        "margin": margin.mean().item(),
        "chosen_reward": dpo_beta * chosen.mean().item(),
        "rejected_reward": dpo_beta * rejected.mean().item(),
    }
    return loss, metrics


def print_example(datum: tinker.Datum, tokenizer: Tokenizer, label: str = "") -> None:
    """Print a datum with its trained tokens in color."""
    from tinker_cookbook.display import colorize_example

    print(
        f"{label}\n{colorize_example(datum, tokenizer)}"
        if label
        else colorize_example(datum, tokenizer)
    )
