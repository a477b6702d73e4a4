"""How long an episode may get, and what happens at the limit or after an unreadable reply."""

from __future__ import annotations

from typing import Literal, TypeAlias

import chz

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.rl.types import StopReason

__all__ = [
    "DEFAULT_LIMIT_STOP_REASONS",
    "DEFAULT_RETRY_MESSAGE_TEMPLATE",
    "ParseErrorPolicy",
    "RolloutConfig",
    "RolloutLimits",
    "TerminationRewardPolicy",
    "ToolExecution",
]

ToolExecution: TypeAlias = Literal["sequential", "parallel", "concurrent_safe"]
"""`concurrent_safe` runs side by side only calls of tools with `concurrent = True`."""

DEFAULT_RETRY_MESSAGE_TEMPLATE = (
    "The last reply could not be read: {details}\nWrite the whole reply again in the right format."
)


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ConfigurationError(
                f"{name}={value} is not above 0; use a positive number, or None for no limit."
            )


@chz.chz
class ParseErrorPolicy:
    """What follows a reply that the renderer cannot read."""

    max_consecutive: int = chz.field(
        default=0, doc="Unreadable replies in a row that are answered with a request to try again."
    )
    retry_message_template: str = chz.field(
        default=DEFAULT_RETRY_MESSAGE_TEMPLATE, doc="That request; {details} is what was wrong."
    )
    penalty_per_error: float = chz.field(default=0.0, doc="Taken off the reward of such a turn.")
    terminal_reward: float = chz.field(default=0.0, doc="Reward of the one that ends the episode.")
    mask_error_turns: bool = chz.field(default=False, doc="Do not train on unreadable replies.")

    @chz.validate
    def _check(self) -> None:
        if self.max_consecutive < 0 or self.penalty_per_error < 0:
            raise ConfigurationError(
                f"max_consecutive={self.max_consecutive}, "
                f"penalty_per_error={self.penalty_per_error}: both are 0 or more."
            )
        if "{details}" not in self.retry_message_template:
            raise ConfigurationError(
                f"retry_message_template={self.retry_message_template!r} has no {{details}}; "
                "without it the model is not told what was wrong."
            )


@chz.chz
class RolloutLimits:
    """Limits on one episode; None is no limit. At a limit the episode ends with what it has."""

    max_turns: int | None = chz.field(default=None, doc="Replies.")
    max_trajectory_tokens: int | None = chz.field(
        default=None, doc="Tokens of a prompt and its reply together."
    )
    max_sampled_tokens: int | None = chz.field(default=None, doc="Sampled tokens of all turns.")
    max_tool_calls: int | None = chz.field(default=None, doc="Tool calls of all turns.")
    max_turn_tokens: int | None = chz.field(default=None, doc="Sampled tokens of one turn.")
    rollout_timeout_seconds: float | None = chz.field(
        default=None, doc="Wall clock of the episode; a hanging environment is cut off here."
    )
    sampling_turn_timeout_seconds: float | None = chz.field(
        default=None, doc="Wall clock of sampling one reply; past it the rollout counts as failed."
    )

    @chz.validate
    def _check(self) -> None:
        _check_positive(
            self,
            "max_turns",
            "max_trajectory_tokens",
            "max_sampled_tokens",
            "max_tool_calls",
            "max_turn_tokens",
            "rollout_timeout_seconds",
            "sampling_turn_timeout_seconds",
        )


DEFAULT_LIMIT_STOP_REASONS: tuple[str, ...] = (
    StopReason.MAX_TOKENS,
    StopReason.MAX_SAMPLED_TOKENS,
    StopReason.MAX_TURNS,
    StopReason.MAX_TOOL_CALLS,
    StopReason.ROLLOUT_TIMEOUT,
)


@chz.chz
class TerminationRewardPolicy:
    """What an episode is worth that a limit ended, and how long grading may take."""

    zero_reward_on_limit: bool = chz.field(
        default=False, doc="Such an episode is worth 0, whatever its turns earned."
    )
    limit_stop_reasons: tuple[str, ...] = chz.field(
        default=DEFAULT_LIMIT_STOP_REASONS, doc="Stop reasons that count as a limit."
    )
    skip_grading_on_timeout: bool = chz.field(
        default=False, doc="Do not grade an episode that ran out of time."
    )
    grader_timeout_seconds: float | None = chz.field(
        default=None, doc="Wall clock of grading; past it the group counts as failed."
    )
    pass_all_messages_to_grader: bool = chz.field(
        default=False, doc="Give a tool environment's reward function the system messages too."
    )

    @chz.validate
    def _check(self) -> None:
        _check_positive(self, "grader_timeout_seconds")


@chz.chz
class RolloutConfig:
    """Everything about how one episode is run."""

    limits: RolloutLimits = chz.field(default_factory=RolloutLimits, doc="Limits on an episode.")
    parse_errors: ParseErrorPolicy | None = chz.field(
        default=None, doc="What follows an unreadable reply; None: the environment decides."
    )
    termination: TerminationRewardPolicy | None = chz.field(
        default=None, doc="Rewards at a limit, and grading; None: as the environment gives them."
    )
    tool_execution: ToolExecution = chz.field(
        default="parallel", doc="How several tool calls of one reply are run."
    )
