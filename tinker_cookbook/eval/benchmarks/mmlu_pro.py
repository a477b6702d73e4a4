"""MMLU-Pro: multiple choice with up to ten options, by reply. Source: arXiv:2406.01574."""

from __future__ import annotations

from tinker_cookbook.eval.benchmarks._choices import ChoiceBenchmark, ChoiceEnv
from tinker_cookbook.eval.benchmarks._data import BenchmarkData, HubTable
from tinker_cookbook.eval.benchmarks._registry import register

__all__ = ["MMLUProBenchmarkBuilder", "MMLUProMessageEnv"]


class MMLUProBenchmarkBuilder(ChoiceBenchmark):
    """MMLU-Pro, with a metric per category."""

    name = "mmlu_pro"
    group_key = "category"
    data = BenchmarkData(
        name="mmlu_pro",
        keys=("question", "options", "answer"),
        hub=HubTable("TIGER-Lab/MMLU-Pro", None, "test"),
        id_key="question_id",
    )


class MMLUProMessageEnv(ChoiceEnv):
    """One question of MMLU-Pro, with its options in the prompt."""

    def __init__(
        self,
        prompt: str,
        expected: str,
        valid_letters: str,
        example_id: str = "",
        system_prompt: str | None = None,
    ) -> None:
        super().__init__(
            MMLUProBenchmarkBuilder(),
            prompt,
            expected,
            letters=valid_letters,
            example_id=example_id,
            system_prompt=system_prompt,
        )


register(MMLUProBenchmarkBuilder())
