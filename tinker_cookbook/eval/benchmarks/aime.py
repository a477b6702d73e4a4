"""AIME: competition problems whose answer is a whole number from 0 to 999, by year."""

from __future__ import annotations

from tinker_cookbook.eval.benchmarks._common import build_messages
from tinker_cookbook.eval.benchmarks._data import BenchmarkData, HubTable, Row
from tinker_cookbook.eval.benchmarks._questions import QuestionBenchmark, QuestionEnv
from tinker_cookbook.eval.benchmarks._registry import register
from tinker_cookbook.eval.benchmarks._types import BenchmarkConfig, Grade, Logs
from tinker_cookbook.eval.graders.math_answers import extract_boxed
from tinker_cookbook.eval.graders.numbers import extract_gsm8k_answer, extract_number

__all__ = ["AIMEBenchmarkBuilder", "AIMEMessageEnv", "extract_aime_answer"]


def extract_aime_answer(reply: str) -> int | None:
    r"""Return the whole number in the last `\boxed{}`, or else the last number of the reply."""
    boxed = extract_boxed(reply)
    text = extract_number(boxed) if boxed is not None else extract_gsm8k_answer(reply)
    try:
        value = float(text)
    except ValueError:
        return None
    return int(value) if value.is_integer() else None


class AIMEBenchmarkBuilder(QuestionBenchmark):
    """The two exams of one year: 30 problems."""

    recommended_system_prompt = "Put your final answer, a whole number, in \\boxed{}."

    def __init__(self, name: str, year: int) -> None:
        """Set the name in the registry, and the year."""
        self.name = name
        self.data = BenchmarkData(  # pyright: ignore[reportAttributeAccessIssue]
            name=name,
            keys=("problem", "answer"),
            hub=HubTable(f"MathArena/aime_{year}", None, "train"),
            id_key="problem_idx",
        )

    def question(self, row: Row) -> str:
        """Return the problem."""
        return str(row["problem"])

    def reference(self, row: Row) -> Logs:
        """Return the answer as a number; in some tables it has leading zeros."""
        return {"expected": int(str(row["answer"]).strip())}

    async def grade(self, reply: str, logs: Logs, config: BenchmarkConfig) -> Grade:
        """Compare the numbers."""
        del config
        found = extract_aime_answer(reply)
        return Grade(float(found == logs["expected"]), logs={"extracted": str(found)})


class AIMEMessageEnv(QuestionEnv):
    """One problem of an exam."""

    def __init__(
        self,
        problem: str,
        expected: int,
        example_id: str = "",
        system_prompt: str | None = None,
    ) -> None:
        super().__init__(
            AIMEBenchmarkBuilder("aime", 2025),
            BenchmarkConfig(),
            build_messages(problem, system_prompt),
            {"expected": expected},
            example_id,
        )


register(AIMEBenchmarkBuilder("aime_2025", 2025))
register(AIMEBenchmarkBuilder("aime_2026", 2026))
register(AIMEBenchmarkBuilder("aime", 2025))
