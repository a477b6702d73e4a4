"""Data sets of comparisons, and supervised data that trains judges on them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import chz

from tinker_cookbook.exceptions import DataFormatError, DataValidationError
from tinker_cookbook.preference.comparison_rows import parse_comparison
from tinker_cookbook.preference.types import (
    ComparisonRenderer,
    ComparisonRendererFromChatRenderer,
    LabeledComparison,
)
from tinker_cookbook.supervised.conversations import SourceRow
from tinker_cookbook.supervised.sources.several import open_data
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
        """Return a comparison as a datum.

        Raises:
            DataValidationError: if the comparison is longer than `max_length`. The label is at its
                end, so a cut would remove what is trained.
        """
        from tinker_cookbook.supervised.common import datum_from_model_input_weights

        model_input, weights = self.comparison_renderer.to_model_input_weights(comparison)
        limit = self.common_config.max_length
        if limit is not None and model_input.length > limit:
            raise DataValidationError(
                f"{comparison.source or 'a comparison'}: the conversation with both completions "
                f"and the label has {model_input.length} tokens, more than max_length={limit}; "
                "raise max_length or remove the row."
            )
        return datum_from_model_input_weights(model_input, weights)


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
    """Comparisons from files in the shapes of `comparison_rows`.

    The paths are read like `data=` of the supervised recipes: JSONL, JSON, CSV or Parquet, a folder
    or several files.
    """

    train_path: str
    test_path: str | None = None
    test_size: int = 0
    """Comparisons held out from `train_path` where no `test_path` is given."""
    seed: int = 0
    """Decides which comparisons are held out."""

    def get_labeled_comparisons(
        self,
    ) -> tuple[list[LabeledComparison], list[LabeledComparison] | None]:
        """Read the comparisons to train on, and the held-out ones.

        Raises:
            DataFormatError: naming file, line and field of a row that cannot be used.
        """
        trained = _read_comparisons(self.train_path)
        held_out = None if self.test_path is None else _read_comparisons(self.test_path)
        if held_out is None and self.test_size:
            if self.test_size >= len(trained):
                raise DataFormatError(
                    f"{self.train_path} has {len(trained)} comparisons and test_size="
                    f"{self.test_size} of them would be held out; use a smaller test_size."
                )
            random.Random(self.seed).shuffle(trained)
            held_out, trained = trained[: self.test_size], trained[self.test_size :]
        if self.swap:
            trained = [c for one in trained for c in (one, one.swap())]
        return trained, held_out

    def get_train_and_test_datasets(self) -> tuple[datasets.Dataset, datasets.Dataset | None]:
        """Return the raw rows of JSONL files.

        Lists take the place of data sets, because the columns of a table would not fit all rows.
        """
        test = None if self.test_path is None else _read_jsonl(self.test_path)
        return _read_jsonl(self.train_path), test

    def example_to_labeled_comparison(self, example: dict) -> LabeledComparison | None:
        """Read one raw row.

        Raises:
            DataValidationError: naming the field that is wrong.
        """
        return parse_comparison(SourceRow(f"a row of {self.train_path}", example))


def _read_comparisons(data: str) -> list[LabeledComparison]:
    """Read all rows of the files that `data` names."""
    source = open_data(data)
    try:
        return [parse_comparison(row) for row in source.rows(range(len(source)))]
    finally:
        source.close()


def _read_jsonl(path: str) -> Any:
    from tinker_cookbook.utils.file_utils import read_jsonl

    return read_jsonl(path)
