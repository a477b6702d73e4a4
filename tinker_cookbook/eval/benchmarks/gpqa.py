"""GPQA Diamond: questions for experts, with four options. Source: arXiv:2311.12022.

Its authors ask that the questions are not shown in plain text on the internet.
"""

from __future__ import annotations

from tinker_cookbook.eval.benchmarks._choices import ChoiceBenchmark, ChoiceEnv, shuffle_options
from tinker_cookbook.eval.benchmarks._data import BenchmarkData, HubTable, Row
from tinker_cookbook.eval.benchmarks._registry import register

__all__ = ["GPQABenchmarkBuilder", "GPQAMessageEnv"]


def _convert(row: Row) -> Row:
    question = str(row["Question"]).strip()
    wrong = [str(row[f"Incorrect Answer {number}"]).strip() for number in (1, 2, 3)]
    options, answer = shuffle_options(str(row["Correct Answer"]).strip(), wrong, question)
    domain = row.get("High-level domain")
    return {"question": question, "options": options, "answer": answer, "domain": domain}


class GPQABenchmarkBuilder(ChoiceBenchmark):
    """GPQA Diamond; the order of the options depends on the question only."""

    name = "gpqa"
    group_key = "domain"
    data = BenchmarkData(
        name="gpqa",
        keys=("question", "options", "answer"),
        hub=HubTable("Idavidrein/gpqa", "gpqa_diamond", "train"),
        convert=_convert,
        id_key="Record ID",
    )


class GPQAMessageEnv(ChoiceEnv):
    """One question of GPQA, with its options in the prompt."""

    def __init__(
        self,
        prompt: str,
        expected: str,
        example_id: str = "",
        system_prompt: str | None = None,
    ) -> None:
        super().__init__(
            GPQABenchmarkBuilder(),
            prompt,
            expected,
            example_id=example_id,
            system_prompt=system_prompt,
        )


register(GPQABenchmarkBuilder())
