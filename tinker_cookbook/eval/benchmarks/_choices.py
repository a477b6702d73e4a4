"""Multiple choice by reply: the model names the letter of an option."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tinker_cookbook.eval.benchmarks._common import build_messages
from tinker_cookbook.eval.benchmarks._data import Row
from tinker_cookbook.eval.benchmarks._questions import QuestionBenchmark, QuestionEnv
from tinker_cookbook.eval.benchmarks._types import BenchmarkConfig, Grade, Logs
from tinker_cookbook.eval.graders.choices import (
    LETTERS,
    extract_mcq_answer,
    format_mcq_choices,
)

__all__ = ["ChoiceBenchmark", "ChoiceEnv", "shuffle_options"]

INSTRUCTION = 'Think as long as you need, then end with "The answer is (X)", where X is the letter.'


class ChoiceBenchmark(QuestionBenchmark):
    """A benchmark of rows with `question`, `options` (a list) and `answer` (a letter).

    A reply that names no letter is wrong. If rows have the key `group_key`, the mean score of each
    group is among the metrics, as `acc/GROUP`.
    """

    instruction = INSTRUCTION
    group_key: str | None = None

    def question(self, row: Row) -> str:
        """Return the question with lettered options."""
        return f"{row['question']}\n\n{format_mcq_choices(row['options'])}\n\n{self.instruction}"

    def reference(self, row: Row) -> Logs:
        """Return the right letter, the letters that are valid, and the group."""
        logs: Logs = {"expected": str(row["answer"]), "letters": LETTERS[: len(row["options"])]}
        group = row.get(self.group_key) if self.group_key else None
        return logs | {"group": str(group)} if group else logs

    async def grade(self, reply: str, logs: Logs, config: BenchmarkConfig) -> Grade:
        """Compare the letters."""
        del config
        letter = extract_mcq_answer(reply, str(logs["letters"]))
        correct = float(letter == logs["expected"])
        metrics = {"has_answer": float(bool(letter))}
        if "group" in logs:
            metrics[f"acc/{logs['group']}"] = correct
        return Grade(correct, metrics, {"extracted": letter})


class ChoiceEnv(QuestionEnv):
    """One question with lettered options in its prompt."""

    def __init__(
        self,
        benchmark: ChoiceBenchmark,
        prompt: str,
        expected: str,
        *,
        letters: str = LETTERS[:4],
        group: str = "",
        example_id: str = "",
        system_prompt: str | None = None,
    ) -> None:
        """Set the question.

        Args:
            benchmark: Grades the reply.
            prompt: The question with its options.
            expected: The right letter.
            letters: The letters that are valid.
            group: The subject, category or domain; empty: unknown.
            example_id: The name of the example.
            system_prompt: The system prompt, if there is one.
        """
        logs: Logs = {"expected": expected, "letters": letters}
        if group:
            logs["group"] = group
        super().__init__(
            benchmark, BenchmarkConfig(), build_messages(prompt, system_prompt), logs, example_id
        )


def shuffle_options(right: str, wrong: Sequence[str], seed: str) -> tuple[list[str], str]:
    """Return the options in an order that depends only on `seed`, and the letter of the right one.

    For data that list the right answer first.
    """
    options = [right, *wrong]
    order = list(range(len(options)))
    random.Random(seed).shuffle(order)
    return [options[index] for index in order], LETTERS[order.index(0)]
