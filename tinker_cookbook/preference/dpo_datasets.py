"""Datums of comparisons: chosen and rejected completions in turns, for `train_dpo`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import chz

from tinker_cookbook.exceptions import DataFormatError, DataValidationError
from tinker_cookbook.preference.preference_datasets import ComparisonDatasetBuilder
from tinker_cookbook.preference.rendering import RenderedPair, render_pair
from tinker_cookbook.preference.types import LabeledComparison
from tinker_cookbook.supervised.types import (
    ChatDatasetBuilder,
    SupervisedDataset,
)

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers import Renderer

__all__ = ["DPODatasetBuilderFromComparisons", "PairDataset", "all_datums"]

MAX_PAIRS_CHECKED = 5000
"""Data sets with more pairs are checked in part before a run starts."""
SPREAD_PAIRS = 2000
"""Pairs that are checked of a larger data set."""
MAX_PROBLEMS = 5
"""Problems that one error lists."""


@chz.chz
class DPODatasetBuilderFromComparisons(ChatDatasetBuilder):
    """Build data sets of pairs; `common_config.batch_size` is a number of pairs."""

    comparison_builder: ComparisonDatasetBuilder

    def __call__(self) -> tuple[PairDataset, PairDataset | None]:
        """Return the training and the held-out pairs.

        Raises:
            DataFormatError: if all comparisons are ties, or there are too few for one batch.
        """
        trained, held_out = self.comparison_builder.get_labeled_comparisons()
        train = self._build(trained)
        if len(train) == 0:
            raise DataFormatError(
                f"batch_size={self.common_config.batch_size} is more than the {len(trained)} "
                f"comparisons, of which {train.num_ties} are ties; use a smaller batch_size, or "
                "more data."
            )
        return train, self._build(held_out) if held_out else None

    def _build(self, comparisons: Sequence[LabeledComparison]) -> PairDataset:
        config = self.common_config
        dataset = PairDataset(
            comparisons, self.renderer, batch_size=config.batch_size, max_length=config.max_length
        )
        dataset.check()
        return dataset


class PairDataset(SupervisedDataset):
    """Batches of pairs: datum 2i is the chosen completion of pair i, datum 2i + 1 the rejected.

    Both datums of a pair start with the same prompt; only the assistant messages of the completion
    have weights. Ties are left out and counted.
    """

    def __init__(
        self,
        comparisons: Sequence[LabeledComparison],
        renderer: Renderer,
        *,
        batch_size: int,
        max_length: int | None = None,
    ) -> None:
        """Sort out ties.

        Args:
            comparisons: The comparisons.
            renderer: Chat format.
            batch_size: Pairs per batch; pairs that do not fill the last batch are left out.
            max_length: Tokens at which a prompt with its completion is cut; None: never.
        """
        self.pairs = [comparison for comparison in comparisons if comparison.label != "Tie"]
        self.num_ties = len(comparisons) - len(self.pairs)
        self.batch_size = batch_size
        self._renderer = renderer
        self._max_length = max_length
        self._order = list(range(len(self.pairs)))
        self._built: dict[int, tuple[tinker.Datum, tinker.Datum]] = {}
        """Pairs that `check` has rendered, by number; only of small data sets."""
        self._num_checked = 0
        self._num_cut = 0

    def __len__(self) -> int:
        return len(self.pairs) // self.batch_size

    @property
    def summary(self) -> list[str]:
        """Return what a run says about its data before it starts."""
        parts = [f"{len(self.pairs)} pairs"]
        if self.num_ties:
            parts.append(f"{self.num_ties} ties left out")
        if self._num_cut:
            among = (
                "" if self._num_checked == len(self.pairs) else f" of {self._num_checked} checked"
            )
            parts.append(f"{self._num_cut}{among} cut at max_length={self._max_length}")
        return [", ".join(parts)]

    def check(self) -> None:
        """Render the pairs before the first step, so that a bad one does not stop a run later.

        Of a large data set only some pairs are rendered, at equal distances.

        Raises:
            DataValidationError: naming the first pairs that cannot be trained on.
        """
        is_small = len(self.pairs) <= MAX_PAIRS_CHECKED
        every = 1 if is_small else len(self.pairs) // SPREAD_PAIRS
        problems = []
        for number in range(0, len(self.pairs), every):
            try:
                pair = self._render(self.pairs[number])
            except DataValidationError as error:
                problems.append(str(error))
                continue
            self._num_checked += 1
            self._num_cut += pair.is_cut
            if is_small:
                self._built[number] = (pair.chosen, pair.rejected)
        if problems:
            more = len(problems) - MAX_PROBLEMS
            listed = "\n".join(problems[:MAX_PROBLEMS])
            raise DataValidationError(listed + (f"\nand {more} more" if more > 0 else ""))

    def set_epoch(self, seed: int = 0) -> None:
        """Shuffle the pairs; the same seed gives the same order."""
        self._order = list(range(len(self.pairs)))
        random.Random(seed).shuffle(self._order)

    def get_batch(self, index: int) -> list[tinker.Datum]:
        """Return the datums of a batch, chosen and rejected in turns.

        Raises:
            DataValidationError: naming a pair that cannot be trained on.
        """
        numbers = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        return [datum for number in numbers for datum in self._numbered(number)]

    def _numbered(self, number: int) -> tuple[tinker.Datum, tinker.Datum]:
        return self._built.get(number) or self.build_pair(self.pairs[number])

    def build_pair(self, pair: LabeledComparison) -> tuple[tinker.Datum, tinker.Datum]:
        """Return the datums of the chosen and the rejected completion.

        Raises:
            DataValidationError: if nothing of a completion is left to train, or both completions
                are the same tokens (after they were cut at `max_length`).
        """
        rendered = self._render(pair)
        return rendered.chosen, rendered.rejected

    def _render(self, pair: LabeledComparison) -> RenderedPair:
        return render_pair(pair, self._renderer, self._max_length)


def all_datums(dataset: SupervisedDataset) -> list[tinker.Datum]:
    """Return the datums of every pair, also of those that do not fill the last batch."""
    if isinstance(dataset, PairDataset):
        return [datum for pair in dataset.pairs for datum in dataset.build_pair(pair)]
    return [datum for index in range(len(dataset)) for datum in dataset.get_batch(index)]
