"""Kahneman-Tversky optimization: training on single replies with a thumb up or down.

The data are `rated_replies`, the loss is `losses.kto`, and the loop is `loop`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import chz
import numpy as np

from tinker_cookbook.eval.evaluators import TrainingClientEvaluator
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.preference.loop import (
    Batch,
    LoopConfig,
    LoopOptions,
    PreferenceLoop,
    SubmittedGradient,
    build_schedule,
    open_reference,
)
from tinker_cookbook.preference.losses import SingleBatch, check_kto, estimate_kl, kto
from tinker_cookbook.preference.pair_gradients import sequence_logprobs
from tinker_cookbook.preference.pair_metrics import DisplacementWatch
from tinker_cookbook.preference.rated_replies import RatedReplyDataset
from tinker_cookbook.preference.reference import ReferenceScorer
from tinker_cookbook.preference.reply_gradients import (
    ReplyLossFunction,
    compute_reply_metrics,
    submit_reply_gradient,
)
from tinker_cookbook.runs.open_run import RunResult, open_run
from tinker_cookbook.runs.workload import Workload
from tinker_cookbook.supervised.types import SupervisedDataset
from tinker_cookbook.supervised.work import count_batches

if TYPE_CHECKING:
    import tinker

__all__ = ["Config", "KTOOptions", "RunResult", "count_work", "main"]

BATCH_REPLIES = 64
"""Held-out replies per request."""


@chz.chz
class KTOOptions(LoopOptions):
    """The settings of every run on rated replies; a recipe's config adds its own."""

    good_weight: float = chz.field(default=1.0, doc="Weight of good replies in the loss.")
    bad_weight: float = chz.field(
        default=1.0,
        doc="Weight of bad replies in the loss; choose it so that both kinds weigh about the same.",
    )

    @chz.validate
    def _check_kto(self) -> None:
        check_kto(beta=self.dpo_beta, good_weight=self.good_weight, bad_weight=self.bad_weight)


@chz.chz
class Config(KTOOptions, LoopConfig):
    """Everything the loop needs."""


def main(config: Config) -> RunResult:
    """Train on rated replies; the same config again resumes an interrupted run.

    Returns:
        Where the weights are.

    Raises:
        ConfigurationError: if a setting, the service or the old run directory forbids the run.
        DataError: if the data cannot be used.
        TrainingError: if the run cannot continue; it can be resumed from its last checkpoint.
    """
    return asyncio.run(train(config))


async def train(config: Config) -> RunResult:
    """Do what `main` does, in a running event loop."""
    loss = partial(
        kto,
        beta=config.dpo_beta,
        good_weight=config.good_weight,
        bad_weight=config.bad_weight,
    )
    async with open_run(config, config.recipe_name) as run:
        dataset, test_dataset = await asyncio.to_thread(_open_data, config)
        schedule = build_schedule(config, dataset)
        for line in dataset.summary:
            print(f"data     {line}", flush=True)
        has_begun = await run.begin(
            schedule.total_steps,
            step_of=schedule.step_of,
            renderer_name=config.dataset_builder.common_config.renderer_name,
        )
        if not has_begun:
            return run.result()
        reference = await open_reference(run)
        objective = ReplyObjective(loss, config.dpo_beta)
        loop = PreferenceLoop(run, schedule, dataset, reference, objective)
        if test_dataset is not None and config.eval_every:
            loop.add_held_out(HeldOutReplies(test_dataset, reference, loss, config.dpo_beta))
        return await loop.train()


def count_work(config: Config) -> Workload:
    """Render every batch of a run, without a service, and count its rows and tokens.

    Mismatched replies, which are only scored, count as rows.

    Raises:
        DataError: if the data cannot be used.
    """
    dataset, _ = _open_data(config)
    schedule = build_schedule(config, dataset)
    return count_batches(dataset, schedule, seed=config.seed, model_name=config.model_name)


def _open_data(config: Config) -> tuple[RatedReplyDataset, RatedReplyDataset | None]:
    dataset, test_dataset = config.dataset_builder()
    for opened in (dataset, test_dataset):
        if opened is not None and not isinstance(opened, RatedReplyDataset):
            raise ConfigurationError(
                f"dataset_builder={type(config.dataset_builder).__name__} makes a "
                f"{type(opened).__name__}; KTO needs a RatedReplyDataset, for example of "
                "RatedReplyBuilderFromJsonl."
            )
    return dataset, test_dataset  # pyright: ignore[reportReturnType]


class ReplyObjective:
    """Trains on rated replies."""

    def __init__(self, loss: ReplyLossFunction, beta: float) -> None:
        self._loss = loss
        self._beta = beta
        self._watch = DisplacementWatch()

    def load(self, dataset: SupervisedDataset, index: int) -> Batch:
        """Return a batch, replies and mismatched replies in turns."""
        assert isinstance(dataset, RatedReplyDataset), "checked when the data were opened"
        data, is_good_S = dataset.load_batch(index)
        return Batch(data, is_good_S)

    async def submit(
        self, client: tinker.TrainingClient, batch: Batch, reference: np.ndarray
    ) -> SubmittedGradient:
        """Submit the gradient of the mean loss of the batch's replies."""
        assert batch.is_good_S is not None, "`load` has set it"
        step = await submit_reply_gradient(
            client, batch.data, batch.is_good_S, reference, self._loss
        )
        metrics = compute_reply_metrics(step.batch, step.loss, self._beta)
        return SubmittedGradient(step.gradients, metrics)

    def watch(self, step: int, metrics: Mapping[str, float]) -> None:
        """Warn if good replies become unlikely while the margin grows."""
        if "margin" in metrics:
            self._watch.check(metrics, step)


class HeldOutReplies(TrainingClientEvaluator):
    """Evaluates the model in training on held-out rated replies."""

    def __init__(
        self,
        dataset: RatedReplyDataset,
        reference: ReferenceScorer,
        loss: ReplyLossFunction,
        beta: float,
    ) -> None:
        self._data, self._is_good_S = dataset.load(range(len(dataset.replies)))
        self._reference = reference
        self._loss = loss
        self._beta = beta

    async def __call__(self, training_client: tinker.TrainingClient) -> dict[str, float]:
        """Return `test/accuracy`, `test/margin`, `test/dpo_loss` and the other metrics."""
        size = 2 * BATCH_REPLIES
        batches = [self._data[i : i + size] for i in range(0, len(self._data), size)]
        forwards = [training_client.forward(batch, "cross_entropy") for batch in batches]
        reference = np.concatenate([await self._reference.score(batch) for batch in batches])
        policy = []
        for batch, forward in zip(batches, forwards, strict=True):
            outputs = (await forward).loss_fn_outputs
            policy.append(sequence_logprobs(batch, [output["logprobs"] for output in outputs]))
        ratios = np.concatenate(policy) - reference
        found = SingleBatch(ratios[0::2], self._is_good_S, estimate_kl(ratios[1::2]))
        metrics = compute_reply_metrics(found, self._loss(found), self._beta)
        return {f"test/{name}": value for name, value in metrics.items()}
