"""Benchmarks of prompts with instructions that programs check: IFEval and IFBench."""

from __future__ import annotations

import asyncio
import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from tinker_cookbook.eval.benchmarks._data import Row
from tinker_cookbook.eval.benchmarks._questions import QuestionBenchmark, QuestionEnv
from tinker_cookbook.eval.benchmarks._types import (
    BenchmarkConfig,
    BenchmarkResult,
    Grade,
    Logs,
    Metrics,
)
from tinker_cookbook.renderers.content import get_text_content
from tinker_cookbook.renderers.types import Message

__all__ = ["InstructionBenchmark", "InstructionEnv", "Verdict"]

Verdict = tuple[bool, bool]
"""Whether a reply obeys an instruction strictly, and loosely."""


class InstructionBenchmark(QuestionBenchmark):
    """Rows with `prompt`, `instruction_id_list` and `kwargs` (one object per instruction).

    A reply is correct if it obeys all instructions strictly. The metrics are those of the IFEval
    paper: `prompt_strict`, `prompt_loose`, and over all instructions `inst_strict`, `inst_loose`.
    """

    @abstractmethod
    def check(
        self, reply: str, prompt: str, ids: Sequence[str], kwargs: list[Any]
    ) -> list[Verdict]:
        """Return the verdict on each instruction."""

    def question(self, row: Row) -> str:
        """Return the prompt."""
        return str(row["prompt"])

    def reference(self, row: Row) -> Logs:
        """Return the prompt and the instructions, as JSON."""
        return _reference(str(row["prompt"]), row["instruction_id_list"], row["kwargs"])

    async def grade(self, reply: str, logs: Logs, config: BenchmarkConfig) -> Grade:
        """Check every instruction."""
        del config
        ids, kwargs = json.loads(str(logs["instructions"]))
        verdicts = await asyncio.to_thread(self.check, reply, str(logs["prompt"]), ids, kwargs)
        strict = sum(verdict[0] for verdict in verdicts)
        loose = sum(verdict[1] for verdict in verdicts)
        metrics: Metrics = {
            "prompt_strict": float(strict == len(ids)),
            "prompt_loose": float(loose == len(ids)),
            "num_instructions": len(ids),
            "num_strict": strict,
            "num_loose": loose,
        }
        broken = [name for name, verdict in zip(ids, verdicts, strict=True) if not verdict[0]]
        return Grade(metrics["prompt_strict"], metrics, {"broken": ", ".join(broken)})

    def aggregate(self, rewards: list[float], metrics_list: list[Metrics]) -> BenchmarkResult:
        """Add the share of all instructions that were obeyed, strictly and loosely."""
        result = super().aggregate(rewards, metrics_list)
        total = sum(each.get("num_instructions", 0) for each in metrics_list)
        for kind in ("strict", "loose"):
            obeyed = sum(each.get(f"num_{kind}", 0) for each in metrics_list)
            result.metrics[f"inst_{kind}"] = obeyed / total if total else 0.0
        return result


class InstructionEnv(QuestionEnv):
    """One prompt with instructions."""

    def __init__(
        self,
        benchmark: InstructionBenchmark,
        messages: list[Message],
        instruction_ids: Sequence[str],
        kwargs_list: Sequence[Any],
        example_id: str = "",
    ) -> None:
        """Set the prompt.

        Args:
            benchmark: Checks the reply.
            messages: The prompt; its last message has the instructions.
            instruction_ids: The names of the instructions.
            kwargs_list: One object of settings per instruction.
            example_id: The name of the example.
        """
        logs = _reference(get_text_content(messages[-1]), instruction_ids, kwargs_list)
        super().__init__(benchmark, BenchmarkConfig(), messages, logs, example_id)


def _reference(prompt: str, ids: Sequence[str], kwargs: Sequence[Any]) -> Logs:
    instructions = json.dumps([list(ids), list(kwargs)], ensure_ascii=False)
    return {"prompt": prompt, "instructions": instructions}
