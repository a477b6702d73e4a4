"""Data sets of comparisons, and supervised data that trains judges on them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import chz

from tinker_cookbook.exceptions import DataFormatError
from tinker_cookbook.preference.types import (
    Comparison,
    ComparisonRenderer,
    ComparisonRendererFromChatRenderer,
    LabeledComparison,
)
from tinker_cookbook.supervised.types import (
    ChatDatasetBuilder,
    SupervisedDataset,
)

if TYPE_CHECKING:
    import datasets
    import tinker

__all__ = [
    "ChatDatasetBuilderFromComparisons",
    "ComparisonBuilderFromJsonl",
    "ComparisonDatasetBuilder",
]


@chz.chz
class ComparisonDatasetBuilder:
    """Rows of a Hugging Face data set as labelled comparisons."""

    swap: bool = False
    """Add each comparison with A and B exchanged too, so that judges learn no place bias."""

    def get_train_and_test_datasets(self) -> tuple[datasets.Dataset, datasets.Dataset | None]:
        """Return the training rows, and the held-out rows or None."""
        raise NotImplementedError

    def example_to_labeled_comparison(self, example: dict) -> LabeledComparison | None:
        """Return the comparison of a row; None to skip the row."""
        raise NotImplementedError

    def get_labeled_comparisons(
        self,
    ) -> tuple[list[LabeledComparison], list[LabeledComparison] | None]:
        """Return all training comparisons, and the held-out ones or None.

        Raises:
            DataFormatError: if no row gives a comparison.
        """
        train, test = self.get_train_and_test_datasets()
        trained = self._convert(train)
        if not trained:
            raise DataFormatError(
                f"{type(self).__name__} has no comparison in {len(train)} rows; "
                "example_to_labeled_comparison skipped all of them."
            )
        return trained, None if test is None else self._convert(test)

    def _convert(self, rows: Iterable[Any]) -> list[LabeledComparison]:
        found = [self.example_to_labeled_comparison(dict(row)) for row in rows]
        kept = [comparison for comparison in found if comparison is not None]
        return [c for one in kept for c in (one, one.swap())] if self.swap else kept


@chz.chz
class ChatDatasetBuilderFromComparisons(ChatDatasetBuilder):
    """Supervised data that teaches a model to judge: the comparison, then A, B or Tie."""

    comparison_builder: ComparisonDatasetBuilder
    swap: bool = False
    """Train on both orders of each comparison; False: on one order, chosen at random."""

    @property
    def comparison_renderer(self) -> ComparisonRenderer:
        """The renderer of the comparisons."""
        return ComparisonRendererFromChatRenderer(self.renderer)

    def __call__(self) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        """Return the training and the held-out data."""
        trained, held_out = self.comparison_builder.get_labeled_comparisons()
        rng = random.Random(0)
        ordered = [
            comparison
            for one in trained
            for comparison in (
                (one, one.swap()) if self.swap else (one if rng.random() < 0.5 else one.swap(),)
            )
        ]
        test = None if not held_out else self._dataset(held_out)
        return self._dataset(ordered), test

    def _dataset(self, comparisons: list[LabeledComparison]) -> SupervisedDataset:
        return _ComparisonDataset(comparisons, self)

    def datum(self, comparison: LabeledComparison) -> tinker.Datum:
        """Return a comparison as a datum."""
        from tinker_cookbook.supervised.common import datum_from_model_input_weights

        model_input, weights = self.comparison_renderer.to_model_input_weights(comparison)
        return datum_from_model_input_weights(model_input, weights, self.common_config.max_length)


class _ComparisonDataset(SupervisedDataset):
    """Batches of comparisons, shuffled each epoch; an incomplete last batch is dropped."""

    def __init__(
        self, comparisons: list[LabeledComparison], builder: ChatDatasetBuilderFromComparisons
    ) -> None:
        self._comparisons = comparisons
        self._builder = builder
        self._order = list(range(len(comparisons)))

    def get_batch(self, index: int) -> list[tinker.Datum]:
        size = self._builder.common_config.batch_size
        chosen = self._order[index * size : (index + 1) * size]
        return [self._builder.datum(self._comparisons[i]) for i in chosen]

    def set_epoch(self, seed: int = 0) -> None:
        self._order = list(range(len(self._comparisons)))
        random.Random(seed).shuffle(self._order)

    def __len__(self) -> int:
        return len(self._comparisons) // self._builder.common_config.batch_size


@chz.chz
class ComparisonBuilderFromJsonl(ComparisonDatasetBuilder):
    """Rows `{"comparison": {"prompt_conversation", "completion_A", "completion_B"}, "label"}`."""

    train_path: str
    test_path: str | None = None

    def get_train_and_test_datasets(self) -> tuple[datasets.Dataset, datasets.Dataset | None]:
        """Return the rows of the files as plain lists: their types may not fit a table."""
        test = None if self.test_path is None else _read(self.test_path)
        return _read(self.train_path), test

    def example_to_labeled_comparison(self, example: dict) -> LabeledComparison | None:
        """Return the comparison of a row.

        Raises:
            DataFormatError: if a field is missing; the message names it.
        """
        try:
            record = example["comparison"]
            comparison = Comparison(
                record["prompt_conversation"], record["completion_A"], record["completion_B"]
            )
            return LabeledComparison(comparison, example["label"])
        except (KeyError, TypeError) as error:
            raise DataFormatError(
                f"a row of {self.train_path} has no {error}; needs comparison (with "
                "prompt_conversation, completion_A, completion_B) and label (A, B or Tie)."
            ) from error


def _read(path: str) -> Any:
    from tinker_cookbook.utils.file_utils import read_jsonl

    return read_jsonl(path)
