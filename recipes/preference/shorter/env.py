"""A judge that prefers the shorter reply, and prompts for the policy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import chz

from tinker_cookbook.preference.preference_datasets import ComparisonDatasetBuilder
from tinker_cookbook.preference.types import (
    Comparison,
    LabeledComparison,
    PreferenceModel,
    PreferenceModelBuilder,
)
from tinker_cookbook.renderers.content import format_content_as_string
from tinker_cookbook.renderers.types import Message

QUESTIONS = (
    "What is rain?",
    "Why do cats purr?",
    "How does a clock work?",
    "What is salt for?",
    "Why is the sky blue?",
    "What do bees eat?",
    "Where does wood come from?",
    "Who invented the wheel?",
)


class PreferenceModelShorter(PreferenceModel):
    """Prefers the reply with fewer characters; a reply without text loses."""

    async def __call__(self, comparison: Comparison) -> float:
        """Return -1 if A is shorter, 1 if B is shorter, 0 if they have the same length."""
        a, b = _length(comparison.completion_A), _length(comparison.completion_B)
        return float((a > b) - (a < b))


@chz.chz
class ShorterPreferenceModelBuilder(PreferenceModelBuilder):
    """Builds the judge."""

    def __call__(self) -> PreferenceModelShorter:
        """Return the judge."""
        return PreferenceModelShorter()


@chz.chz
class ShorterComparisonBuilder(ComparisonDatasetBuilder):
    """Questions without completions: the policy plays against itself."""

    num_comparisons: int = 320
    """Number of questions; the list is repeated."""
    questions: Sequence[str] = QUESTIONS

    def get_labeled_comparisons(
        self,
    ) -> tuple[list[LabeledComparison], list[LabeledComparison] | None]:
        """Return the questions to train on; none is held out."""
        found = []
        for number in range(self.num_comparisons):
            question = self.questions[number % len(self.questions)]
            prompt: list[Message] = [{"role": "user", "content": question}]
            found.append(LabeledComparison(Comparison(prompt, [], []), "Tie"))
        return found, None


def _length(completion: Sequence[Message]) -> float:
    texts = [format_content_as_string(message["content"]).strip() for message in completion]
    return sum(map(len, texts)) or math.inf
