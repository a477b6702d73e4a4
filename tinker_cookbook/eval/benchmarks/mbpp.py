"""MBPP: short Python programs with assertions, run in a sandbox. Source: arXiv:2108.07732."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from tinker_cookbook.eval.benchmarks._code import SandboxMixin, grade_program
from tinker_cookbook.eval.benchmarks._common import build_messages
from tinker_cookbook.eval.benchmarks._data import BenchmarkData, HubTable, Row
from tinker_cookbook.eval.benchmarks._questions import QuestionBenchmark, QuestionEnv
from tinker_cookbook.eval.benchmarks._registry import register
from tinker_cookbook.eval.benchmarks._types import BenchmarkConfig, Grade, Logs
from tinker_cookbook.eval.graders.code import extract_python_code

if TYPE_CHECKING:
    from tinker_cookbook.sandbox import SandboxInterface

__all__ = ["MBPPBenchmarkBuilder", "MBPPMessageEnv"]


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


class MBPPMessageEnv(SandboxMixin, QuestionEnv):
    """One task of MBPP; the reply's program runs in a sandbox that the environment makes."""

    def __init__(
        self,
        prompt: str,
        task_prompt: str,
        test_list: Sequence[str],
        sandbox_factory: Callable[[], SandboxInterface | Awaitable[SandboxInterface]] | None,
        example_id: str = "",
        system_prompt: str | None = None,
    ) -> None:
        """Set the task.

        Args:
            prompt: The user message.
            task_prompt: The description of the task alone, which is stored with the reply.
            test_list: The assertions.
            sandbox_factory: Makes the sandbox; None: a local one.
            example_id: The name of the example.
            system_prompt: The system prompt, if there is one.
        """
        super().__init__(
            MBPPBenchmarkBuilder(),
            BenchmarkConfig(sandbox_factory=self.keep_sandbox(sandbox_factory)),
            build_messages(prompt, system_prompt),
            {"test": "\n".join(test_list), "task": task_prompt},
            example_id,
        )


register(MBPPBenchmarkBuilder())
