"""Arithmetic: generated questions that ship with this package, the same on every machine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tinker_cookbook.eval.benchmarks._common import build_messages
from tinker_cookbook.eval.benchmarks._questions import QuestionEnv
from tinker_cookbook.eval.benchmarks._registry import register
from tinker_cookbook.eval.benchmarks._types import BenchmarkBuilder, BenchmarkConfig, Grade, Logs
from tinker_cookbook.eval.graders.numbers import check_gsm8k, extract_gsm8k_answer
from tinker_cookbook.rl.message_env import EnvFromMessageEnv

if TYPE_CHECKING:
    from tinker_cookbook.renderers.base import Renderer

__all__ = ["ArithmeticBenchmarkBuilder", "arithmetic_problem"]

NUM_EXAMPLES = 200
OPERATIONS = ("add", "subtract", "multiply")
MAX_DIGITS = 4


def arithmetic_problem(index: int) -> tuple[str, int, str]:
    """Return question number `index`: its text, its answer, and its operation.

    The three operations take turns, and so do the sizes: numbers of 1 to 4 digits (1 and 2 for
    products). The difference of a subtraction is never negative.
    """
    draw = random.Random(f"arithmetic {index}")
    operation = OPERATIONS[index % len(OPERATIONS)]
    level = index // len(OPERATIONS) % MAX_DIGITS
    digits = 1 + (level // 2 if operation == "multiply" else level)
    first, second = (draw.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
    if operation == "add":
        return f"What is {first} + {second}?", first + second, operation
    if operation == "multiply":
        return f"What is {first} * {second}?", first * second, operation
    first, second = max(first, second), min(first, second)
    return f"What is {first} - {second}?", first - second, operation


class ArithmeticBenchmarkBuilder(BenchmarkBuilder):
    """200 sums, differences and products; each operation's score is a metric with its name."""

    name = "arithmetic"

    def make_envs(self, renderer: Renderer, config: BenchmarkConfig) -> Sequence[EnvFromMessageEnv]:
        """Return one environment per question."""
        return [
            EnvFromMessageEnv(
                renderer,
                self._env(index, config),
                failed_parse_reward=0.0,
                terminate_on_parse_error=False,
                context_overflow_reward=0.0,
            )
            for index in range(min(config.max_examples or NUM_EXAMPLES, NUM_EXAMPLES))
        ]

    def _env(self, index: int, config: BenchmarkConfig) -> QuestionEnv:
        question, answer, operation = arithmetic_problem(index)
        messages = build_messages(question, config.system_prompt)
        logs: Logs = {"expected": str(answer), "operation": operation}
        return QuestionEnv(self, config, messages, logs, f"arithmetic-{index:03d}")

    async def grade(self, reply: str, logs: Logs, config: BenchmarkConfig) -> Grade:
        """Compare the last number of the reply with the answer."""
        del config
        correct = float(check_gsm8k(reply, str(logs["expected"])))
        found: Logs = {"extracted": extract_gsm8k_answer(reply)}
        return Grade(correct, {str(logs["operation"]): correct}, found)


register(ArithmeticBenchmarkBuilder())
