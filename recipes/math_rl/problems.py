"""Mathematical problems: generated sums, JSONL files, and GSM8K or MATH from the hub."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from tinker_cookbook.exceptions import DataFormatError
from tinker_cookbook.hub_datasets import check_hub_table, describe_row, load_hub_table

from .answers import AnswerNotFound, extract_boxed, extract_gsm8k_final_answer

HUB_SOURCES = {"gsm8k": ("openai/gsm8k", "main"), "math": ("nlile/hendrycks-MATH-benchmark", None)}
ADVICE = (
    "env={env} needs it: give a local copy with file_path=problems.jsonl, or use env=arithmetic."
)

QUESTION_KEYS = ("question", "problem")
ANSWER_KEYS = ("answer", "final_answer", "solution")


@dataclass(frozen=True)
class Problem:
    """A question and its answer."""

    question: str
    answer: str


def make_arithmetic(num_problems: int, seed: int, largest: int = 20) -> list[Problem]:
    """Draw random sums."""
    rng = random.Random(seed)
    pairs = [(rng.randint(0, largest), rng.randint(0, largest)) for _ in range(num_problems)]
    return [Problem(f"What is {a} + {b}?", str(a + b)) for a, b in pairs]


def read_problems(file_path: str) -> list[Problem]:
    """Read a JSONL file with `question` or `problem`, and `answer` or `solution`.

    A GSM8K answer (`... #### 12`) or a MATH solution (with a box) is reduced to its result.
    """
    from tinker_cookbook.utils.file_utils import read_jsonl

    return [to_problem(row, f"{file_path}:{i + 1}") for i, row in enumerate(read_jsonl(file_path))]


def check_source(env: str, file_path: str | None) -> None:
    """Refuse problems that cannot be loaded, before anything is started.

    Raises:
        ConfigurationError: if the hub cannot be reached and has no copy in the cache.
    """
    if file_path is None and env in HUB_SOURCES:
        check_hub_table(HUB_SOURCES[env][0], advice=ADVICE.format(env=env))


def load_hub_problems(env: str, split: str) -> list[Problem]:
    """Load GSM8K or MATH from the Hugging Face hub."""
    name, subset = HUB_SOURCES[env]
    rows = load_hub_table(name, subset, split, advice=ADVICE.format(env=env))
    return [to_problem(dict(row), f"{name} row {i}") for i, row in enumerate(rows)]


def to_problem(row: Mapping[str, object], where: str) -> Problem:
    """Return the problem that a row describes.

    Raises:
        DataFormatError: if the row has no question or no answer.
    """
    question = _first_of(row, *QUESTION_KEYS)
    answer = _first_of(row, *ANSWER_KEYS)
    if not isinstance(question, str) or not isinstance(answer, (str, int, float)):
        contents = describe_row(row, *QUESTION_KEYS, *ANSWER_KEYS)
        raise DataFormatError(
            f"{where}: {contents}; needs question (or problem), a text, and answer (or solution), "
            "a text or a number."
        )
    text = str(answer)
    for extract in (extract_gsm8k_final_answer, extract_boxed):
        try:
            text = extract(text)
        except AnswerNotFound:
            continue
    return Problem(question, text)


def _first_of(row: Mapping[str, object], *keys: str) -> object:
    """Return the first value that exists; 0 counts as a value, an empty text does not."""
    found = (row.get(key) for key in keys)
    return next((value for value in found if value is not None and value != ""), None)
