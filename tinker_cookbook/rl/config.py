"""The settings of an RL run."""

from __future__ import annotations

from typing import Any

import chz

from tinker_cookbook.eval.evaluators import SamplingClientEvaluatorBuilder
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.rl.algorithms import (
    LOSSES,
    AdvantageEstimator,
    LengthNormalization,
    RLLoss,
)
from tinker_cookbook.rl.rollout_limits import RolloutConfig, TerminationRewardPolicy
from tinker_cookbook.rl.rollout_presets import (
    default_rollout_config_for_model,
    default_rollout_strategy_for_model,
)
from tinker_cookbook.rl.rollout_strategy import RolloutStrategy, rollout_strategy_from_config
from tinker_cookbook.rl.rollouts import RolloutSettings
from tinker_cookbook.rl.types import RLDatasetBuilder
from tinker_cookbook.runs.options import SharedOptions, check_options, expand_path
from tinker_cookbook.utils.lr_scheduling import LRSchedule

__all__ = [
    "AsyncConfig",
    "Config",
    "KLReferenceConfig",
    "RLLoss",
    "RunOptions",
    "StreamMinibatchConfig",
]


@chz.chz
class KLReferenceConfig:
    """The model that a KL penalty holds the policy to."""

    base_model: str = chz.field(doc="A model the service offers.")
    load_checkpoint_path: str | None = chz.field(
        default=None, doc="tinker:// path of sampler weights; None: the base model itself."
    )


@chz.chz
class StreamMinibatchConfig:
    """Train on groups as they finish, instead of waiting for the whole batch."""

    groups_per_batch: int = chz.field(doc="Groups of one step; that of the data.")
    num_minibatches: int = chz.field(doc="Gradient requests per optimizer step.")


@chz.chz
class AsyncConfig:
    """Sample and train at the same time."""

    max_steps_off_policy: int = chz.field(
        doc="No group is trained on that was started with weights more steps old than this."
    )
    groups_per_batch: int = chz.field(doc="Groups of one step.")
    loss_fn: RLLoss | None = chz.field(default=None, doc="None: that of the run.")


@chz.chz
class RunOptions(SharedOptions):
    """The settings of every RL run; a recipe's config adds what is its own."""

    lr_schedule: LRSchedule = chz.field(default="constant", doc="linear, cosine or constant.")
    max_tokens: int = chz.field(default=256, doc="Limit of one sampled reply, in tokens.")
    temperature: float = chz.field(default=1.0, doc="Of sampling.")
    loss_fn: RLLoss = chz.field(
        default="importance_sampling",
        doc="Loss, as the service names it. Not every service has stable_reinforce; the local one "
        "has all others.",
    )
    loss_fn_config: dict[str, Any] | None = chz.field(
        default=None, doc="Its settings, e.g. clip_low_threshold and clip_high_threshold."
    )
    num_substeps: int = chz.field(default=1, doc="Optimizer steps per batch of rollouts.")
    advantage_estimator: AdvantageEstimator = chz.field(
        default="group_mean", doc="Baseline: group_mean, group_std or leave_one_out."
    )
    length_normalization: LengthNormalization = chz.field(
        default="none", doc="Divide by tokens of the trajectory, of the batch, or none."
    )
    kl_penalty_coef: float = chz.field(default=0.0, doc="Price of moving from the reference.")
    kl_discount_factor: float = chz.field(default=0.0, doc="How far ahead a token pays it.")
    compute_post_kl: bool = chz.field(
        default=False, doc="Measure how far each step moved the policy; costs a forward pass."
    )
    remove_constant_reward_groups: bool = chz.field(
        default=False, doc="Do not send groups of equal rewards: they have no gradient."
    )
    rollout_timeout_seconds: float | None = chz.field(
        default=1800.0, doc="Wall clock of one episode; a hanging environment is cut off here."
    )
    num_groups_to_log: int = chz.field(default=4, doc="Groups on a step's transcript page.")
    num_epochs: int = chz.field(default=1, doc="Passes over the data.")

    @chz.validate
    def _check(self) -> None:
        check_options(self)
        if self.kl_penalty_coef < 0 or not 0 <= self.kl_discount_factor <= 1:
            raise ConfigurationError(
                f"kl_penalty_coef={self.kl_penalty_coef}, kl_discount_factor="
                f"{self.kl_discount_factor}: use 0 or more, and 0 to 1."
            )
        group_size = getattr(self, "group_size", None)
        if group_size is not None and group_size < 2 and not self.kl_penalty_coef:
            raise ConfigurationError(
                f"group_size={group_size} gives every advantage 0; use 2 or more."
            )


@chz.chz
class Config(RunOptions):
    """Everything the loops need."""

    # Narrower than in the options: a chz object never changes, so this is safe.
    log_path: str = chz.field(munger=expand_path, doc="Run directory.")  # pyright: ignore[reportIncompatibleVariableOverride]
    model_name: str = chz.field(doc="Base model; a name or a folder.")  # pyright: ignore[reportIncompatibleVariableOverride]
    recipe_name: str = chz.field(default="rl", doc="Recorded with the session.")
    dataset_builder: RLDatasetBuilder = chz.field(doc="Makes train and held-out data.")
    evaluator_builders: list[SamplingClientEvaluatorBuilder] = chz.field(
        default_factory=list, doc="Evaluators run every eval_every steps."
    )
    kl_reference_config: KLReferenceConfig | None = chz.field(
        default=None, doc="The reference of the KL penalty."
    )
    rollout_error_tolerance: bool | RolloutStrategy | None = chz.field(
        default=None, doc="False: fail fast; True: retry; None: retry, then leave out members."
    )
    rollout_config: RolloutConfig | None = chz.field(
        default=None, doc="Limits of an episode and what follows an unreadable reply."
    )
    termination: TerminationRewardPolicy | None = chz.field(
        default=None, doc="Rewards at a limit, and grading."
    )
    async_config: AsyncConfig | None = chz.field(default=None, doc="Sample while training.")
    stream_minibatch_config: StreamMinibatchConfig | None = chz.field(
        default=None, doc="Train on groups as they finish."
    )
    rollout_json_export: bool = chz.field(default=True, doc="Write transcripts.")
    best_metric: str = chz.field(
        default="test/env/all/reward/total", doc="Its highest value marks the best checkpoint."
    )

    @chz.validate
    def _check_loops(self) -> None:
        if self.kl_penalty_coef > 0 and self.kl_reference_config is None:
            raise ConfigurationError(
                f"kl_penalty_coef={self.kl_penalty_coef} needs a reference; set "
                "kl_reference_config=KLReferenceConfig(base_model=...)."
            )
        if self.async_config is not None and self.stream_minibatch_config is not None:
            raise ConfigurationError(
                "async_config and stream_minibatch_config are both set; use one of them."
            )
        if self.async_config is not None and self.async_config.max_steps_off_policy < 0:
            raise ConfigurationError(
                f"max_steps_off_policy={self.async_config.max_steps_off_policy} is negative; use 0 "
                "(sample and train in turns) or more."
            )
        if self.stream_minibatch_config is not None:
            _check_minibatches(self.stream_minibatch_config, self.num_substeps)

    def training_loss_fn(self) -> RLLoss:
        """The loss of this run's loop."""
        chosen = self.async_config.loss_fn if self.async_config is not None else None
        return chosen or self.loss_fn

    def records_stability_info(self) -> bool:
        """Whether the loss needs more of the sampler than log probabilities."""
        return LOSSES[self.training_loss_fn()].needs_sampling_records

    def effective_termination(self) -> TerminationRewardPolicy | None:
        """Rewards at a limit: those set here, else those of the model's preset."""
        return self.rollout_settings().config.termination

    def effective_rollout_strategy(self) -> RolloutStrategy:
        """What happens when rollouts fail."""
        return self.rollout_settings().strategy

    def rollout_settings(self) -> RolloutSettings:
        """How groups are rolled out."""
        config = self.rollout_config or default_rollout_config_for_model(self.model_name)
        if config.limits.rollout_timeout_seconds is None and self.rollout_timeout_seconds:
            limits = chz.replace(
                config.limits, rollout_timeout_seconds=self.rollout_timeout_seconds
            )
            config = chz.replace(config, limits=limits)
        if self.termination is not None:
            config = chz.replace(config, termination=self.termination)
        tolerance = self.rollout_error_tolerance
        strategy = (
            default_rollout_strategy_for_model(self.model_name)
            if tolerance is None
            else rollout_strategy_from_config(tolerance)
        )
        return RolloutSettings(strategy, config)


def _check_minibatches(config: StreamMinibatchConfig, num_substeps: int) -> None:
    parts = num_substeps * config.num_minibatches
    if parts < 1 or config.groups_per_batch % parts:
        raise ConfigurationError(
            f"groups_per_batch={config.groups_per_batch} cannot be divided into num_substeps="
            f"{num_substeps} times num_minibatches={config.num_minibatches}; use a multiple of "
            f"{max(parts, 1)}."
        )
