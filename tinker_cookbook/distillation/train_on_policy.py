"""On-policy distillation: the student samples, and the teacher scores the same tokens.

The advantage of a token is minus its part of the reverse KL, so training is reinforcement learning
with the teacher as the grader. The loop is that of `rl`; `on_policy_loop` has what differs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import chz

from tinker_cookbook.distillation.compatibility import (
    check_data_format,
    check_same_tokenizer,
    data_format_of,
)
from tinker_cookbook.distillation.datasets import (
    CompositeDataset,
    DistillationDatasetConfig,
    TaughtDataset,
)
from tinker_cookbook.distillation.mixture import Mixture, divide_batch
from tinker_cookbook.distillation.objectives import TOP_K_DIVERGENCES
from tinker_cookbook.distillation.on_policy_loop import (
    OnPolicyLoop,
    ScoredDatum,
    teacher_metrics,
    with_advantages,
)
from tinker_cookbook.distillation.target_cache import TargetCache
from tinker_cookbook.distillation.taught_batches import TaughtBatches
from tinker_cookbook.distillation.teacher import Teacher, open_teachers, place
from tinker_cookbook.distillation.top_k import check_objective
from tinker_cookbook.distillation.train_off_policy import DatasetWithTeacher, open_data
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.rl import config as rl_config
from tinker_cookbook.rl.data_processing import assemble_training_data, compute_advantages
from tinker_cookbook.rl.dataset_utils import EpochCycledRLDataset
from tinker_cookbook.rl.metric_util import compute_trajectory_metrics
from tinker_cookbook.rl.rollout_strategy import gather_or_cancel
from tinker_cookbook.rl.train import choose_loop, context_window
from tinker_cookbook.rl.types import (
    EnvGroupBuilder,
    RLDataset,
    RLDatasetBuilder,
    TrajectoryGroup,
)
from tinker_cookbook.runs.open_run import Run, RunResult, open_run
from tinker_cookbook.supervised.types import SupervisedDataset
from tinker_cookbook.utils.progress import ShownNumbers

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["Config", "RunResult", "incorporate_kl_penalty", "main", "prepare_minibatch"]

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
    objective_beta: float = chz.field(
        default=0.5, doc="Share of the teacher in the mixture of jensen_shannon, between 0 and 1."
    )
    teacher_concurrency: int = chz.field(
        default=64, doc="Maximum number of requests to a teacher at a time."
    )
    overlap_scoring: bool = chz.field(
        default=True,
        doc="Whether a teacher scores a group as soon as it is sampled; False: after the batch.",
    )
    teacher_floor: float = chz.field(
        default=0.0,
        doc="Teacher's probability of a sampled token below which the tokens after it are not "
        "trained; 0: whole replies are.",
    )
    evaluate_teachers: bool = chz.field(
        default=False,
        doc="Whether the teachers solve the held-out tasks once; metrics begin with teacher/.",
    )
    eval_every: int = chz.field(default=20, doc="Steps between evaluations; 0: none.")

    @chz.validate
    def _check_distillation(self) -> None:
        if self.topk < 0:
            raise ConfigurationError(f"topk={self.topk} is negative; use 0 or more.")
        check_objective(self.objective, self.objective_beta, tuple(TOP_K_DIVERGENCES))
        if self.topk and self.num_substeps != 1:
            raise ConfigurationError(
                f"num_substeps={self.num_substeps} with topk={self.topk} is not supported; use "
                "num_substeps=1."
            )
        _check_reward_settings(self)
        if not 0 <= self.teacher_floor < 1:
            raise ConfigurationError(
                f"teacher_floor={self.teacher_floor} must be 0 or above, and below 1."
            )
        if not self.overlap_scoring and (
            getattr(self, "async_config", None) or getattr(self, "stream_minibatch_config", None)
        ):
            raise ConfigurationError(
                "overlap_scoring=false with async_config or stream_minibatch_config is not "
                "supported; leave it out."
            )
        if self.temperature != 1.0:
            logger.warning(
                "temperature=%g: teacher and student are compared at temperature 1, so the KL is "
                "not that of the sampled distribution",
                self.temperature,
            )


def _check_reward_settings(options: OnPolicyOptions) -> None:
    """Refuse settings of reinforcement learning that the signal of a teacher does not have."""
    wanted = {
        "credit": "trajectory",
        "rollout_correction": "none",
        "train_truncated": True,
        "max_refill_rounds": 0,
        "overlong_buffer": 0,
    }
    for name, value in wanted.items():
        if getattr(options, name) != value:
            raise ConfigurationError(
                f"{name}={getattr(options, name)} is not supported by distillation; use {value}."
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

    given_configs: list[DatasetWithTeacher] = chz.field(
        default_factory=list,
        doc="Data sets of given sequences with their teachers, for a mix of sampled and given "
        "sequences; needs topk.",
    )
    given_batch_size: int = chz.field(
        default=16, doc="Given sequences per step, in addition to the sampled ones."
    )

    def needs_kl_reference(self) -> bool:
        """Return False: the teachers are what the KL is computed with."""
        return False

    @chz.validate
    def _check_datasets(self) -> None:
        if not self.dataset_configs:
            raise ConfigurationError("dataset_configs is empty; give one or more data sets.")
        if self.topk and self.stream_minibatch_config is not None:
            raise ConfigurationError(
                f"stream_minibatch_config with topk={self.topk} is not supported; leave it out."
            )
        if self.async_config is not None:
            groups = sum(one.groups_per_batch for one in self.dataset_configs)
            if self.async_config.groups_per_batch != groups:
                raise ConfigurationError(
                    f"async_config.groups_per_batch={self.async_config.groups_per_batch} is not "
                    f"the sum of groups_per_batch in dataset_configs; set it to {groups}."
                )
        if self.given_configs and not self.topk:
            raise ConfigurationError(
                "given_configs with topk=0 is not supported, because given sequences are not the "
                "student's samples; set topk, for example to 20."
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
    async with open_run(config, config.recipe_name) as run, contextlib.AsyncExitStack() as opened:
        config = run.config
        configs = config.dataset_configs
        _check_teachers(config)
        built = [await one.dataset_builder() for one in configs]
        composite = CompositeDataset(
            [_repeat(train, config) for train, _ in built],
            [one.groups_per_batch for one in configs],
        )
        given_data = await opened.enter_async_context(open_data(config.given_configs))
        has_begun = await run.begin(
            _count_steps(config, built, len(composite)),
            renderer_name=config.renderer_name,
            shown=SHOWN,
        )
        if not has_begun:
            return run.result()
        given = await _open_given(run, given_data[0])
        loop = OnPolicyLoop(
            run,
            TaughtDataset(composite, config.dataset_names()),
            context_window=await asyncio.to_thread(context_window, run),
            teachers=await open_teachers(
                run,
                [one.teacher_config for one in configs],
                concurrency=config.teacher_concurrency,
                count=config.topk,
            ),
            settings=config,
            given=given,
        )
        if given is not None:
            opened.callback(given.cancel)
        _add_held_out(loop, [test for _, test in built], config.dataset_names())
        return await loop.end(await choose_loop(config)(loop, run.start_step))


def _check_teachers(config: Config) -> None:
    """Refuse teachers and data that do not fit the student, before anything is opened."""
    for name in ("dataset_configs", "given_configs"):
        for index, one in enumerate(getattr(config, name)):
            check_same_tokenizer(config.model_name, one.teacher_config.base_model)
            data_format = data_format_of(one.dataset_builder)
            check_data_format(config.renderer_name, data_format, f"{name}[{index}]")


def _repeat(dataset: RLDataset, config: Config) -> RLDataset:
    """Return the data set for all epochs."""
    if config.num_epochs == 1:
        return dataset
    return EpochCycledRLDataset(dataset, config.num_epochs, config.seed)


async def _open_given(run: Run[Config], datasets: list[SupervisedDataset]) -> TaughtBatches | None:
    """Return the batches of given sequences, which repeat as often as the run needs them."""
    config = run.config
    configs = config.given_configs
    if not configs:
        return None
    counts = divide_batch(config.given_batch_size, [one.weight for one in configs])
    mixture = Mixture(datasets, counts, seed=config.seed)
    teachers = await open_teachers(
        run,
        [one.teacher_config for one in configs],
        cache=await asyncio.to_thread(TargetCache, run.log_path),
        concurrency=config.teacher_concurrency,
        count=config.topk,
    )
    names = [one.name or f"given_{index}" for index, one in enumerate(configs)]
    return TaughtBatches(mixture, teachers, names, count=config.topk, kind="top")


async def prepare_minibatch(
    env_group_builders_P: Sequence[EnvGroupBuilder],
    trajectory_groups_P: list[TrajectoryGroup],
    tokenizer: Tokenizer,
    dataset_indices_P: list[int],
    teacher_clients: list[tinker.SamplingClient],
    kl_penalty_coef: float,
    kl_discount_factor: float,
) -> tuple[list[tinker.Datum], dict[str, float]]:
    """Return the datums of groups with the reverse KL in their advantages, and metrics.

    For programs with their own loop. Keep the three lists of groups in step: if a group failed,
    leave out its entry of all of them.

    Args:
        env_group_builders_P: Builders of the groups, for the tags of the metrics.
        trajectory_groups_P: The groups.
        tokenizer: Not used; the parameter is part of the public interface.
        dataset_indices_P: Number of the data set of each group.
        teacher_clients: The teacher of each data set.
        kl_penalty_coef: Factor on the advantages.
        kl_discount_factor: Discount of the KL of later tokens.
    """
    del tokenizer
    tags_P = [builder.logging_tags() for builder in env_group_builders_P]
    metrics = compute_trajectory_metrics(trajectory_groups_P, tags_P)
    advantages_P = compute_advantages(trajectory_groups_P)
    data_D, metadata_D = assemble_training_data(trajectory_groups_P, advantages_P)
    indices_D = [dataset_indices_P[found["group_idx"]] for found in metadata_D]
    metrics |= await incorporate_kl_penalty(
        data_D,
        [teacher_clients[index] for index in indices_D],
        indices_D,
        kl_penalty_coef,
        kl_discount_factor,
    )
    return data_D, metrics


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


def _count_steps(
    config: Config, built: Sequence[tuple[RLDataset, RLDataset | None]], num_batches: int
) -> int:
    for index, (train, _) in enumerate(built):
        if len(train) == 0:
            size = config.dataset_configs[index].groups_per_batch
            raise ConfigurationError(
                f"dataset_configs[{index}].groups_per_batch={size}, but the data set has too few "
                "prompts for one batch; use a smaller number, or more prompts."
            )
    return num_batches if config.max_steps is None else min(num_batches, config.max_steps)


def _add_held_out(loop: OnPolicyLoop, held_out: list[RLDataset | None], names: list[str]) -> None:
    """Evaluate the held-out tasks: as `test`, or for several data sets as `test_<name>`."""
    several = sum(dataset is not None for dataset in held_out) > 1
    for index, (dataset, name) in enumerate(zip(held_out, names, strict=True)):
        suffix = f"_{name}" if several else ""
        loop.add_held_out(dataset, name=f"test{suffix}")
        if dataset is not None and loop.evaluates_teachers:
            loop.add_teacher_evaluation(dataset, index, name=f"teacher{suffix}")
