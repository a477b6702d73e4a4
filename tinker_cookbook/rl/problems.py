"""An environment from two functions: `problems(split)` and `grade(reply, problem)`.

    def problems(split: str) -> list[Problem]:
        return [Problem("What is 2 + 3?", "5"), ...]      # other problems for split="test"

    def grade(reply: str, problem: Problem) -> float:
        return float(problem.answer in reply)

    Data = problem_data(problems, grade)

`Data` is a data set builder that every RL loop and recipe takes. The problems of the split "test"
are held out. A problem may be any object that has a `question`; see `ProblemLike`. If problems can
be made without end, `generated_data(draw, grade)` asks `draw(split, rng)` for one at a time.

Tasks of several turns are made the same way: `episode_data(problems, environment)`, where
`environment(problem, renderer)` returns a `MessageEnv` or an `Env`.

docs/adding_an_environment.md shows all three kinds of environments in full.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import chz

from tinker_cookbook.completers import StopCondition
from tinker_cookbook.exceptions import ConfigurationError, DataValidationError
from tinker_cookbook.renderers.base import Renderer
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.dataset_utils import GroupsDataset, RenderedDatasetBuilder
from tinker_cookbook.rl.message_env import EnvFromMessageEnv, MessageEnv
from tinker_cookbook.rl.problem_env import Grade, grade_step, read_reply
from tinker_cookbook.rl.types import (
    Action,
    ActionExtra,
    Env,
    EnvGroupBuilder,
    Observation,
    RLDataset,
    StepResult,
)

__all__ = [
    "GeneratedDatasetBuilder",
    "Grade",
    "Problem",
    "ProblemDatasetBuilder",
    "ProblemLike",
    "SingleTurn",
    "episode_data",
    "generated_data",
    "problem_data",
]

logger = logging.getLogger(__name__)


class ProblemLike(Protocol):
    """A problem: a `question`, and whatever the grader needs.

    Two further attributes are used where a problem has them: `answer`, a text that transcripts
    show as the reference, and `tags`, names under which metrics are also averaged separately.
    """

    @property
    def question(self) -> str | list[Message]:
        """The user's message, or a whole conversation that the reply continues."""
        ...


@dataclass(frozen=True)
class Problem:
    """A question and its answer; enough for most tasks."""

    question: str | list[Message]
    answer: str = ""
    tags: tuple[str, ...] = ()


# A grader and an environment take the type of problem that `problems` returns, whatever it is.
GradeResult: TypeAlias = float | Grade
GradeFunction: TypeAlias = Callable[[str, Any], GradeResult | Awaitable[GradeResult]]
ProblemsFunction: TypeAlias = Callable[[str], Sequence[Any]]
DrawFunction: TypeAlias = Callable[[str, random.Random], Any]
EnvironmentFunction: TypeAlias = Callable[
    [Any, Renderer], Env | MessageEnv | Awaitable[Env | MessageEnv]
]


@dataclass(frozen=True)
class SingleTurn:
    """Makes the environment of one question and one graded reply."""

    grade: GradeFunction
    """Grades the text of a reply: a number, or a `Grade` with metrics and a reason. May be async.

    An error it raises costs that rollout only, and is recorded with the rollout.
    """
    system_prompt: str = ""
    """The system message; "" for none."""
    examples: Sequence[tuple[str, str]] = ()
    """Solved examples (question, reply) that come before every question."""
    format_penalty: float = 0.1
    """What a reply costs that the token limit cut, or whose grade says it is not well formed."""
    in_thread: bool = False
    """Whether to grade in a thread. A grader that computes for long would delay all rollouts."""

    def __call__(self, problem: ProblemLike, renderer: Renderer) -> Env:
        """Return a new environment for a problem."""
        return _SingleTurnEnv(self, problem, renderer)

    def build_conversation(self, problem: ProblemLike) -> list[Message]:
        """Return the messages from which the reply is sampled."""
        messages: list[Message] = []
        if self.system_prompt:
            messages.append({"role": "system", "content": self.system_prompt})
        for question, reply in self.examples:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": reply})
        if isinstance(problem.question, str):
            return [*messages, {"role": "user", "content": problem.question}]
        return [*messages, *problem.question]


@chz.chz
class ProblemDatasetBuilder(RenderedDatasetBuilder):
    """Training and held-out problems, and the environment in which each is solved."""

    problems: ProblemsFunction = chz.field(
        doc='Returns the problems of a split, "train" or "test"; an empty list for none.'
    )
    environment: EnvironmentFunction = chz.field(
        doc="Makes the environment of a problem: environment(problem, renderer)."
    )
    name: str = chz.field(default="problems", doc="Tag of all problems that have none.")
    max_test_problems: int = chz.field(default=64, doc="Maximum number of held-out problems.")
    test_group_size: int = chz.field(default=1, doc="Replies sampled per held-out problem.")

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        """Return the training problems, shuffled, and the first problems of the split "test"."""
        trained = list(await asyncio.to_thread(self.problems, "train"))
        held_out = list(await asyncio.to_thread(self.problems, "test"))[: self.max_test_problems]
        if len(trained) < self.groups_per_batch:
            raise ConfigurationError(
                f"groups_per_batch={self.groups_per_batch} is more than the {len(trained)} "
                f"problems of {_name_of(self.problems)}('train'); use a smaller number or more "
                "problems."
            )
        _warn_of_overlap(trained, held_out)
        random.Random(self.seed).shuffle(trained)
        renderer = self.build_renderer()
        groups = [self.make_group(problem, renderer, self.group_size) for problem in trained]
        train_data = GroupsDataset(groups, self.groups_per_batch)
        if not held_out:
            return train_data, None
        groups = [self.make_group(problem, renderer, self.test_group_size) for problem in held_out]
        return train_data, GroupsDataset(groups, len(groups))

    def make_group(
        self, problem: ProblemLike, renderer: Renderer, group_size: int
    ) -> EnvGroupBuilder:
        """Return the builder of the environments in which one problem is solved."""
        return _ProblemGroup(self.environment, renderer, self.name, problem, group_size)


@chz.chz
class GeneratedDatasetBuilder(RenderedDatasetBuilder):
    """Problems that a function makes one at a time; equal seeds give equal problems."""

    num_batches: int = chz.field(doc="Number of training steps.")
    draw: DrawFunction = chz.field(
        doc='Makes a problem of a split, "train" or "test", from random numbers: draw(split, rng).'
    )
    environment: EnvironmentFunction = chz.field(
        doc="Makes the environment of a problem: environment(problem, renderer)."
    )
    name: str = chz.field(default="problems", doc="Tag of all problems that have none.")
    test_problems: int = chz.field(default=32, doc="Number of held-out problems.")
    test_group_size: int = chz.field(default=4, doc="Replies sampled per held-out problem.")

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        """Return the training problems, and held-out ones that stay the same in every step."""
        renderer = self.build_renderer()
        trained = _DrawnDataset(self, renderer, self.num_batches)
        if not self.test_problems:
            return trained, None
        held_out = chz.replace(
            self,
            seed=self.seed + 1_000_003,
            groups_per_batch=self.test_problems,
            group_size=self.test_group_size,
        )
        return trained, _DrawnDataset(held_out, renderer, 1, "test")


class _DrawnDataset(RLDataset):
    """Batches that are drawn from the seed and their index."""

    def __init__(
        self,
        data: GeneratedDatasetBuilder,
        renderer: Renderer,
        num_batches: int,
        split: str = "train",
    ) -> None:
        self._data, self._renderer = data, renderer
        self._num_batches, self._split = num_batches, split

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        data, rng = self._data, random.Random(f"{self._data.seed}/{index}")
        problems = [data.draw(self._split, rng) for _ in range(data.groups_per_batch)]
        settings = data.environment, self._renderer, data.name
        return [_ProblemGroup(*settings, problem, data.group_size) for problem in problems]

    def __len__(self) -> int:
        return self._num_batches


def problem_data(
    problems: ProblemsFunction,
    grade: GradeFunction,
    *,
    name: str = "problems",
    system_prompt: str = "",
    examples: Sequence[tuple[str, str]] = (),
    format_penalty: float = 0.1,
    in_thread: bool = False,
) -> type[ProblemDatasetBuilder]:
    """Return the data set builder of a single-turn task.

    Args:
        problems: Returns the problems of a split, "train" or "test".
        grade: Grades a reply: `grade(reply, problem)`.
        name: A tag for metrics.
        system_prompt: The system message.
        examples: Solved examples (question, reply) before every question.
        format_penalty: What a reply costs that did not end, or is not well formed.
        in_thread: Whether to grade in a thread.

    Returns:
        A class. Its fields without a default are `model_name`, `renderer_name`, `groups_per_batch`
        and `group_size`, which a recipe fills in.
    """
    single_turn = SingleTurn(grade, system_prompt, examples, format_penalty, in_thread)
    return episode_data(problems, single_turn, name=name)


def episode_data(
    problems: ProblemsFunction, environment: EnvironmentFunction, *, name: str = "problems"
) -> type[ProblemDatasetBuilder]:
    """Return the data set builder of a task with any kind of environment.

    Args:
        problems: Returns the problems of a split, "train" or "test".
        environment: Returns a new environment, and may be async: `environment(problem, renderer)`.
            An environment that has an async method `cleanup` is cleaned up with its group.
        name: A tag for metrics.
    """
    given = problems, environment, name

    @chz.chz
    class Data(ProblemDatasetBuilder):
        problems: ProblemsFunction = chz.field(default=given[0], doc="Problems of a split.")
        environment: EnvironmentFunction = chz.field(
            default=given[1], doc="Environment of a problem."
        )
        name: str = chz.field(default=given[2], doc="Tag of all problems that have none.")

    return Data


def generated_data(
    draw: DrawFunction, grade: GradeFunction, *, name: str = "problems", **single_turn: Any
) -> type[GeneratedDatasetBuilder]:
    """Return the data set builder of a single-turn task whose problems are made without end.

    Args:
        draw: Makes one problem: `draw(split, rng)`. Take all random numbers from `rng`.
        grade: Grades a reply: `grade(reply, problem)`.
        name: A tag for metrics.
        single_turn: Other fields of `SingleTurn`, such as `system_prompt`.
    """
    given = draw, SingleTurn(grade, **single_turn), name

    @chz.chz
    class Data(GeneratedDatasetBuilder):
        draw: DrawFunction = chz.field(default=given[0], doc="Makes one problem.")
        environment: EnvironmentFunction = chz.field(
            default=given[1], doc="Environment of a problem."
        )
        name: str = chz.field(default=given[2], doc="Tag of all problems that have none.")

    return Data


class _SingleTurnEnv(Env):
    """One question and one reply."""

    def __init__(self, settings: SingleTurn, problem: ProblemLike, renderer: Renderer) -> None:
        self._settings = settings
        self._problem = problem
        self._renderer = renderer

    async def initial_observation(self) -> tuple[Observation, StopCondition]:
        conversation = self._settings.build_conversation(self._problem)
        prompt = self._renderer.build_generation_prompt(conversation)
        return prompt, self._renderer.get_stop_sequences()

    async def step(self, action: Action, *, extra: ActionExtra | None = None) -> StepResult:
        text, ended = read_reply(self._renderer, action, extra, require_stop=True)
        return grade_step(
            await self._grade(text),
            ended=ended,
            format_penalty=self._settings.format_penalty,
            stop_condition=self._renderer.get_stop_sequences(),
            reference_answer=str(getattr(self._problem, "answer", "")),
        )

    async def _grade(self, text: str) -> Grade:
        grade = self._settings.grade
        if self._settings.in_thread:
            result = await asyncio.to_thread(grade, text, self._problem)
        else:
            result = grade(text, self._problem)
        if inspect.isawaitable(result):
            result = await result
        if isinstance(result, Grade):
            return result
        try:
            return Grade(float(result))
        except (TypeError, ValueError) as error:
            raise DataValidationError(
                f"{_name_of(grade)} returned {result!r}; return a number or a Grade."
            ) from error


@dataclass
class _ProblemGroup(EnvGroupBuilder):
    """One problem, several times. It can be pickled if the functions and the problem can."""

    environment: EnvironmentFunction
    renderer: Renderer
    name: str
    problem: ProblemLike
    num_envs: int
    made: list[Env | MessageEnv] = field(default_factory=list)

    async def make_envs(self) -> Sequence[Env]:
        return [await self._make_env() for _ in range(self.num_envs)]

    async def _make_env(self) -> Env:
        made = self.environment(self.problem, self.renderer)
        if inspect.isawaitable(made):
            made = await made
        self.made.append(made)
        if isinstance(made, Env):
            return made
        if isinstance(made, MessageEnv):
            return EnvFromMessageEnv(self.renderer, made)
        raise DataValidationError(
            f"{_name_of(self.environment)} returned {type(made).__name__}; return a MessageEnv or "
            "an Env."
        )

    async def cleanup(self) -> None:
        """Clean up all environments that can be, also those of failed attempts."""
        while self.made:
            clean = getattr(self.made.pop(), "cleanup", None)
            if clean is not None:
                await clean()

    def logging_tags(self) -> list[str]:
        return list(getattr(self.problem, "tags", ())) or [self.name]


def _warn_of_overlap(trained: Sequence[ProblemLike], held_out: Sequence[ProblemLike]) -> None:
    """Say if a held-out problem is trained on; its reward would not measure what was learned."""
    questions = {str(problem.question) for problem in trained}
    shared = sum(str(problem.question) in questions for problem in held_out)
    if shared:
        logger.warning(
            "%d of %d held-out problems have a question that is trained on too",
            shared,
            len(held_out),
        )


def _name_of(function: object) -> str:
    return getattr(function, "__name__", type(function).__name__)
