"""MBPP: short Python programs with assertions, run in a sandbox. Source: arXiv:2108.07732."""

from __future__ import annotations

from tinker_cookbook.eval.benchmarks._code import grade_program
from tinker_cookbook.eval.benchmarks._data import BenchmarkData, HubTable, Row
from tinker_cookbook.eval.benchmarks._questions import QuestionBenchmark
from tinker_cookbook.eval.benchmarks._registry import register
from tinker_cookbook.eval.benchmarks._types import BenchmarkConfig, Grade, Logs
from tinker_cookbook.eval.graders.code import extract_python_code

__all__ = ["MBPPBenchmarkBuilder"]


class MBPPBenchmarkBuilder(QuestionBenchmark):
    """MBPP, sanitized; the prompt shows the assertions, as in the paper."""

    name = "mbpp"
    requires_sandbox = True
    data = BenchmarkData(
        name="mbpp",
        keys=("task_id", "prompt", "test_list"),
        hub=HubTable("google-research-datasets/mbpp", "sanitized", "test"),
        convert=lambda row: {**row, "prompt": row["text"]},
        id_key="task_id",
    )

    def question(self, row: Row) -> str:
        """Return the task and its assertions."""
        tests = "\n".join(row["test_list"])
        return (
            f"{row['prompt']}\n\nYour code must satisfy these tests:\n\n```python\n{tests}\n```\n\n"
            "Reply with one Python code block."
        )

    def reference(self, row: Row) -> Logs:
        """Return the imports of the tests and the assertions."""
        return {"test": "\n".join([*row.get("test_imports", ()), *row["test_list"]])}

    async def grade(self, reply: str, logs: Logs, config: BenchmarkConfig) -> Grade:
        """Run the assertions."""
        return await grade_program(extract_python_code(reply), str(logs["test"]), config)


register(MBPPBenchmarkBuilder())
