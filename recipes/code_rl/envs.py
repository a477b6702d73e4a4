"""The environment of this recipe: write code, see a failing test, write again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import chz

from tinker_cookbook.renderers.content import get_text_content
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.dataset_utils import NumberedDataset, RenderedDatasetBuilder
from tinker_cookbook.rl.message_env import EnvFromMessageEnv, MessageEnv, MessageStepResult
from tinker_cookbook.rl.types import Env, RLDataset
from tinker_cookbook.sandbox import SandboxBackend, SandboxInterface

from .grading import SandboxGroup, extract_code, run_tests
from .problems import Problem, split_problems

NO_CODE_REWARD = -0.1
PARTLY_RIGHT = 0.5
EXAMPLE: list[Message] = [
    {"role": "system", "content": "Reply with the code only."},
    {"role": "user", "content": "Write a Python function solve(a, b) that returns a minus b."},
    {"role": "assistant", "content": "```python\ndef solve(a, b):\n    return a - b\n```"},
]


@dataclass
class CodeEnv(MessageEnv):
    """One problem. Passing every test earns 1, passing some of them up to a half."""

    problem: Problem
    sandbox: SandboxInterface
    max_turns: int
    timeout_seconds: int
    history: list[Message] = field(default_factory=list)
    num_turns: int = 0

    async def initial_observation(self) -> list[Message]:
        """Return a solved example and the problem."""
        self.history = [*EXAMPLE, {"role": "user", "content": self.problem.question()}]
        return self.history

    async def step(self, message: Message) -> MessageStepResult:
        """Run the tests; the model sees a failure and tries again while turns are left."""
        self.num_turns += 1
        self.history = [*self.history, message]
        code = extract_code(get_text_content(message))
        if code is None:
            return self._answer(NO_CODE_REWARD, "there is no function solve", {"format": 0.0})
        verdict = await run_tests(self.sandbox, self.problem, code, self.timeout_seconds)
        passed = verdict.share_passed
        metrics = {"format": 1.0, "tests_passed": passed, "correct": float(passed == 1.0)}
        reward = 1.0 if passed == 1.0 else PARTLY_RIGHT * passed
        return self._answer(reward, verdict.problem, metrics)

    def _answer(self, reward: float, failure: str, metrics: dict[str, float]) -> MessageStepResult:
        metrics = {"correct": 0.0, "tests_passed": 0.0} | metrics
        if not failure or self.num_turns >= self.max_turns:
            return MessageStepResult(reward, True, self.history, metrics, {"tests": failure})
        request = f"That is not right: {failure}. Write the whole function again."
        self.history = [*self.history, {"role": "user", "content": request}]
        # A failed attempt earns 0 if another follows; otherwise failing twice would pay.
        return MessageStepResult(0.0, False, self.history, metrics, {"tests": failure})


@dataclass
class CodeGroup(SandboxGroup):
    """One problem several times, each member in its own sandbox."""

    data: CodeDatasetBuilder
    held_out: bool
    number: int

    async def make_envs(self) -> Sequence[Env]:
        """Make new sandboxes and environments for the same problem."""
        renderer = self.data.build_renderer()
        problem = self.problem()
        made = await self.make_sandboxes(self.data.sandbox, self.data.group_size)
        return [
            EnvFromMessageEnv(
                renderer,
                CodeEnv(problem, sandbox, self.data.max_turns, self.data.timeout_seconds),
                context_overflow_reward=NO_CODE_REWARD,
            )
            for sandbox in made
        ]

    def logging_tags(self) -> list[str]:
        """Return the kind of problem."""
        return [self.problem().kind]

    def problem(self) -> Problem:
        """Return the problem of this number."""
        problems = split_problems()[self.held_out]
        return problems[(self.number + self.data.seed * 1009) % len(problems)]


@chz.chz
class CodeDatasetBuilder(RenderedDatasetBuilder):
    """Builder of the training problems and the held-out ones."""

    num_batches: int
    max_turns: int = 1
    sandbox: SandboxBackend = SandboxBackend.LOCAL
    timeout_seconds: int = 5
    test_problems: int = 0

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        """Return the training problems and the held-out ones."""
        trained = NumberedDataset(
            partial(CodeGroup, self, False),
            num_batches=self.num_batches,
            groups_per_batch=self.groups_per_batch,
        )
        if not self.test_problems:
            return trained, None
        held_out = NumberedDataset(
            partial(CodeGroup, chz.replace(self, group_size=2, seed=0), True),
            num_batches=1,
            groups_per_batch=self.test_problems,
        )
        return trained, held_out
