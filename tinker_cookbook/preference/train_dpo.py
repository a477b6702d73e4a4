"""Direct preference optimization and its relatives: settings, and the gradient of a batch.

Data are batches of chosen and rejected completions in turns (`dpo_datasets`). The gradient of the
loss is computed in the client with NumPy (`pair_gradients`), so any loss of `losses` works on any
service. The loop is in `loop`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import chz
import numpy as np

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.preference.dpo_datasets import all_datums
from tinker_cookbook.preference.loop import (
    Batch,
    LoopConfig,
    LoopOptions,
    PreferenceLoop,
    SubmittedGradient,
    build_schedule,
    open_reference,
)
from tinker_cookbook.preference.losses import PAIR_LOSSES, PairLossFunction
from tinker_cookbook.preference.one_step import create_dpo_clients, do_update
from tinker_cookbook.preference.pair_evaluator import HeldOutPairs
from tinker_cookbook.preference.pair_gradients import submit_pair_gradient
from tinker_cookbook.preference.pair_metrics import DisplacementWatch, compute_pair_metrics
from tinker_cookbook.runs.open_run import RunResult, open_run
from tinker_cookbook.runs.workload import Workload
from tinker_cookbook.supervised.types import SupervisedDataset
from tinker_cookbook.supervised.work import count_batches
from tinker_cookbook.utils.nearest_name import nearest_name

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
    "count_work",
    "create_dpo_clients",
    "do_update",
    "main",
    "print_example",
]

logger = logging.getLogger(__name__)


@chz.chz
class PreferenceOptions(LoopOptions):
    """The settings of every run on pairs; a recipe's config adds its own."""

    loss: str = chz.field(default="dpo", doc=f"Loss of a pair: {', '.join(PAIR_LOSSES)}.")
    loss_config: dict[str, float] = chz.field(
        default_factory=dict, doc="Further settings of the loss, such as label_smoothing or gamma."
    )

    @chz.validate
    def _check_loss(self) -> None:
        build_loss(self.loss, self.dpo_beta, self.loss_config)


@chz.chz
class Config(PreferenceOptions, LoopConfig):
    """Everything the loop needs."""


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
        schedule = build_schedule(config, dataset)
        for line in dataset.summary:
            print(f"data     {line}", flush=True)
        common = config.dataset_builder.common_config
        has_begun = await run.begin(
            schedule.total_steps, step_of=schedule.step_of, renderer_name=common.renderer_name
        )
        if not has_begun:
            return run.result()
        reference = await open_reference(run)
        chosen_loss = loss or build_loss(config.loss, config.dpo_beta, config.loss_config)
        objective = PairObjective(chosen_loss, config.dpo_beta)
        loop = PreferenceLoop(run, schedule, dataset, reference, objective)
        if test_dataset is not None and config.eval_every:
            held_out = await asyncio.to_thread(all_datums, test_dataset)
            loop.add_held_out(HeldOutPairs(held_out, reference, chosen_loss, config.dpo_beta))
        return await loop.train()


def count_work(config: Config) -> Workload:
    """Render every batch of a run, without a service, and count its rows and tokens.

    Raises:
        DataError: if the data cannot be used.
    """
    dataset, _ = config.dataset_builder()
    schedule = build_schedule(config, dataset)
    return count_batches(dataset, schedule, seed=config.seed, model_name=config.model_name)


class PairObjective:
    """Trains on pairs with one of the losses of `losses`."""

    def __init__(self, loss: PairLossFunction, beta: float) -> None:
        self._loss = loss
        self._beta = beta
        self._watch = DisplacementWatch()

    def load(self, dataset: SupervisedDataset, index: int) -> Batch:
        """Return a batch, chosen and rejected completions in turns."""
        data = dataset.get_batch(index)
        if len(data) % 2:
            logger.warning("batch %d: the last datum has no partner and is left out", index)
            data = data[:-1]
        return Batch(data)

    async def submit(
        self, client: tinker.TrainingClient, batch: Batch, reference: np.ndarray
    ) -> SubmittedGradient:
        """Submit the gradient of the mean loss of the batch's pairs."""
        step = await submit_pair_gradient(client, batch.data, reference, self._loss)
        metrics = compute_pair_metrics(step.batch, step.loss, self._beta)
        return SubmittedGradient(step.gradients, metrics)

    def watch(self, step: int, metrics: Mapping[str, float]) -> None:
        """Warn if chosen completions become unlikely while the margin grows."""
        self._watch.check(metrics, step)


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
