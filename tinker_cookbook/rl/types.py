"""The types of reinforcement learning: environments, groups of them, and records of rollouts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias, TypedDict

import chz

from tinker_cookbook.completers import StopCondition, TokensWithLogprobs

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.utils import logtree

__all__ = [
    "PARSE_ERROR_MASKED_METRIC_KEY",
    "STOP_METRIC_PREFIX",
    "Action",
    "ActionExtra",
    "Env",
    "EnvGroupBuilder",
    "InitialObservationOverflow",
    "Logprobs",
    "Logs",
    "Metrics",
    "Observation",
    "RLDataset",
    "RLDatasetBuilder",
    "RolloutError",
    "StepResult",
    "StopReason",
    "Trajectory",
    "TrajectoryGroup",
    "Transition",
    "stop_metric",
]

Action: TypeAlias = list[int]
"""The sampled tokens of one turn."""
Observation: TypeAlias = "tinker.ModelInput"
"""The whole prompt of one turn."""
Logprobs: TypeAlias = list[float]
Metrics: TypeAlias = dict[str, float | int]
Logs: TypeAlias = dict[str, str | int | float]
"""Texts and numbers for the transcript; unlike metrics, they are not averaged."""


class StopReason(StrEnum):
    """Why an episode ended."""

    COMPLETED = "completed"
    TOOL_STOPPED = "tool_stopped"
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"
    MAX_SAMPLED_TOKENS = "max_sampled_tokens"
    MAX_TOOL_CALLS = "max_tool_calls"
    CONTEXT_OVERFLOW = "context_overflow"
    PARSE_ERROR = "parse_error"
    ROLLOUT_TIMEOUT = "rollout_timeout"


STOP_METRIC_PREFIX = "stop/"
"""`stop/<reason>` = 1 among a turn's metrics tells why the episode ended."""


def stop_metric(reason: str) -> str:
    """Return the metric that names the reason why an episode ended."""
    return f"{STOP_METRIC_PREFIX}{reason}"


PARSE_ERROR_MASKED_METRIC_KEY = "parse_error_masked"
"""A turn with this metric at 1 or more is kept as context and not trained."""


@dataclass(frozen=True)
class InitialObservationOverflow:
    """An episode without turns: returned instead of a first prompt that is too long."""

    reward: float
    metrics: Metrics = field(default_factory=dict)
    logs: Logs = field(default_factory=dict)


@dataclass
class StepResult:
    """The environment's answer to an action."""

    reward: float
    episode_done: bool
    next_observation: Observation
    """The whole next prompt; ignored, and possibly empty, if the episode is done."""
    next_stop_condition: StopCondition
    metrics: Metrics = field(default_factory=dict)
    logs: Logs = field(default_factory=dict)


@dataclass
class Transition:
    """One turn: the prompt, the reply, and the environment's answer to it."""

    ob: Observation
    ac: TokensWithLogprobs
    reward: float
    episode_done: bool
    metrics: Metrics = field(default_factory=dict)
    logs: Logs = field(default_factory=dict)


class ActionExtra(TypedDict, total=False):
    """What is known about an action in addition to its tokens."""

    stop_reason: tinker.StopReason


class Env(ABC):
    """One episode of one agent. An environment is used once."""

    @abstractmethod
    async def initial_observation(
        self,
    ) -> tuple[Observation, StopCondition] | InitialObservationOverflow:
        """Return the first prompt and what ends a reply to it."""

    @abstractmethod
    async def step(self, action: Action, *, extra: ActionExtra | None = None) -> StepResult:
        """Take a reply, including its stop token, and return the reward and the next prompt."""


@dataclass(frozen=True)
class Trajectory:
    """The record of one episode."""

    transitions: list[Transition]
    final_ob: Observation
    stop_reason: str | None = None


@dataclass(frozen=True)
class RolloutError:
    """Why a rollout was lost."""

    error_type: str
    error_message: str


class EnvGroupBuilder(ABC):
    """Makes the environments of one group: one task several times, to compare the rewards.

    A builder is data: it can be pickled, and building twice gives the same task.
    """

    @abstractmethod
    async def make_envs(self) -> Sequence[Env]:
        """Return new environments, one per member of the group."""

    async def compute_group_rewards(
        self, trajectory_group: list[Trajectory], env_group: Sequence[Env]
    ) -> list[tuple[float, Metrics]]:
        """Return rewards that depend on the whole group; they are added to those of the turns."""
        return [(0.0, {}) for _ in trajectory_group]

    async def cleanup(self) -> None:  # noqa: B027 - most builders open nothing
        """Free what `make_envs` opened; called once when the group is done, even if it failed."""

    def logging_tags(self) -> list[str]:
        """Return names under which the metrics of this group are also averaged separately."""
        return []


@dataclass
class TrajectoryGroup:
    """The record of a group; entry i of each list belongs to trajectory i."""

    trajectories_G: list[Trajectory]
    final_rewards_G: list[float]
    """The rewards from `compute_group_rewards`."""
    metrics_G: list[Metrics]
    rollout_errors: list[RolloutError] = field(default_factory=list)
    """Errors of members that were lost or retried; this list has its own length."""
    report: logtree.Trace | None = field(default=None, repr=False, compare=False)
    """What the environments logged with `utils.logtree`; None if the caller has opened a trace."""

    def get_total_rewards(self) -> list[float]:
        """Return the sum of turn rewards and group reward of each trajectory."""
        return [
            sum(transition.reward for transition in trajectory.transitions) + final_reward
            for trajectory, final_reward in zip(
                self.trajectories_G, self.final_rewards_G, strict=True
            )
        ]


class RLDataset(ABC):
    """Batches of groups by index, so that a resumed run finds the same batches."""

    @abstractmethod
    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        """Return the groups of one training step."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of batches."""


@chz.chz
class RLDatasetBuilder:
    """Makes the training data and, optionally, held-out data."""

    @abstractmethod
    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        """Return training data and held-out data, or None for the latter."""
        raise NotImplementedError
