"""Datums of comparisons: chosen and rejected completions in turns, for `train_dpo`."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import chz
import numpy as np

from tinker_cookbook.exceptions import DataFormatError, DataValidationError
from tinker_cookbook.preference.preference_datasets import ComparisonDatasetBuilder
from tinker_cookbook.preference.types import LabeledComparison
from tinker_cookbook.supervised.types import (
    ChatDatasetBuilder,
    SupervisedDataset,
)

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers import Renderer
    from tinker_cookbook.renderers.types import Message

__all__ = ["DPODatasetBuilderFromComparisons", "PairDataset", "all_datums"]

logger = logging.getLogger(__name__)


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
                f"{len(trained)} comparisons with {train.num_ties} ties are too few for a batch of "
                f"{self.common_config.batch_size} pairs; use more data or a smaller batch_size."
            )
        return train, self._build(held_out) if held_out else None

    def _build(self, comparisons: Sequence[LabeledComparison]) -> PairDataset:
        config = self.common_config
        return PairDataset(
            comparisons, self.renderer, batch_size=config.batch_size, max_length=config.max_length
        )


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

    def __len__(self) -> int:
        return len(self.pairs) // self.batch_size

    @property
    def summary(self) -> list[str]:
        """Return what a run says about its data before it starts."""
        ties = f", {self.num_ties} ties left out" if self.num_ties else ""
        return [f"{len(self.pairs)} pairs{ties}"]

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
        return [datum for number in numbers for datum in self.build_pair(self.pairs[number])]

    def build_pair(self, pair: LabeledComparison) -> tuple[tinker.Datum, tinker.Datum]:
        """Return the datums of the chosen and the rejected completion.

        Raises:
            DataValidationError: if nothing of a completion is left to train, or both completions
                are the same tokens (after they were cut at `max_length`).
        """
        where = pair.source or "a comparison"
        comparison = pair.comparison if pair.label == "A" else pair.comparison.swap()
        chosen = self._build_datum(comparison.prompt_conversation, comparison.completion_A)
        rejected = self._build_datum(comparison.prompt_conversation, comparison.completion_B)
        for name, datum in (("chosen", chosen), ("rejected", rejected)):
            if not np.any(datum.loss_fn_inputs["weights"].to_numpy()):
                raise DataValidationError(
                    f"{where}: no token of the {name} completion is trained"
                    f"{self._describe_limit()}; raise max_length or remove the row."
                )
        if chosen.model_input.to_ints() == rejected.model_input.to_ints():
            raise DataValidationError(
                f"{where}: both completions are the same tokens{self._describe_limit()}, so there "
                "is nothing to prefer; raise max_length or remove the row."
            )
        return chosen, rejected

    def _describe_limit(self) -> str:
        return "" if self._max_length is None else f" within max_length={self._max_length}"

    def _build_datum(self, prompt: list[Message], completion: list[Message]) -> tinker.Datum:
        from tinker_cookbook.renderers import TrainOnWhat
        from tinker_cookbook.supervised.common import datum_from_model_input_weights

        is_one = len(completion) == 1
        model_input, weights = self._renderer.build_supervised_example(
            [*prompt, *completion],
            train_on_what=(
                TrainOnWhat.LAST_ASSISTANT_MESSAGE if is_one else TrainOnWhat.LAST_ASSISTANT_TURN
            ),
        )
        return datum_from_model_input_weights(model_input, weights, self._max_length)


def all_datums(dataset: SupervisedDataset) -> list[tinker.Datum]:
    """Return the datums of every pair, also of those that do not fill the last batch."""
    if isinstance(dataset, PairDataset):
        return [datum for pair in dataset.pairs for datum in dataset.build_pair(pair)]
    return [datum for index in range(len(dataset)) for datum in dataset.get_batch(index)]
