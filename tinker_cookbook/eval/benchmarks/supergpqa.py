"""SuperGPQA: graduate questions of 285 disciplines, with up to ten options. Source: 2502.14739."""

from __future__ import annotations

from tinker_cookbook.eval.benchmarks._choices import ChoiceBenchmark, ChoiceEnv
from tinker_cookbook.eval.benchmarks._data import BenchmarkData, HubTable, Row
from tinker_cookbook.eval.benchmarks._registry import register

__all__ = ["SuperGPQABenchmarkBuilder", "SuperGPQAMessageEnv"]


def _convert(row: Row) -> Row:
    return {**row, "options": list(row["options"]), "letter": str(row["answer_letter"])}


class SuperGPQABenchmarkBuilder(ChoiceBenchmark):
    """SuperGPQA, with a metric per discipline. `answer` is the text, `answer_letter` the letter."""

    name = "supergpqa"
    group_key = "discipline"
    data = BenchmarkData(
        name="supergpqa",
        keys=("question", "options", "letter"),
        hub=HubTable("m-a-p/SuperGPQA", None, "train"),
        convert=_convert,
        id_key="uuid",
    )

    def reference(self, row: Row) -> dict[str, str | int | float]:
        """Return the right letter, the letters that are valid, and the discipline."""
        return super().reference({**row, "answer": row["letter"]})


class SuperGPQAMessageEnv(ChoiceEnv):
    """One question of SuperGPQA, with its options in the prompt."""

    def __init__(
        self,
        prompt: str,
        expected: str,
        valid_letters: str = "ABCD",
        discipline: str = "",
        example_id: str = "",
        system_prompt: str | None = None,
    ) -> None:
        super().__init__(
            SuperGPQABenchmarkBuilder(),
            prompt,
            expected,
            letters=valid_letters,
            group=discipline,
            example_id=example_id,
            system_prompt=system_prompt,
        )


register(SuperGPQABenchmarkBuilder())
