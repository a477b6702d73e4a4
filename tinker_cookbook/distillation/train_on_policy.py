"""On-policy distillation: the student samples, and the teacher scores the same tokens.

The advantage of a token is minus its part of the reverse KL, so training is reinforcement learning
with the teacher as the grader. The loop is that of `rl`; `on_policy_loop` has what differs.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import chz

from tinker_cookbook.distillation.datasets import (
    CompositeDataset,
    DistillationDatasetConfig,
    TaughtDataset,
)
from tinker_cookbook.distillation.objectives import TOP_K_DIVERGENCES
from tinker_cookbook.distillation.on_policy_loop import (
    OnPolicyLoop,
    ScoredDatum,
    teacher_metrics,
    with_advantages,
)
from tinker_cookbook.distillation.teacher import (
    Teacher,
    check_same_tokenizer,
    open_teachers,
    place,
)
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.rl import config as rl_config
from tinker_cookbook.rl.rollout_strategy import gather_or_cancel
from tinker_cookbook.rl.sync_training import do_sync_training
from tinker_cookbook.rl.train import context_window
from tinker_cookbook.rl.types import RLDataset, RLDatasetBuilder
from tinker_cookbook.runs.open_run import RunResult, open_run
from tinker_cookbook.utils.progress import ShownNumbers

if TYPE_CHECKING:
    import tinker

__all__ = ["Config", "RunResult", "incorporate_kl_penalty", "main"]

logger = logging.getLogger(__name__)

SHOWN: ShownNumbers = (
    ("teacher KL", "teacher_kl", ".4f"),
    ("reward", "env/all/reward/total", ".3f"),
    ("held-out", "test/env/all/reward/total", ".3f"),
)


@chz.chz
class OnPolicyOptions(rl_config.RunOptions):
    """On-policy distillation; a recipe's config adds its own settings."""

    kl_penalty_coef: float = chz.field(
        default=1.0, doc="Factor on the advantages that come from the teacher."
    )
    kl_discount_factor: float = chz.field(
        default=0.0, doc="Discount of the KL of later tokens; 0: a token pays only its own."
    )
    reward_weight: float = chz.field(
        default=1.0,
        doc="Factor on the advantages that come from rewards; 0: the teacher is the only signal.",
    )
    topk: int = chz.field(
        default=0,
        doc="Teacher's most likely tokens per position on which the divergence is computed; "
        "0: only the sampled token. Rewards then have no effect.",
    )
    objective: str = chz.field(
        default="reverse_kl", doc=f"Divergence if topk is set: {', '.join(TOP_K_DIVERGENCES)}."
    )
    teacher_concurrency: int = chz.field(
        default=64, doc="Maximum number of requests to a teacher at a time."
    )
    eval_every: int = chz.field(default=20, doc="Steps between evaluations; 0: none.")

    @chz.validate
    def _check_distillation(self) -> None:
        if self.topk < 0:
            raise ConfigurationError(f"topk={self.topk} is negative; use 0 or more.")
        if self.objective not in TOP_K_DIVERGENCES:
            raise ConfigurationError(
                f"objective={self.objective} is unknown; use one of {', '.join(TOP_K_DIVERGENCES)}."
            )
        if self.topk and self.num_substeps != 1:
            raise ConfigurationError(
                f"num_substeps={self.num_substeps} with topk={self.topk} is not supported; use "
                "num_substeps=1."
            )
        if self.teacher_concurrency < 1:
            raise ConfigurationError(
                f"teacher_concurrency={self.teacher_concurrency} is less than 1; use 1 or more."
            )
        if self.temperature != 1.0:
            logger.warning(
                "temperature=%g: teacher and student are compared at temperature 1, so the KL is "
                "not that of the sampled distribution",
                self.temperature,
            )


@chz.chz
class Config(OnPolicyOptions, rl_config.Config):
    """All settings of the loop."""

    recipe_name: str = chz.field(
        default="on_policy_distillation", doc="Name recorded with the session."
    )
    dataset_configs: list[DistillationDatasetConfig] = chz.field(
        doc="Data sets with their teachers."
    )
    dataset_builder: RLDatasetBuilder = chz.field(
        default_factory=RLDatasetBuilder,
        doc="Unused field of the RL settings; dataset_configs has the data.",
    )

    def needs_kl_reference(self) -> bool:
        """Return False: the teachers are what the KL is computed with."""
        return False

    @chz.validate
    def _check_datasets(self) -> None:
        if not self.dataset_configs:
            raise ConfigurationError("dataset_configs is empty; give one or more data sets.")
        if self.async_config is not None or self.stream_minibatch_config is not None:
            raise ConfigurationError(
                "async_config and stream_minibatch_config are not supported; leave them out."
            )

    def dataset_names(self) -> list[str]:
        """Return the names of the data sets in the metrics."""
        return [
            config.name or f"dataset_{index}" for index, config in enumerate(self.dataset_configs)
        ]


async def main(config: Config) -> RunResult:
    """Train, evaluate and save; the same config again resumes an interrupted run.

    Returns:
        Where the weights are.

    Raises:
        ConfigurationError: if a setting, a teacher, the service or the old run directory forbids
            the run.
        TrainingError: if the run cannot continue; it can be resumed from its last checkpoint.
    """
    async with open_run(config, config.recipe_name) as run:
        config = run.config
        configs = config.dataset_configs
        for one in configs:
            check_same_tokenizer(config.model_name, one.teacher_config.base_model)
        built = [await one.dataset_builder() for one in configs]
        composite = CompositeDataset(
            [train for train, _ in built], [one.groups_per_batch for one in configs]
        )
        has_begun = await run.begin(
            _count_steps(config, len(composite)), renderer_name=config.renderer_name, shown=SHOWN
        )
        if not has_begun:
            return run.result()
        loop = OnPolicyLoop(
            run,
            TaughtDataset(composite, config.dataset_names()),
            context_window=await asyncio.to_thread(context_window, run),
            teachers=await open_teachers(
                run,
                [one.teacher_config for one in configs],
                concurrency=config.teacher_concurrency,
            ),
            settings=config,
        )
        _add_held_out(loop, [test for _, test in built], config.dataset_names())
        return await loop.end(await do_sync_training(loop, run.start_step))


async def incorporate_kl_penalty(
    data_D: list[tinker.Datum],
    teacher_clients_D: list[tinker.SamplingClient],
    dataset_indices_D: list[int],
    kl_penalty_coef: float,
    kl_discount_factor: float,
) -> dict[str, float]:
    """Take the reverse KL to a teacher from the advantages of datums, for programs with a loop.

    Args:
        data_D: Datums with `logprobs`, `advantages` and `mask`; replaced in the list.
        teacher_clients_D: The teacher of each datum.
        dataset_indices_D: The data set of each datum, for the metrics.
        kl_penalty_coef: Factor on the advantages.
        kl_discount_factor: Discount of the KL of later tokens.

    Returns:
        `teacher_kl` and `teacher_kl/dataset_i`, with the other metrics of `teacher_metrics`.
    """
    import numpy as np

    async def score(datum: tinker.Datum, client: tinker.SamplingClient) -> ScoredDatum:
        positions_n = np.flatnonzero(datum.loss_fn_inputs["mask"].to_numpy())
        student_n = datum.loss_fn_inputs["logprobs"].to_numpy()[positions_n].astype(np.float64)
        teacher_n = await Teacher(client, "teacher").score(place(datum, positions_n))
        return ScoredDatum(positions_n, student_n, teacher_n, None)

    scores_D = await gather_or_cancel(
        score(datum, client) for datum, client in zip(data_D, teacher_clients_D, strict=True)
    )
    for index, found in enumerate(scores_D):
        data_D[index] = with_advantages(data_D[index], found, kl_penalty_coef, kl_discount_factor)
    return teacher_metrics(scores_D, [f"dataset_{index}" for index in dataset_indices_D])


def _count_steps(config: Config, num_batches: int) -> int:
    if num_batches == 0:
        raise ConfigurationError(
            "a data set has too few prompts for one batch; use more data, or fewer groups per "
            "batch."
        )
    return num_batches if config.max_steps is None else min(num_batches, config.max_steps)


def _add_held_out(loop: OnPolicyLoop, held_out: list[RLDataset | None], names: list[str]) -> None:
    """Evaluate the held-out tasks: as `test`, or for several data sets as `test_<name>`."""
    several = sum(dataset is not None for dataset in held_out) > 1
    for dataset, name in zip(held_out, names, strict=True):
        loop.add_held_out(dataset, name=f"test_{name}" if several else "test")
