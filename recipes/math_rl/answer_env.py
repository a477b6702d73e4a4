"""The environment of this recipe: a problem, and a reward for the right answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Literal

import chz

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.dataset_utils import RenderedDatasetBuilder
from tinker_cookbook.rl.problem_env import ProblemEnv, ProblemGroupBuilder
from tinker_cookbook.rl.types import EnvGroupBuilder, RLDataset

from .answers import AnswerNotFound, extract_boxed, last_number, safe_grade
from .problems import Problem, load_hub_problems, make_arithmetic, read_problems

BOXED = " Think step by step, then write the final answer as \\boxed{answer}."
SHORT_ANSWERS: list[Message] = [
    {"role": "system", "content": "Reply with the number only."},
    {"role": "user", "content": "What is 4 + 5?"},
    {"role": "assistant", "content": "9"},
]
"""Messages before a sum; without them a small model writes more than the number."""


class AnswerEnv(ProblemEnv):
    """One problem; a reply is right if its boxed answer, or its last number, is the reference."""

    grade_in_thread = True

    def __init__(self, problem: Problem, *, boxed: bool, grader: str, **settings) -> None:
        super().__init__(**settings)
        self.problem = problem
        self.boxed = boxed
        self.grader = grader

    def get_question(self) -> str:
        """Return the question, with a request for a boxed answer if `boxed`."""
        return self.problem.question + (BOXED if self.boxed else "")

    def check_answer(self, sample_str: str) -> bool:
        """Return whether the answer is right."""
        try:
            answer = extract_boxed(sample_str) if self.boxed else last_number(sample_str)
        except AnswerNotFound:
            return False
        return safe_grade(answer, self.problem.answer, self.grader)

    def check_format(self, sample_str: str) -> bool:
        """Return whether the reply has an answer."""
        try:
            return bool(extract_boxed(sample_str) if self.boxed else last_number(sample_str))
        except AnswerNotFound:
            return False

    def get_reference_answer(self) -> str:
        """Return the reference."""
        return self.problem.answer


class AnswerDataset(RLDataset):
    """Problems in batches; an incomplete last batch is left out."""

    def __init__(self, problems: Sequence[Problem], data: AnswerDatasetBuilder, size: int) -> None:
        self._problems = problems
        self._data = data
        self._size = size
        self._renderer = data.build_renderer()

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        """Return the groups of one step."""
        boxed = self._data.env != "arithmetic"
        shown = SHORT_ANSWERS if self._data.include_fewshot and not boxed else None
        return [
            ProblemGroupBuilder(
                partial(
                    AnswerEnv,
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
class AnswerDatasetBuilder(RenderedDatasetBuilder):
    """Builder of the training problems and the held-out ones."""

    env: Literal["arithmetic", "gsm8k", "math"]
    file_path: str | None = None
    num_problems: int = 1024
    test_size: int = 64
    grader: Literal["numeric", "math_verify"] = "numeric"
    include_fewshot: bool = True

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        """Shuffle the problems; the first ones are held out.

        Raises:
            ConfigurationError: if there are too few problems.
        """
        if self.file_path is not None:
            problems = read_problems(self.file_path)
        elif self.env == "arithmetic":
            problems = make_arithmetic(self.num_problems + self.test_size, self.seed)
        else:
            problems = load_hub_problems(self.env, "train")
        problems = list(dict.fromkeys(problems))  # no problem is in both parts
        random.Random(self.seed).shuffle(problems)
        if len(problems) < self.test_size + self.groups_per_batch:
            raise ConfigurationError(
                f"{len(problems)} different problems are too few for test_size={self.test_size} "
                f"and groups_per_batch={self.groups_per_batch}; use smaller ones or more problems."
            )
        held_out, trained = problems[: self.test_size], problems[self.test_size :]
        test = AnswerDataset(held_out, self, self.test_size) if held_out else None
        return AnswerDataset(trained, self, self.groups_per_batch), test
