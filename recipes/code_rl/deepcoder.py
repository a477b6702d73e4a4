"""Environments for the problems of DeepCoder, as programs of the Tinker cookbook import them.

The problems come from the Hugging Face hub, or from a JSONL file (`file_path`) with `problem` and
`tests`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import chz

from tinker_cookbook.exceptions import ConfigurationError, DataFormatError
from tinker_cookbook.hub_datasets import describe_row, load_hub_table
from tinker_cookbook.renderers.base import Renderer
from tinker_cookbook.renderers.content import get_text_content
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.message_env import EnvFromMessageEnv, MessageEnv, MessageStepResult
from tinker_cookbook.rl.types import Env, EnvGroupBuilder, Logs, RLDataset, RLDatasetBuilder
from tinker_cookbook.sandbox import SandboxBackend, SandboxInterface

from .deepcoder_grading import (
    Test,
    extract_code_from_model,
    normalize_tests,
    run_tests_in_sandbox,
)
from .grading import SandboxGroup

__all__ = [
    "DeepcoderDataset",
    "DeepcoderDatasetBuilder",
    "DeepcoderEnv",
    "DeepcoderEnvGroupBuilder",
    "DeepcoderTask",
]

HUB_NAME = "agentica-org/DeepCoder-Preview-Dataset"
TRAIN_PARTS = ("primeintellect", "taco", "lcbv5")
TEST_PARTS = ("codeforces", "lcbv5")
ADVICE = "Give a local copy with file_path=problems.jsonl (`problem` and `tests` on each line)."
REQUEST = "\n\nWrite a Python program in a block of code: ```python ... ```"
STARTER_REQUEST = "\n\nComplete this code, and write all of it in a block of code:\n"


@dataclass(frozen=True)
class DeepcoderTask:
    """A problem and its tests."""

    problem: str
    tests: Sequence[Test]
    starter_code: str = ""

    def question(self) -> str:
        """Return the message of the user."""
        if self.starter_code.strip():
            return f"{self.problem}{STARTER_REQUEST}```python\n{self.starter_code}\n```"
        return self.problem + REQUEST


@dataclass
class DeepcoderEnv(MessageEnv):
    """One problem; passing all tests earns 1. While turns are left, the model sees a failure."""

    task: DeepcoderTask
    sandbox: SandboxInterface
    max_turns: int
    format_coef: float
    timeout: int
    history: list[Message] = field(default_factory=list)
    num_turns: int = 0

    async def initial_observation(self) -> list[Message]:
        """Return the problem."""
        self.history = [{"role": "user", "content": self.task.question()}]
        return self.history

    async def step(self, message: Message) -> MessageStepResult:
        """Run the tests of the problem."""
        self.num_turns += 1
        self.history = [*self.history, message]
        code = extract_code_from_model(get_text_content(message))
        failure = "there is no block of code"
        if code is not None:
            failure = await run_tests_in_sandbox(self.sandbox, self.task.tests, code, self.timeout)
        well_formed, correct = float(code is not None), float(not failure)
        metrics = {"format": well_formed, "correct": correct}
        logs: Logs = {"tests": failure}
        if not failure or self.num_turns >= self.max_turns:
            reward = correct + self.format_coef * (well_formed - 1)
            return MessageStepResult(reward, True, self.history, metrics, logs)
        request = f"That is not right: {failure}. Write the whole program again."
        self.history = [*self.history, {"role": "user", "content": request}]
        return MessageStepResult(0.0, False, self.history, metrics, logs)


@dataclass
class DeepcoderEnvGroupBuilder(SandboxGroup):
    """One problem several times, each member in its own sandbox."""

    task: DeepcoderTask
    data: DeepcoderDatasetBuilder
    num_envs: int

    async def make_envs(self) -> Sequence[Env]:
        """Make new sandboxes and environments."""
        renderer = self.data.build_renderer()
        data = self.data
        made = await self.make_sandboxes(data.sandbox_backend, self.num_envs)
        return [
            EnvFromMessageEnv(
                renderer,
                DeepcoderEnv(
                    self.task, sandbox, data.max_turns, data.format_coef, data.reward_timeout
                ),
                max_trajectory_tokens=data.max_trajectory_tokens,
            )
            for sandbox in made
        ]

    def logging_tags(self) -> list[str]:
        """Return the name of the data set."""
        return ["deepcoder"]


@dataclass(frozen=True)
class DeepcoderDataset(RLDataset):
    """Problems in batches."""

    tasks: Sequence[DeepcoderTask]
    data: DeepcoderDatasetBuilder
    group_size: int

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        """Return the groups of one step."""
        start = index * self.data.batch_size
        return [
            DeepcoderEnvGroupBuilder(task, self.data, self.group_size)
            for task in self.tasks[start : start + self.data.batch_size]
        ]

    def __len__(self) -> int:
        return len(self.tasks) // self.data.batch_size


@chz.chz
class DeepcoderDatasetBuilder(RLDatasetBuilder):
    """Builder of the training problems and the held-out ones."""

    batch_size: int
    model_name_for_tokenizer: str
    renderer_name: str
    group_size: int
    max_turns: int = 2
    format_coef: float = 0.1
    reward_timeout: int = 6
    """Time limit for all tests of one reply, in seconds."""
    sandbox_backend: SandboxBackend = SandboxBackend.LOCAL
    max_trajectory_tokens: int | None = None
    seed: int = 0
    file_path: str | None = None
    """JSONL file to read instead of the hub; no problems are held out then."""

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        """Return the training problems, shuffled, and the held-out ones, if there are any.

        Raises:
            ConfigurationError: if the problems cannot be loaded, or are too few.
        """
        if self.file_path is not None:
            from tinker_cookbook.utils.file_utils import read_jsonl

            rows = enumerate(read_jsonl(self.file_path), start=1)
            trained = [_to_task(row, f"{self.file_path}:{number}") for number, row in rows]
            held_out = []
        else:
            trained = _load("train", TRAIN_PARTS)
            held_out = _load("test", TEST_PARTS)
        if len(trained) < self.batch_size:
            raise ConfigurationError(
                f"batch_size={self.batch_size} is more than the {len(trained)} problems; use at "
                f"most {len(trained)}."
            )
        random.Random(self.seed).shuffle(trained)
        test = DeepcoderDataset(held_out, self, 1) if held_out else None
        return DeepcoderDataset(trained, self, self.group_size), test

    def build_renderer(self) -> Renderer:
        """Return the renderer."""
        from tinker_cookbook.renderers import load_renderer

        return load_renderer(self.renderer_name, self.model_name_for_tokenizer)


def _load(split: str, parts: Sequence[str]) -> list[DeepcoderTask]:
    return [
        _to_task(dict(row), f"{HUB_NAME} {part} row {i}")
        for part in parts
        for i, row in enumerate(load_hub_table(HUB_NAME, part, split, advice=ADVICE))
    ]


def _to_task(row: Mapping[str, object], where: str) -> DeepcoderTask:
    problem, tests = row.get("problem") or row.get("question"), row.get("tests")
    if not isinstance(problem, str) or tests is None:
        contents = describe_row(row, "problem", "question", "tests")
        raise DataFormatError(
            f"{where}: {contents}; needs problem (or question), a text, and tests."
        )
    metadata = row.get("metadata")
    known = metadata if isinstance(metadata, Mapping) else None
    return DeepcoderTask(problem, normalize_tests(tests, known), str(row.get("starter_code") or ""))
