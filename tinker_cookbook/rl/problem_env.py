"""A question, an answer, a grade: the single-turn environment most tasks need."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinker_cookbook.completers import StopCondition
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.renderers.content import get_text_content
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.types import (
    Action,
    ActionExtra,
    Env,
    EnvGroupBuilder,
    Metrics,
    Observation,
    StepResult,
    Trajectory,
)

if TYPE_CHECKING:
    from tinker_cookbook.renderers.base import Renderer

__all__ = ["ProblemEnv", "ProblemGroupBuilder", "logger"]

logger = logging.getLogger(__name__)


class ProblemEnv(Env):
    """One question; the reward is `correct + format_coef * (format - 1)`.

    A subclass says what the question is and grades the text of the reply. Grading that computes
    for long holds up all rollouts; set `grade_in_thread` there.
    """

    grade_in_thread = False

    def __init__(
        self,
        renderer: Renderer,
        convo_prefix: list[Message] | None = None,
        format_coef: float = 0.1,
        require_stop_sequence_for_format: bool = True,
    ) -> None:
        """Keep the settings.

        Args:
            renderer: Writes the prompt and reads the reply.
            convo_prefix: Messages before the question: a system prompt, solved examples.
            format_coef: What a badly formed reply costs.
            require_stop_sequence_for_format: A reply cut by the token limit is badly formed.
        """
        self.renderer = renderer
        self.convo_prefix = convo_prefix or []
        self.format_coef = format_coef
        self.require_stop_sequence_for_format = require_stop_sequence_for_format

    @property
    def stop_condition(self) -> StopCondition:
        """What ends the reply."""
        return self.renderer.get_stop_sequences()

    @abstractmethod
    def get_question(self) -> str:
        """The user's message."""

    @abstractmethod
    def check_answer(self, sample_str: str) -> float:
        """Whether a reply is right: a bool, or a number from 0 to 1 for partial credit."""

    @abstractmethod
    def check_format(self, sample_str: str) -> bool:
        """Whether a reply has the form that was asked for."""

    @abstractmethod
    def get_reference_answer(self) -> str:
        """The right answer, for the transcript."""

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        """The prompt."""
        question: Message = {"role": "user", "content": self.get_question()}
        prompt = self.renderer.build_generation_prompt([*self.convo_prefix, question])
        return prompt, self.stop_condition

    async def step(self, action: Action, *, extra: ActionExtra | None = None) -> StepResult:
        """Grade the reply; the episode is over."""
        import tinker

        message, termination = self.renderer.parse_response(action)
        text = get_text_content(message)
        ended = (
            termination.is_stop_sequence
            if self.require_stop_sequence_for_format
            else termination.is_clean or (extra or {}).get("stop_reason") == "length"
        )
        if self.grade_in_thread:
            well_formed, correct = await asyncio.to_thread(self._grade, text)
        else:
            well_formed, correct = self._grade(text)
        well_formed = float(ended and well_formed)
        return StepResult(
            reward=self.format_coef * (well_formed - 1) + correct,
            episode_done=True,
            next_observation=tinker.ModelInput.empty(),
            next_stop_condition=self.stop_condition,
            metrics={"format": well_formed, "correct": correct},
            logs={"reference_answer": self.get_reference_answer()},
        )

    def _grade(self, text: str) -> tuple[float, float]:
        return float(self.check_format(text)), float(self.check_answer(text))


@dataclass(frozen=True)
class ProblemGroupBuilder(EnvGroupBuilder):
    """The same problem several times."""

    env_thunk: Callable[[], ProblemEnv]
    """Makes one environment. To pickle, it is a `functools.partial`, not a lambda."""
    num_envs: int
    dataset_name: str = "problems"

    def __post_init__(self) -> None:
        if self.num_envs < 1:
            raise ConfigurationError(
                f"num_envs={self.num_envs} is less than 1; use 2 or more, so that the members of a "
                "group can be compared."
            )

    async def make_envs(self) -> Sequence[Env]:
        """As many environments as the group has members."""
        return [self.env_thunk() for _ in range(self.num_envs)]

    async def compute_group_rewards(
        self, trajectory_group: list[Trajectory], env_group: Sequence[Env]
    ) -> list[tuple[float, Metrics]]:
        """None: the problem's own reward is all."""
        return [(0.0, {}) for _ in trajectory_group]

    def logging_tags(self) -> list[str]:
        """The data set's name."""
        return [self.dataset_name]
