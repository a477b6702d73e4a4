"""MATH, GSM8K, POLARIS and DeepMath, as programs of the Tinker cookbook import them.

The problems come from the Hugging Face hub, or from a JSONL file (`file_path`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Literal

import chz

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.hub_datasets import load_hub_table
from tinker_cookbook.renderers.base import Renderer
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.rl.problem_env import ProblemEnv, ProblemGroupBuilder
from tinker_cookbook.rl.types import EnvGroupBuilder, RLDataset, RLDatasetBuilder

from . import answers
from .answers import AnswerNotFound, extract_boxed, extract_gsm8k_final_answer
from .problems import Problem, read_problems, to_problem

__all__ = [
    "DeepMathDatasetBuilder",
    "Gsm8kDatasetBuilder",
    "MathDataset",
    "MathDatasetBuilder",
    "MathEnv",
    "PolarisDatasetBuilder",
    "ProblemGroupBuilder",
    "extract_gsm8k_final_answer",
    "get_math_dataset_builder",
    "safe_grade",
]

QUESTION_SUFFIX = " Write your answer in \\boxed{} format."
ADVICE = "Give a local copy with file_path=problems.jsonl (`question` and `answer` on each line)."


def safe_grade(
    given_answer: str, ground_truth: str, grader: str = "sympy", timeout: float = 1.0
) -> bool:
    """Return whether an answer equals the reference, within limits of time and memory.

    Args:
        given_answer: The answer of the reply.
        ground_truth: The reference.
        grader: `sympy` (numbers, texts, and expressions if math-verify is installed),
            `math_verify` (which needs that package) or `numeric`.
        timeout: Seconds of processor time; a comparison that takes longer counts as wrong.
    """
    return answers.safe_grade(given_answer, ground_truth, grader, timeout)


class MathEnv(ProblemEnv):
    """One problem; the model must write the answer in a box."""

    grade_in_thread = True

    def __init__(
        self,
        problem: str,
        answer: str,
        renderer: Renderer,
        convo_prefix: list[Message] | None = None,
        grader: Literal["sympy", "math_verify", "numeric"] = "sympy",
        timeout: float = 1.0,
        **settings,
    ) -> None:
        super().__init__(renderer, convo_prefix, **settings)
        self.problem = problem
        self.answer = answer
        self.grader = grader
        self.timeout = timeout

    @classmethod
    def question_suffix(cls) -> str:
        """Return the text that follows every question."""
        return QUESTION_SUFFIX

    @classmethod
    def standard_fewshot_prefix(cls) -> list[Message]:
        """Return a solved problem, for models that do not know boxes."""
        question = "How often does the letter e occur in the word seventeen?"
        reply = "Letter by letter: s, e (1), v, e (2), n, t, e (3), e (4), n. \\boxed{4}"
        return [
            {"role": "user", "content": question + cls.question_suffix()},
            {"role": "assistant", "content": reply},
        ]

    def get_question(self) -> str:
        """Return the problem with the request for a box."""
        return self.problem + self.question_suffix()

    def check_format(self, sample_str: str) -> bool:
        """Return whether the reply has a box."""
        try:
            extract_boxed(sample_str)
        except AnswerNotFound:
            return False
        return True

    def check_answer(self, sample_str: str) -> bool:
        """Return whether the box holds the right answer."""
        try:
            answer = extract_boxed(sample_str)
        except AnswerNotFound:
            return False
        return safe_grade(answer, self.answer, self.grader, self.timeout)

    def get_reference_answer(self) -> str:
        """Return the reference."""
        return self.answer


class MathDataset(RLDataset):
    """Problems in batches; an incomplete last batch is left out, unless it is the only one."""

    def __init__(
        self, problems: Sequence[Problem], data: MathDatasetBuilder, group_size: int
    ) -> None:
        self._problems = problems
        self._data = data
        self._group_size = group_size
        self._renderer = data.build_renderer()

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        """Return the groups of one step."""
        start = index * self._data.batch_size
        return [self._group(p) for p in self._problems[start : start + self._data.batch_size]]

    def __len__(self) -> int:
        return max(len(self._problems) // self._data.batch_size, min(len(self._problems), 1))

    def _group(self, problem: Problem) -> ProblemGroupBuilder:
        given = self._data.convo_prefix
        prefix = MathEnv.standard_fewshot_prefix() if given == "standard" else given
        make = partial(
            MathEnv, problem.question, problem.answer, self._renderer, convo_prefix=prefix
        )
        return ProblemGroupBuilder(make, self._group_size, self._data.dataset_name())


@chz.chz
class MathDatasetBuilder(RLDatasetBuilder):
    """MATH: 12,000 training problems; the 500 problems of MATH-500 are held out."""

    batch_size: int
    model_name_for_tokenizer: str
    renderer_name: str
    group_size: int
    convo_prefix: list[Message] | Literal["standard"] | None = "standard"
    seed: int = 0
    file_path: str | None = None
    """JSONL file to read instead of the hub; no problems are held out then."""

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        """Return the training problems, shuffled, and the held-out ones, if there are any.

        Raises:
            ConfigurationError: if there are too few problems, or they cannot be loaded.
        """
        trained, held_out = self.load_problems()
        random.Random(self.seed).shuffle(trained)
        if len(trained) < self.batch_size:
            raise ConfigurationError(
                f"batch_size={self.batch_size} is more than the {len(trained)} problems of "
                f"{self.dataset_name()}; use at most {len(trained)}."
            )
        test = MathDataset(held_out, self, group_size=1) if held_out else None
        return MathDataset(trained, self, self.group_size), test

    def build_renderer(self) -> Renderer:
        """Return the renderer."""
        from tinker_cookbook.renderers import load_renderer

        return load_renderer(self.renderer_name, self.model_name_for_tokenizer)

    def load_problems(self) -> tuple[list[Problem], list[Problem]]:
        """Load the training problems and the held-out ones."""
        if self.file_path is not None:
            return read_problems(self.file_path), []
        trained, held_out = self.sources()
        return self._load(*trained), [] if held_out is None else self._load(*held_out)

    @staticmethod
    def dataset_name() -> str:
        """Return the tag of the groups."""
        return "math"

    def sources(self) -> tuple[tuple[str, str | None, str], tuple[str, str | None, str] | None]:
        """Return hub id, configuration and split of the training and of the held-out problems."""
        table = "nlile/hendrycks-MATH-benchmark"
        return (table, None, "train"), (table, None, "test")

    def _load(self, name: str, subset: str | None, split: str) -> list[Problem]:
        rows = load_hub_table(name, subset, split, advice=ADVICE)
        return [to_problem(dict(row), f"{name} row {i}") for i, row in enumerate(rows)]


@chz.chz
class Gsm8kDatasetBuilder(MathDatasetBuilder):
    """GSM8K: 7,473 training problems, 1,319 held-out ones."""

    @staticmethod
    def dataset_name() -> str:
        return "gsm8k"

    def sources(self) -> tuple[tuple[str, str | None, str], tuple[str, str | None, str] | None]:
        return ("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")


@chz.chz
class PolarisDatasetBuilder(MathDatasetBuilder):
    """POLARIS: 53,000 training problems, none held out."""

    @staticmethod
    def dataset_name() -> str:
        return "polaris"

    def sources(self) -> tuple[tuple[str, str | None, str], tuple[str, str | None, str] | None]:
        return ("POLARIS-Project/Polaris-Dataset-53K", None, "train"), None


@chz.chz
class DeepMathDatasetBuilder(MathDatasetBuilder):
    """DeepMath: 103,000 training problems, none held out."""

    @staticmethod
    def dataset_name() -> str:
        return "deepmath"

    def sources(self) -> tuple[tuple[str, str | None, str], tuple[str, str | None, str] | None]:
        return ("zwhe99/DeepMath-103K", None, "train"), None


_BUILDERS: dict[str, type[MathDatasetBuilder]] = {
    "math": MathDatasetBuilder,
    "polaris": PolarisDatasetBuilder,
    "deepmath": DeepMathDatasetBuilder,
    "gsm8k": Gsm8kDatasetBuilder,
}


def get_math_dataset_builder(
    dataset_name: str,
    batch_size: int,
    model_name_for_tokenizer: str,
    renderer_name: str,
    group_size: int,
    seed: int = 0,
) -> RLDatasetBuilder:
    """Return the builder of `math`, `polaris`, `deepmath` or `gsm8k`.

    Raises:
        ConfigurationError: for any other name.
    """
    builder = _BUILDERS.get(dataset_name)
    if builder is None:
        raise ConfigurationError(
            f"dataset_name={dataset_name!r} is unknown; use one of {', '.join(_BUILDERS)}."
        )
    return builder(
        batch_size=batch_size,
        model_name_for_tokenizer=model_name_for_tokenizer,
        renderer_name=renderer_name,
        group_size=group_size,
        seed=seed,
    )
