"""Arithmetic that is generated, and GSM8K or MATH from the hub or from a local file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import chz

from tinker_cookbook.exceptions import ConfigurationError, DataFormatError
from tinker_cookbook.hub_datasets import check_hub_table, load_hub_table
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.dataset_utils import RenderedDatasetBuilder
from tinker_cookbook.rl.problem_env import ProblemEnv, ProblemGroupBuilder
from tinker_cookbook.rl.types import EnvGroupBuilder, RLDataset

from .grading import (
    AnswerNotFound,
    extract_boxed,
    extract_gsm8k_final_answer,
    last_number,
    safe_grade,
)

BOXED = " Think step by step, then write the final answer as \\boxed{answer}."
SHORT_ANSWERS: list[Message] = [
    {"role": "system", "content": "Reply with the number only."},
    {"role": "user", "content": "What is 4 + 5?"},
    {"role": "assistant", "content": "9"},
]
"""Before a sum: without it a small model talks around the answer."""
HUB_SOURCES = {"gsm8k": ("openai/gsm8k", "main"), "math": ("nlile/hendrycks-MATH-benchmark", None)}
ADVICE = (
    "env={env} needs it: give a local copy with file_path=problems.jsonl, or use env=arithmetic."
)


@dataclass(frozen=True)
class Problem:
    """A question and its answer."""

    question: str
    answer: str


class MathEnv(ProblemEnv):
    """Rewards a reply whose boxed answer, or last number, equals the reference."""

    grade_in_thread = True

    def __init__(self, problem: Problem, *, boxed: bool, grader: str, **settings) -> None:
        super().__init__(**settings)
        self.problem = problem
        self.boxed = boxed
        self.grader = grader

    def get_question(self) -> str:
        """The question, with a request for a boxed answer where one is wanted."""
        return self.problem.question + (BOXED if self.boxed else "")

    def check_answer(self, sample_str: str) -> bool:
        """Whether the answer is right."""
        try:
            answer = extract_boxed(sample_str) if self.boxed else last_number(sample_str)
        except AnswerNotFound:
            return False
        return safe_grade(answer, self.problem.answer, self.grader)

    def check_format(self, sample_str: str) -> bool:
        """Whether there is an answer."""
        try:
            return bool(extract_boxed(sample_str) if self.boxed else last_number(sample_str))
        except AnswerNotFound:
            return False

    def get_reference_answer(self) -> str:
        """The reference."""
        return self.problem.answer


def make_arithmetic(num_problems: int, seed: int, largest: int = 20) -> list[Problem]:
    """Random sums."""
    rng = random.Random(seed)
    pairs = [(rng.randint(0, largest), rng.randint(0, largest)) for _ in range(num_problems)]
    return [Problem(f"What is {a} + {b}?", str(a + b)) for a, b in pairs]


def read_problems(file_path: str) -> list[Problem]:
    """Problems of a JSONL file: `question` or `problem`, and `answer` or `solution`.

    A GSM8K answer (`... #### 12`) or a MATH solution (with a box) is reduced to its result.
    """
    from tinker_cookbook.utils.file_utils import read_jsonl

    return [to_problem(row, f"{file_path}:{i + 1}") for i, row in enumerate(read_jsonl(file_path))]


def check_source(env: str, file_path: str | None) -> None:
    """Refuse problems that cannot be had, before anything is started for them."""
    if file_path is None and env in HUB_SOURCES:
        check_hub_table(HUB_SOURCES[env][0], advice=ADVICE.format(env=env))


def load_hub_problems(env: str, split: str) -> list[Problem]:
    """GSM8K or MATH from the Hugging Face hub."""
    name, subset = HUB_SOURCES[env]
    rows = load_hub_table(name, subset, split, advice=ADVICE.format(env=env))
    return [to_problem(dict(row), f"{name} row {i}") for i, row in enumerate(rows)]


def to_problem(row: dict, where: str) -> Problem:
    """The problem of a row.

    Raises:
        DataFormatError: if the row has no question or no answer.
    """
    question = _first_of(row, "question", "problem")
    answer = _first_of(row, "answer", "final_answer", "solution")
    if not isinstance(question, str) or not isinstance(answer, (str, int, float)):
        raise DataFormatError(
            f"{where}: has the keys {sorted(row)}; needs question (or problem) and answer (or "
            "solution)."
        )
    text = str(answer)
    for extract in (extract_gsm8k_final_answer, extract_boxed):
        try:
            text = extract(text)
        except AnswerNotFound:
            continue
    return Problem(question, text)


def _first_of(row: dict, *keys: str) -> object:
    """The first value that is there; 0 is a value, an empty text is none."""
    found = (row.get(key) for key in keys)
    return next((value for value in found if value is not None and value != ""), None)


class MathDataset(RLDataset):
    """Problems in batches; the last partial batch is left out."""

    def __init__(self, problems: Sequence[Problem], data: MathDatasetBuilder, size: int) -> None:
        self._problems = problems
        self._data = data
        self._size = size
        self._renderer = data.build_renderer()

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        """The groups of one step."""
        boxed = self._data.env != "arithmetic"
        shown = SHORT_ANSWERS if self._data.include_fewshot and not boxed else None
        return [
            ProblemGroupBuilder(
                partial(
                    MathEnv,
                    problem,
                    boxed=boxed,
                    grader=self._data.grader,
                    convo_prefix=shown,
                    renderer=self._renderer,
                ),
                self._data.group_size,
                self._data.env,
            )
            for problem in self._problems[index * self._size : (index + 1) * self._size]
        ]

    def __len__(self) -> int:
        return len(self._problems) // self._size


@chz.chz
class MathDatasetBuilder(RenderedDatasetBuilder):
    """The training problems and some held-out ones."""

    env: Literal["arithmetic", "gsm8k", "math"]
    file_path: str | None = None
    num_problems: int = 1024
    test_size: int = 64
    grader: Literal["numeric", "math_verify"] = "numeric"
    include_fewshot: bool = True

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        """Shuffled; the held-out problems come first and are not trained on."""
        if self.file_path is not None:
            problems = read_problems(self.file_path)
        elif self.env == "arithmetic":
            problems = make_arithmetic(self.num_problems + self.test_size, self.seed)
        else:
            problems = load_hub_problems(self.env, "train")
        problems = list(dict.fromkeys(problems))  # the same sum twice must not be in both parts
        random.Random(self.seed).shuffle(problems)
        if len(problems) < self.test_size + self.groups_per_batch:
            raise ConfigurationError(
                f"{len(problems)} problems are too few for test_size={self.test_size} and "
                f"groups_per_batch={self.groups_per_batch}; use smaller ones or more problems."
            )
        held_out, trained = problems[: self.test_size], problems[self.test_size :]
        test = MathDataset(held_out, self, self.test_size) if held_out else None
        return MathDataset(trained, self, self.groups_per_batch), test
