"""MMLU-Pro: multiple choice with up to ten options, by reply. Source: arXiv:2406.01574."""

from __future__ import annotations

from tinker_cookbook.eval.benchmarks._data import BenchmarkData, HubTable, Row
from tinker_cookbook.eval.benchmarks._questions import QuestionBenchmark
from tinker_cookbook.eval.benchmarks._registry import register
from tinker_cookbook.eval.benchmarks._types import BenchmarkConfig, Grade, Logs
from tinker_cookbook.eval.graders.choices import (
    LETTERS,
    extract_mcq_answer,
    format_mcq_choices,
)

__all__ = ["MMLUProBenchmarkBuilder"]

INSTRUCTION = 'Think as long as you need, then end with "The answer is (X)", where X is the letter.'


class MMLUProBenchmarkBuilder(QuestionBenchmark):
    """MMLU-Pro; a reply that names no letter is wrong."""

    name = "mmlu_pro"
    data = BenchmarkData(
        name="mmlu_pro",
        keys=("question", "options", "answer"),
        hub=HubTable("TIGER-Lab/MMLU-Pro", None, "test"),
        id_key="question_id",
    )

    def question(self, row: Row) -> str:
        """Return the question with lettered options."""
        return f"{row['question']}\n\n{format_mcq_choices(row['options'])}\n\n{INSTRUCTION}"

    def reference(self, row: Row) -> Logs:
        """Return the right letter and the letters that are valid."""
        return {"expected": str(row["answer"]), "letters": LETTERS[: len(row["options"])]}

    async def grade(self, reply: str, logs: Logs, config: BenchmarkConfig) -> Grade:
        """Compare the letters."""
        del config
        letter = extract_mcq_answer(reply, str(logs["letters"]))
        found: Logs = {"extracted": letter}
        return Grade(float(letter == logs["expected"]), {"has_answer": float(bool(letter))}, found)


register(MMLUProBenchmarkBuilder())
