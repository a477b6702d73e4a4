"""Settings of an episode: its limits, and what follows a limit or a reply that cannot be read."""

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
"""`concurrent_safe` runs calls in parallel only if their tools have `concurrent = True`."""

DEFAULT_RETRY_MESSAGE_TEMPLATE = (
    "The last reply could not be read: {details}\nWrite the whole reply again in the right format."
)


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ConfigurationError(
                f"{name}={value} must be greater than 0; use None for no limit."
            )


@chz.chz
class ParseErrorPolicy:
    """What follows a reply that the renderer cannot parse."""

    max_consecutive: int = chz.field(
        default=0,
        doc="Maximum number of such replies in a row that are answered with a request to retry.",
    )
    retry_message_template: str = chz.field(
        default=DEFAULT_RETRY_MESSAGE_TEMPLATE,
        doc="Text of that request; {details} says what was wrong.",
    )
    penalty_per_error: float = chz.field(
        default=0.0, doc="Penalty on the reward of each such turn."
    )
    terminal_reward: float = chz.field(
        default=0.0, doc="Reward of the unreadable reply that ends the episode."
    )
    mask_error_turns: bool = chz.field(
        default=False, doc="Whether to leave unreadable replies out of training."
    )

    @chz.validate
    def _check(self) -> None:
        if self.max_consecutive < 0 or self.penalty_per_error < 0:
            raise ConfigurationError(
                f"max_consecutive={self.max_consecutive}, "
                f"penalty_per_error={self.penalty_per_error}: both must be 0 or greater."
            )
        if "{details}" not in self.retry_message_template:
            raise ConfigurationError(
                f"retry_message_template={self.retry_message_template!r} must contain {{details}}, "
                "which tells the model what was wrong."
            )


@chz.chz
class RolloutLimits:
    """Limits on one episode; None means unlimited. At a limit the episode ends with its turns."""

    max_turns: int | None = chz.field(default=None, doc="Maximum number of replies.")
    max_trajectory_tokens: int | None = chz.field(
        default=None, doc="Maximum tokens of a prompt and its reply together."
    )
    max_sampled_tokens: int | None = chz.field(
        default=None, doc="Maximum sampled tokens of all turns together."
    )
    max_tool_calls: int | None = chz.field(
        default=None, doc="Maximum tool calls of all turns together."
    )
    max_turn_tokens: int | None = chz.field(default=None, doc="Maximum sampled tokens of one turn.")
    rollout_timeout_seconds: float | None = chz.field(
        default=None, doc="Maximum seconds of an episode; an environment that hangs is ended."
    )
    sampling_turn_timeout_seconds: float | None = chz.field(
        default=None, doc="Maximum seconds to sample one reply; after that the rollout fails."
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
    """The reward of an episode that a limit ended, and the time for grading."""

    zero_reward_on_limit: bool = chz.field(
        default=False, doc="Whether such an episode has reward 0, whatever its turns earned."
    )
    limit_stop_reasons: tuple[str, ...] = chz.field(
        default=DEFAULT_LIMIT_STOP_REASONS, doc="Stop reasons that count as a limit."
    )
    skip_grading_on_timeout: bool = chz.field(
        default=False, doc="Whether to leave an episode that ran out of time ungraded."
    )
    grader_timeout_seconds: float | None = chz.field(
        default=None, doc="Maximum seconds of grading; after that the group fails."
    )
    pass_all_messages_to_grader: bool = chz.field(
        default=False,
        doc="Whether the reward function of a tool environment also gets the system messages.",
    )

    @chz.validate
    def _check(self) -> None:
        _check_positive(self, "grader_timeout_seconds")


@chz.chz
class RolloutConfig:
    """All settings of how one episode is run."""

    limits: RolloutLimits = chz.field(default_factory=RolloutLimits, doc="Limits on an episode.")
    parse_errors: ParseErrorPolicy | None = chz.field(
        default=None, doc="What follows an unreadable reply; None: the environment decides."
    )
    termination: TerminationRewardPolicy | None = chz.field(
        default=None, doc="Rewards at a limit and time for grading; None: no special rules."
    )
    tool_execution: ToolExecution = chz.field(
        default="parallel", doc="Order in which the tool calls of one reply are run."
    )
