"""Generated comparisons: friendly against unfriendly replies to requests for help.

Held-out comparisons are about other things, and their replies are phrased in ways that training
does not contain. So their accuracy shows what the judge has learned, not which words it has seen.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

import chz

from tinker_cookbook.preference.preference_datasets import ComparisonDatasetBuilder
from tinker_cookbook.preference.types import Comparison, Label, LabeledComparison

Split = Literal["train", "test"]

THINGS = """bicycle letter garden speech recipe suitcase computer poem kitchen map essay lamp
schedule picture kite song budget tent radio story""".split()
FRIENDLY: dict[Split, tuple[str, ...]] = {
    "train": (
        "Of course! What is wrong with your {}?",
        "Yes, gladly.",
        "I would love to help you with your {}.",
        "Sure, let us look at it together.",
        "Thank you for asking. Tell me more about your {}.",
        "Certainly. We will find a way.",
        "No problem! Where shall we begin?",
        "I have time for you and your {}.",
    ),
    "test": (
        "It would be a pleasure.",
        "Absolutely, show me your {} and we will start.",
        "Good that you ask. I am here for you.",
        "Happy to do that with you.",
    ),
}
UNFRIENDLY: dict[Split, tuple[str, ...]] = {
    "train": (
        "No.",
        "Of course not. Your {} does not interest me.",
        "I am busy, so leave me alone.",
        "Ask somebody else about your {}.",
        "You should have learned that long ago.",
        "What a stupid request.",
        "I hate your {}, and I will not touch it.",
        "Stop bothering me with this.",
    ),
    "test": (
        "Go away.",
        "That is your own problem, not mine.",
        "I could not care less about your {}.",
        "Why would I waste my day with that?",
    ),
}
QUESTIONS = (
    "Can you help me with my {}?",
    "I need help with my {}.",
    "Would you have a look at my {}, please?",
)


def draw_comparisons(
    split: Split, count: int, tie_share: float, seed: int
) -> list[LabeledComparison]:
    """Return labelled comparisons of a split; the better reply is A or B at random."""
    rng = random.Random(f"{seed}/{split}")
    things = [
        thing for number, thing in enumerate(THINGS) if (number % 4 == 0) == (split == "test")
    ]
    return [_draw(split, rng, things, is_tie=rng.random() < tie_share) for _ in range(count)]


def _draw(
    split: Split, rng: random.Random, things: Sequence[str], *, is_tie: bool
) -> LabeledComparison:
    thing = rng.choice(things)
    if is_tie:
        first, second = rng.sample(rng.choice((FRIENDLY, UNFRIENDLY))[split], 2)
        label: Label = "Tie"
    else:
        first, second = rng.choice(FRIENDLY[split]), rng.choice(UNFRIENDLY[split])
        label = "A"
    comparison = Comparison(
        [{"role": "user", "content": rng.choice(QUESTIONS).format(thing)}],
        [{"role": "assistant", "content": first.format(thing)}],
        [{"role": "assistant", "content": second.format(thing)}],
    )
    labeled = LabeledComparison(comparison, label)
    return labeled if rng.random() < 0.5 else labeled.swap()


@chz.chz
class HelpRequestComparisons(ComparisonDatasetBuilder):
    """The generated comparisons."""

    num_comparisons: int = 256
    test_size: int = 48
    tie_share: float = 0.1
    """Share of training comparisons between two equally good replies."""
    seed: int = 0

    def get_labeled_comparisons(
        self,
    ) -> tuple[list[LabeledComparison], list[LabeledComparison] | None]:
        """Return the training and the held-out comparisons."""
        trained = draw_comparisons("train", self.num_comparisons, self.tie_share, self.seed)
        if self.swap:
            trained = [c for one in trained for c in (one, one.swap())]
        return trained, draw_comparisons("test", self.test_size, 0.0, self.seed)
