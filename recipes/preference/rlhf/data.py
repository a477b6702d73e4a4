"""Builders of the pipeline's data: examples, comparisons, and questions for the policy."""

from __future__ import annotations

import chz

from tinker_cookbook.preference.sampled_comparisons import SampledComparisons
from tinker_cookbook.preference.types import Label
from tinker_cookbook.renderers import Message, TrainOnWhat
from tinker_cookbook.supervised import (
    SupervisedDataset,
    SupervisedDatasetFromHFDataset,
    conversation_to_datum,
)
from tinker_cookbook.supervised.types import ChatDatasetBuilder

from .opinions import HELD_OUT, TRAINED, annotate, ask, draw_examples


@chz.chz
class OpinionExamples(ChatDatasetBuilder):
    """Examples for the supervised stage, and held-out ones."""

    num_examples: int
    test_size: int = 32
    seed: int = 0

    def __call__(self) -> tuple[SupervisedDataset, SupervisedDataset]:
        """Return the training and the held-out examples."""
        from datasets import Dataset  # takes a second to import, and --help does not need it

        common, renderer = self.common_config, self.renderer

        def to_datum(row: dict):
            return conversation_to_datum(
                row["messages"],
                renderer,
                common.max_length,
                TrainOnWhat.LAST_ASSISTANT_MESSAGE,
            )

        def batches(examples: list[list[Message]], size: int) -> SupervisedDataset:
            rows = Dataset.from_list([{"messages": messages} for messages in examples])
            return SupervisedDatasetFromHFDataset(rows, size, map_fn=to_datum)

        found = draw_examples(self.num_examples + self.test_size, self.seed)
        return (
            batches(found[self.test_size :], common.batch_size),
            batches(found[: self.test_size], self.test_size),
        )


@chz.chz
class OpinionComparisons(SampledComparisons):
    """Comparisons of replies of the supervised model, labelled by the annotator."""

    def prompts(self) -> tuple[list[list[Message]], list[list[Message]]]:
        """Return the questions about trained and about held-out topics."""
        return ask(TRAINED, 2), ask(HELD_OUT, 1)

    def label(self, prompt: list[Message], first: str, second: str) -> Label:
        """Return the annotator's label."""
        return annotate(prompt, first, second)
