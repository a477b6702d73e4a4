"""The settings of an RL run."""

from __future__ import annotations

import math
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
from tinker_cookbook.rl.credit import Credit, CreditAssignment
from tinker_cookbook.rl.rollout_correction import RolloutCorrection
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
from tinker_cookbook.utils.nearest_name import did_you_mean

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
    """The reference model of the KL penalty."""

    base_model: str = chz.field(doc="Base model that the service offers.")
    load_checkpoint_path: str | None = chz.field(
        default=None, doc="Sampler weights (tinker://...); None: the base model itself."
    )


@chz.chz
class StreamMinibatchConfig:
    """Train on groups as they finish, instead of waiting for the whole batch."""

    groups_per_batch: int = chz.field(doc="Groups per step, the same number as the data has.")
    num_minibatches: int = chz.field(doc="Gradient requests per optimizer step.")


@chz.chz
class AsyncConfig:
    """Sample and train at the same time."""

    max_steps_off_policy: int = chz.field(
        doc="Maximum age, in steps, of the weights with which a group was sampled."
    )
    groups_per_batch: int = chz.field(doc="Groups per step.")
    loss_fn: RLLoss | None = chz.field(
        default=None, doc="Name of the loss function; None: the loss of the run."
    )


@chz.chz
class RunOptions(SharedOptions):
    """Sampling, loss and advantages; a recipe's config adds its own settings."""

    lr_schedule: LRSchedule = "constant"
    max_tokens: int = chz.field(default=256, doc="Maximum number of tokens per reply.")
    temperature: float = chz.field(default=1.0, doc="Sampling temperature.")
    loss_fn: RLLoss = chz.field(
        default="importance_sampling",
        doc="Name of the loss function on the service. Not every service has stable_reinforce; "
        "the local one has all others.",
    )
    loss_fn_config: dict[str, Any] | None = chz.field(
        default=None,
        doc="Parameters of the loss function, e.g. clip_low_threshold and clip_high_threshold.",
    )
    num_substeps: int = chz.field(default=1, doc="Number of optimizer steps per batch of rollouts.")
    advantage_estimator: AdvantageEstimator = chz.field(
        default="group_mean",
        doc="Baseline of the advantages: group_mean, group_std (also divides by the standard "
        "deviation) or leave_one_out.",
    )
    length_normalization: LengthNormalization = chz.field(
        default="none",
        doc="Length by which advantages are divided: tokens of the trajectory, tokens of the "
        "batch, or none.",
    )
    kl_penalty_coef: float = chz.field(
        default=0.0, doc="Coefficient of the KL penalty towards a reference model; 0: no penalty."
    )
    kl_discount_factor: float = chz.field(
        default=0.0,
        doc="Discount factor of the KL penalties of later tokens; 0: a token pays only its own.",
    )
    compute_post_kl: bool = chz.field(
        default=False,
        doc="Whether to measure how far each step moved the policy, with one more forward pass.",
    )
    remove_constant_reward_groups: bool = chz.field(
        default=False,
        doc="Whether to leave out groups in which all rewards are equal; they have no gradient.",
    )
    max_refill_rounds: int = chz.field(
        default=0,
        doc="How often a step samples groups again instead of those with equal rewards; needs "
        "remove_constant_reward_groups.",
    )
    train_truncated: bool = chz.field(
        default=True, doc="Whether to train on replies that the token limit cut."
    )
    overlong_buffer: int = chz.field(
        default=0,
        doc="Number of tokens before max_tokens in which a reply loses reward, linearly; 0: none.",
    )
    overlong_penalty: float = chz.field(
        default=1.0, doc="What a reply with max_tokens tokens loses, with overlong_buffer."
    )
    credit: CreditAssignment = chz.field(
        default="trajectory",
        doc="What has one advantage: a trajectory, or each turn, by what it earned from then on.",
    )
    turn_discount: float = chz.field(
        default=1.0, doc="Discount factor of the rewards of later turns, with credit=turn."
    )
    rollout_correction: RolloutCorrection = chz.field(
        default="none",
        doc="Weights for samples of an older or different policy: token_truncate, token_mask, "
        "sequence_truncate or sequence_mask.",
    )
    correction_limit: float = chz.field(
        default=2.0, doc="Largest weight of rollout_correction; above 1."
    )
    rollout_timeout_seconds: float | None = chz.field(
        default=1800.0, doc="Maximum seconds per episode; a slower environment is stopped."
    )
    num_groups_to_log: int = chz.field(
        default=4, doc="Number of groups on the transcript page of a step."
    )
    num_epochs: int = chz.field(default=1, doc="Number of passes over the data.")
    early_stopping_evals: int = chz.field(
        default=0,
        doc="Number of evaluations without a better best_metric after which the run stops; 0: it "
        "does not stop early.",
    )

    @chz.validate
    def _check(self) -> None:
        group_size = getattr(self, "group_size", None)
        if group_size is not None and group_size < 2 and not self.kl_penalty_coef:
            raise ConfigurationError(
                f"group_size={group_size} gives every advantage 0; use 2 or more."
            )
        check_options(self)
        if self.kl_penalty_coef < 0 or not 0 <= self.kl_discount_factor <= 1:
            raise ConfigurationError(
                f"kl_penalty_coef={self.kl_penalty_coef} must be 0 or more and kl_discount_factor="
                f"{self.kl_discount_factor} must be between 0 and 1."
            )


@chz.chz
class Config(RunOptions):
    """All settings of the RL loops."""

    # The type is narrower than in the options. This is safe, since chz objects never change.
    log_path: str = chz.field(munger=expand_path, doc="Run directory.")  # pyright: ignore[reportIncompatibleVariableOverride]
    model_name: str = chz.field(doc="Base model to train, as a name or a folder.")  # pyright: ignore[reportIncompatibleVariableOverride]
    recipe_name: str = chz.field(default="rl", doc="Name recorded with the session.")
    dataset_builder: RLDatasetBuilder = chz.field(doc="Builder of the training and held-out data.")
    evaluator_builders: list[SamplingClientEvaluatorBuilder] = chz.field(
        default_factory=list, doc="Builders of evaluators that run every eval_every steps."
    )
    kl_reference_config: KLReferenceConfig | None = chz.field(
        default=None, doc="Reference model of the KL penalty."
    )
    rollout_error_tolerance: bool | RolloutStrategy | None = chz.field(
        default=None,
        doc="What a failed rollout does. False: stops the run; True: is retried; None: is retried, "
        "then left out of its group.",
    )
    rollout_config: RolloutConfig | None = chz.field(
        default=None, doc="Limits of an episode, and the effect of an unreadable reply."
    )
    termination: TerminationRewardPolicy | None = chz.field(
        default=None, doc="Rewards and grading of an episode that reaches a limit."
    )
    async_config: AsyncConfig | None = chz.field(
        default=None, doc="Settings for sampling and training at the same time; None: in turns."
    )
    stream_minibatch_config: StreamMinibatchConfig | None = chz.field(
        default=None, doc="Settings for training on groups as they finish; None: on whole batches."
    )
    rollout_json_export: bool = chz.field(default=True, doc="Whether to write transcripts.")
    best_metric: str = chz.field(
        default="test/env/all/reward/total",
        doc="Name of the metric that marks the best checkpoint; the lowest value of a loss is "
        "best, the highest of anything else.",
    )

    @chz.validate
    def _check_refill(self) -> None:
        if self.max_refill_rounds and not self.remove_constant_reward_groups:
            raise ConfigurationError(
                f"max_refill_rounds={self.max_refill_rounds} replaces the groups that "
                "remove_constant_reward_groups=True leaves out; set that too."
            )
        if self.max_refill_rounds and (self.async_config or self.stream_minibatch_config):
            raise ConfigurationError(
                f"max_refill_rounds={self.max_refill_rounds} works in the synchronous loop only; "
                "leave out async_config and stream_minibatch_config, or use 0."
            )

    @chz.validate
    def _check_early_stopping(self) -> None:
        if self.early_stopping_evals and (self.async_config or self.stream_minibatch_config):
            raise ConfigurationError(
                f"early_stopping_evals={self.early_stopping_evals} works in the synchronous loop "
                "only; leave out async_config and stream_minibatch_config, or use 0."
            )

    @chz.validate
    def _check_credit(self) -> None:
        if not 0 <= self.overlong_buffer <= self.max_tokens:
            raise ConfigurationError(
                f"overlong_buffer={self.overlong_buffer} must be between 0 and max_tokens="
                f"{self.max_tokens}."
            )
        if self.overlong_penalty < 0 or not 0 <= self.turn_discount <= 1:
            raise ConfigurationError(
                f"overlong_penalty={self.overlong_penalty} must be 0 or more and turn_discount="
                f"{self.turn_discount} must be between 0 and 1."
            )
        if not 1 < self.correction_limit < math.inf:
            raise ConfigurationError(f"correction_limit={self.correction_limit} must be above 1.")

    @chz.validate
    def _check_loss(self) -> None:
        loss_fn = self.training_loss_fn()
        if loss_fn not in LOSSES:
            raise ConfigurationError(
                f"loss_fn={loss_fn} is unknown; use one of {', '.join(LOSSES)}."
                f"{did_you_mean(loss_fn, LOSSES)}"
            )

    @chz.validate
    def _check_loops(self) -> None:
        if self.needs_kl_reference() and self.kl_reference_config is None:
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

    def needs_kl_reference(self) -> bool:
        """Whether the loop compares the policy with `kl_reference_config`."""
        return self.kl_penalty_coef > 0

    def training_loss_fn(self) -> RLLoss:
        """The loss of this run's loop."""
        chosen = self.async_config.loss_fn if self.async_config is not None else None
        return chosen or self.loss_fn

    def records_stability_info(self) -> bool:
        """Whether the loss needs more of the sampler than log probabilities."""
        return LOSSES[self.training_loss_fn()].needs_sampling_records

    def credit_settings(self) -> Credit:
        """How rewards become advantages."""
        return Credit(
            estimator=self.advantage_estimator,
            length_normalization=self.length_normalization,
            assignment=self.credit,
            turn_discount=self.turn_discount,
            max_tokens=self.max_tokens,
            overlong_buffer=self.overlong_buffer,
            overlong_penalty=self.overlong_penalty,
        )

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
