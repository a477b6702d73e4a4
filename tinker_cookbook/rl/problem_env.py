"""The single-turn environment: one question, one reply, one grade.

A subclass of `ProblemEnv` says what the question is and grades the reply. Where two functions are
enough, use `rl.problems` instead.
"""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    Logs,
    Metrics,
    Observation,
    StepResult,
)

if TYPE_CHECKING:
    from tinker_cookbook.renderers.base import Renderer

__all__ = ["Grade", "ProblemEnv", "ProblemGroupBuilder", "grade_step", "logger", "read_reply"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grade:
    """The grade of one reply."""

    reward: float
    """Any finite number, usually 0 to 1."""
    metrics: Metrics = field(default_factory=dict)
    """Numbers that are averaged over the batch, as `env/all/<name>`."""
    reason: str = ""
    """Why the reply has this reward, for the transcript."""
    well_formed: bool = True
    """Whether the reply has the form that was asked for; a reply without it costs a penalty."""


def read_reply(
    renderer: Renderer, action: Action, extra: ActionExtra | None, *, require_stop: bool
) -> tuple[str, bool]:
    """Parse the reply of a single turn.

    Args:
        renderer: The chat format.
        action: The sampled tokens.
        extra: What else is known about them.
        require_stop: Whether a reply counts as ended only if a stop sequence ended it. Otherwise
            a reply that the token limit cut counts too.

    Returns:
        The text without thinking and tool calls, and whether the reply ended.
    """
    message, termination = renderer.parse_response(action)
    if require_stop:
        ended = termination.is_stop_sequence
    else:
        ended = termination.is_clean or (extra or {}).get("stop_reason") == "length"
    return get_text_content(message), ended


def grade_step(
    grade: Grade,
    *,
    ended: bool,
    format_penalty: float,
    stop_condition: StopCondition,
    reference_answer: str = "",
) -> StepResult:
    """Return the last step of a single-turn episode, with the metrics `format` and `correct`.

    Args:
        grade: The grade of the reply.
        ended: Whether the reply ended as it should; one that did not is badly formed.
        format_penalty: What a badly formed reply costs.
        stop_condition: What ends a reply; the step has to repeat it.
        reference_answer: The right answer, for the transcript.
    """
    import tinker

    well_formed = float(ended and grade.well_formed)
    told = {"reference_answer": reference_answer, "reason": grade.reason}
    logs: Logs = {name: text for name, text in told.items() if text}
    return StepResult(
        reward=format_penalty * (well_formed - 1) + grade.reward,
        episode_done=True,
        next_observation=tinker.ModelInput.empty(),
        next_stop_condition=stop_condition,
        metrics={"format": well_formed, "correct": grade.reward, **grade.metrics},
        logs=logs,
    )


class ProblemEnv(Env):
    """One question; the reward is `correct + format_coef * (format - 1)`."""

    grade_in_thread = False
    """Whether to grade in a thread. A grader that computes for long would delay all rollouts."""

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
            require_stop_sequence_for_format: Whether a reply that the token limit cut counts as
                badly formed.
        """
        self.renderer = renderer
        self.convo_prefix = convo_prefix or []
        self.format_coef = format_coef
        self.require_stop_sequence_for_format = require_stop_sequence_for_format

    @property
    def stop_condition(self) -> StopCondition:
        """Return what ends the reply."""
        return self.renderer.get_stop_sequences()

    @abstractmethod
    def get_question(self) -> str:
        """Return the user's message."""

    @abstractmethod
    def check_answer(self, sample_str: str) -> float:
        """Return whether a reply is right: a bool, or 0 to 1 for partial credit."""

    @abstractmethod
    def check_format(self, sample_str: str) -> bool:
        """Return whether a reply has the form that was asked for."""

    @abstractmethod
    def get_reference_answer(self) -> str:
        """Return the right answer, for the transcript."""

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        """Return the prompt."""
        question: Message = {"role": "user", "content": self.get_question()}
        prompt = self.renderer.build_generation_prompt([*self.convo_prefix, question])
        return prompt, self.stop_condition

    async def step(self, action: Action, *, extra: ActionExtra | None = None) -> StepResult:
        """Grade the reply and end the episode."""
        text, ended = read_reply(
            self.renderer, action, extra, require_stop=self.require_stop_sequence_for_format
        )
        if self.grade_in_thread:
            grade = await asyncio.to_thread(self._grade, text)
        else:
            grade = self._grade(text)
        return grade_step(
            grade,
            ended=ended,
            format_penalty=self.format_coef,
            stop_condition=self.stop_condition,
            reference_answer=self.get_reference_answer(),
        )

    def _grade(self, text: str) -> Grade:
        well_formed = bool(self.check_format(text))
        return Grade(float(self.check_answer(text)), well_formed=well_formed)


@dataclass(frozen=True)
class ProblemGroupBuilder(EnvGroupBuilder):
    """One problem, several times."""

    env_thunk: Callable[[], ProblemEnv]
    """Makes one environment. A `functools.partial` can be pickled; a lambda cannot."""
    num_envs: int
    dataset_name: str = "problems"

    def __post_init__(self) -> None:
        if self.num_envs < 1:
            raise ConfigurationError(
                f"num_envs={self.num_envs} is less than 1; use 2 or more, so that the members of a "
                "group can be compared."
            )

    async def make_envs(self) -> Sequence[Env]:
        """Return one environment per member of the group."""
        return [self.env_thunk() for _ in range(self.num_envs)]

    def logging_tags(self) -> list[str]:
        """Return the name of the data set."""
        return [self.dataset_name]
