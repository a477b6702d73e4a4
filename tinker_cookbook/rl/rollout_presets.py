"""Named bundles of rollout settings."""

from __future__ import annotations

from tinker_cookbook.rl.rollout_limits import (
    ParseErrorPolicy,
    RolloutConfig,
    RolloutLimits,
    TerminationRewardPolicy,
    ToolExecution,
)
from tinker_cookbook.rl.rollout_strategy import MinViableGroup, RolloutStrategy

__all__ = [
    "RolloutConfig",
    "ToolExecution",
    "agentic",
    "default_rollout_config_for_model",
    "default_rollout_strategy_for_model",
    "simple",
]


def simple() -> RolloutConfig:
    """Return settings without limits other than those of the environment."""
    return RolloutConfig()


def agentic() -> RolloutConfig:
    """Return settings for long episodes with tools.

    An unreadable reply is retried once. An episode that a limit ended has reward 0.
    """
    return RolloutConfig(
        limits=RolloutLimits(max_turns=50, rollout_timeout_seconds=3600.0),
        parse_errors=ParseErrorPolicy(max_consecutive=1),
        termination=TerminationRewardPolicy(
            zero_reward_on_limit=True, skip_grading_on_timeout=True, grader_timeout_seconds=600.0
        ),
    )


def default_rollout_config_for_model(model_name: str) -> RolloutConfig:
    """Return the default settings; they are the same for every model."""
    del model_name
    return simple()


def default_rollout_strategy_for_model(model_name: str) -> RolloutStrategy:
    """Return the default strategy: a failed rollout costs a member or a group, never the batch."""
    del model_name
    return MinViableGroup()
