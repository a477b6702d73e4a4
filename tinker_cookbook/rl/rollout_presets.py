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
    """No limits beyond those of the environment: for single-turn tasks."""
    return RolloutConfig()


def agentic() -> RolloutConfig:
    """For long tool-using episodes: one retry after an unreadable reply, nothing for a timeout."""
    return RolloutConfig(
        limits=RolloutLimits(max_turns=50, rollout_timeout_seconds=3600.0),
        parse_errors=ParseErrorPolicy(max_consecutive=1),
        termination=TerminationRewardPolicy(
            zero_reward_on_limit=True, skip_grading_on_timeout=True, grader_timeout_seconds=600.0
        ),
    )


def default_rollout_config_for_model(model_name: str) -> RolloutConfig:
    """The settings where none are given; the same for every model."""
    del model_name
    return simple()


def default_rollout_strategy_for_model(model_name: str) -> RolloutStrategy:
    """What happens to failing rollouts where nothing is said: lose members, never the batch."""
    del model_name
    return MinViableGroup()
