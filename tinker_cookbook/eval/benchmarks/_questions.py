"""Benchmarks of one question and one reply."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from tinker_cookbook.eval.benchmarks._common import build_messages
from tinker_cookbook.eval.benchmarks._data import BenchmarkData, Row
from tinker_cookbook.eval.benchmarks._grading import grade_in_time
from tinker_cookbook.eval.benchmarks._settings import hash_messages
from tinker_cookbook.eval.benchmarks._types import BenchmarkBuilder, BenchmarkConfig, Grade, Logs
from tinker_cookbook.renderers.content import get_text_content
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.message_env import EnvFromMessageEnv, MessageEnv, MessageStepResult

if TYPE_CHECKING:
    from tinker_cookbook.renderers.base import Renderer

__all__ = ["QuestionBenchmark", "QuestionEnv"]


class QuestionEnv(MessageEnv):
    """One question; the reply is graded by the benchmark."""

    def __init__(
        self,
        benchmark: BenchmarkBuilder,
        config: BenchmarkConfig,
        messages: list[Message],
        logs: Logs,
        example_id: str,
    ) -> None:
        """Set the question.

        Args:
            benchmark: Grades the reply.
            config: The settings of the evaluation.
            messages: The prompt.
            logs: What the grader needs, such as the expected answer; it is stored with the reply.
            example_id: The name of the example.
        """
        self.example_id = example_id
        self.prompt_key = hash_messages(messages)
        self._benchmark = benchmark
        self._config = config
        self._messages = messages
        self._logs = logs

    async def initial_observation(self) -> list[Message]:
        """Return the prompt."""
        return self._messages

    async def step(self, message: Message) -> MessageStepResult:
        """Grade the reply."""
        reply = get_text_content(message)
        grade = await grade_in_time(self._benchmark, reply, self._logs, self._config)
        metrics = {name: float(value) for name, value in grade.metrics.items()}
        return MessageStepResult(grade.reward, True, [], metrics, self._logs | grade.logs)


class QuestionBenchmark(BenchmarkBuilder):
    """A benchmark whose examples are rows of a table.

    A subclass says where the rows are (`data`), how a row becomes a question, and how a reply is
    graded from its text and the logs.
    """

    data: ClassVar[BenchmarkData]

    @abstractmethod
    def question(self, row: Row) -> str:
        """Return the user message of a row."""

    @abstractmethod
    def reference(self, row: Row) -> Logs:
        """Return what the grader needs of a row; it is stored with each reply."""

    @abstractmethod
    async def grade(self, reply: str, logs: Logs, config: BenchmarkConfig) -> Grade:
        """Grade a reply."""

    def make_envs(self, renderer: Renderer, config: BenchmarkConfig) -> Sequence[EnvFromMessageEnv]:
        """Return one environment per row."""
        found = self.data.load(config)
        system = config.system_prompt
        if system is None:
            system = self.recommended_system_prompt
        envs = [
            QuestionEnv(
                self,
                config,
                build_messages(self.question(row), system),
                self.reference(row),
                example_id,
            )
            for row, example_id in list(zip(found.rows, found.ids, strict=True))[
                : config.max_examples
            ]
        ]
        # A reply without an end marker is graded as far as it can be read.
        return [
            EnvFromMessageEnv(
                renderer,
                env,
                failed_parse_reward=0.0,
                terminate_on_parse_error=False,
                max_trajectory_tokens=config.max_trajectory_tokens,
                max_generation_tokens=config.max_generation_tokens,
                context_overflow_reward=0.0,
            )
            for env in envs
        ]

    def data_key(self, config: BenchmarkConfig) -> str:
        """Return the source of the rows."""
        return self.data.load(config).source
