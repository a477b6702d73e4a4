"""MMLU-Redux: questions of MMLU that experts found to be right. Source: arXiv:2406.04127."""

from __future__ import annotations

from tinker_cookbook.eval.benchmarks._choices import ChoiceBenchmark, ChoiceEnv
from tinker_cookbook.eval.benchmarks._data import BenchmarkData, HubTable, Row
from tinker_cookbook.eval.benchmarks._registry import register
from tinker_cookbook.eval.benchmarks.mmlu import SUBJECTS
from tinker_cookbook.eval.graders.choices import LETTERS

__all__ = ["MMLUReduxBenchmarkBuilder", "MMLUReduxMessageEnv"]


def _convert(row: Row) -> Row:
    return {**row, "options": list(row["choices"]), "answer": LETTERS[int(row["answer"])]}


class MMLUReduxBenchmarkBuilder(ChoiceBenchmark):
    """MMLU-Redux 2.0 without the questions marked as faulty, with a metric per subject."""

    name = "mmlu_redux"
    group_key = "subject"
    data = BenchmarkData(
        name="mmlu_redux",
        keys=("question", "options", "answer"),
        hub=HubTable("edinburgh-dawg/mmlu-redux-2.0", SUBJECTS, "test"),
        convert=_convert,
        keep=lambda row: row.get("error_type", "ok") == "ok",
    )


class MMLUReduxMessageEnv(ChoiceEnv):
    """One question of MMLU-Redux, with its options in the prompt."""

    def __init__(
        self,
        prompt: str,
        expected: str,
        subject: str,
        example_id: str = "",
        system_prompt: str | None = None,
    ) -> None:
        super().__init__(
            MMLUReduxBenchmarkBuilder(),
            prompt,
            expected,
            group=subject,
            example_id=example_id,
            system_prompt=system_prompt,
        )


register(MMLUReduxBenchmarkBuilder())
