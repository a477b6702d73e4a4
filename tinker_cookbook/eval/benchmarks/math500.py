"""MATH-500: competition problems with boxed answers. Source: arXiv:2103.03874, arXiv:2305.20050."""

from __future__ import annotations

import asyncio

from tinker_cookbook.eval.benchmarks._common import build_messages
from tinker_cookbook.eval.benchmarks._data import BenchmarkData, HubTable, Row
from tinker_cookbook.eval.benchmarks._questions import QuestionBenchmark, QuestionEnv
from tinker_cookbook.eval.benchmarks._registry import register
from tinker_cookbook.eval.benchmarks._types import BenchmarkConfig, Grade, Logs
from tinker_cookbook.eval.graders.math_answers import check_math, extract_boxed

__all__ = ["MATH500BenchmarkBuilder", "MATH500MessageEnv"]


class MATH500BenchmarkBuilder(QuestionBenchmark):
    """MATH-500; the last box is compared by value, and with math-verify if it is installed."""

    name = "math500"
    recommended_system_prompt = "Put your final answer in \\boxed{}."
    data = BenchmarkData(
        name="math500",
        keys=("problem", "answer"),
        hub=HubTable("HuggingFaceH4/MATH-500", None, "test"),
        id_key="unique_id",
    )

    def question(self, row: Row) -> str:
        """Return the problem."""
        return str(row["problem"])

    def reference(self, row: Row) -> Logs:
        """Return the answer."""
        return {"expected": str(row["answer"])}

    async def grade(self, reply: str, logs: Logs, config: BenchmarkConfig) -> Grade:
        """Compare the boxed answer with the reference."""
        del config
        correct = await asyncio.to_thread(check_math, reply, str(logs["expected"]))
        return Grade(float(correct), logs={"extracted": extract_boxed(reply) or ""})


class MATH500MessageEnv(QuestionEnv):
    """One problem of MATH-500."""

    def __init__(
        self,
        problem: str,
        expected: str,
        example_id: str = "",
        system_prompt: str | None = None,
    ) -> None:
        super().__init__(
            MATH500BenchmarkBuilder(),
            BenchmarkConfig(),
            build_messages(problem, system_prompt),
            {"expected": expected},
            example_id,
        )


register(MATH500BenchmarkBuilder())
