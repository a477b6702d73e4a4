"""IFEval: prompts with instructions such as "at least 300 words". Source: arXiv:2311.07911."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinker_cookbook.eval.benchmarks._data import BenchmarkData, HubTable
from tinker_cookbook.eval.benchmarks._instructions import (
    InstructionBenchmark,
    InstructionEnv,
    Verdict,
)
from tinker_cookbook.eval.benchmarks._registry import register
from tinker_cookbook.eval.graders.instructions import loose_variants, verify_instruction
from tinker_cookbook.renderers.types import Message

__all__ = ["IFEvalBenchmarkBuilder", "IFEvalMessageEnv"]


class IFEvalBenchmarkBuilder(InstructionBenchmark):
    """IFEval; a reply is correct if it obeys all its instructions (prompt-level strict)."""

    name = "ifeval"
    data = BenchmarkData(
        name="ifeval",
        keys=("prompt", "instruction_id_list", "kwargs"),
        hub=HubTable("google/IFEval", None, "train"),
        id_key="key",
    )

    def check(
        self, reply: str, prompt: str, ids: Sequence[str], kwargs: list[Any]
    ) -> list[Verdict]:
        """Check with the functions of `graders.instructions`."""
        del prompt
        verdicts = []
        for name, given in zip(ids, kwargs, strict=True):
            strict = verify_instruction(name, reply, given or {})
            loose = strict or any(
                verify_instruction(name, variant, given or {}) for variant in loose_variants(reply)
            )
            verdicts.append((strict, loose))
        return verdicts


class IFEvalMessageEnv(InstructionEnv):
    """One prompt of IFEval."""

    def __init__(
        self,
        messages: list[Message],
        instruction_ids: Sequence[str],
        kwargs_list: Sequence[Any],
        example_id: str = "",
    ) -> None:
        super().__init__(
            IFEvalBenchmarkBuilder(), messages, instruction_ids, kwargs_list, example_id
        )


register(IFEvalBenchmarkBuilder())
