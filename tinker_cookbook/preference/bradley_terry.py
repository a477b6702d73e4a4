"""The Bradley-Terry loss of a pointwise judge, and the data that train it.

The score of a completion is s = log P(Yes) - log P(No) at the end of `pointwise_messages`. There
is no value head: a datum has the two labels as targets of its last position, [N, 2], and every
other weight is 0. `runs.custom_gradient` sends the gradient.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import chz
import numpy as np

from tinker_cookbook.exceptions import DataFormatError, DataValidationError
from tinker_cookbook.preference.judges import POINT_LABELS, pointwise_messages
from tinker_cookbook.preference.label_logprobs import find_label_tokens
from tinker_cookbook.preference.preference_datasets import ComparisonDatasetBuilder
from tinker_cookbook.preference.types import LabeledComparison
from tinker_cookbook.supervised.types import ChatDatasetBuilder, SupervisedDataset

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers.base import Renderer
    from tinker_cookbook.renderers.types import Message

__all__ = [
    "PointwiseDataset",
    "PointwiseDatasetBuilder",
    "bradley_terry",
    "read_scores",
    "score_weights",
]


def bradley_terry(
    chosen_P: np.ndarray, rejected_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return -log sigmoid(chosen - rejected) of P pairs of scores, and its derivatives by both.

    Source: Bradley and Terry, 1952; as the loss of a reward model arXiv:2203.02155.
    """
    margin_P = chosen_P - rejected_P
    by_chosen_P = -np.exp(-np.logaddexp(0.0, margin_P))
    return np.logaddexp(0.0, -margin_P), by_chosen_P, -by_chosen_P


def read_scores(logprobs: Sequence[np.ndarray]) -> np.ndarray:
    """Return the score of each datum from the log probabilities of its targets, each [N, 2]."""
    return np.array([float(rows[-1, 0]) - float(rows[-1, 1]) for rows in logprobs])


def score_weights(slopes_D: np.ndarray, lengths_D: Sequence[int]) -> list[np.ndarray]:
    """Return the weights, [N, 2] per datum, that give the gradient of a function of the scores.

    Args:
        slopes_D: Derivative of the loss by the score of each datum.
        lengths_D: Positions of each datum.
    """
    weights = []
    for slope, length in zip(slopes_D, lengths_D, strict=True):
        rows = np.zeros((length, 2), np.float32)
        rows[-1] = -slope, slope  # minus the derivatives by log P(Yes) and log P(No)
        weights.append(rows)
    return weights


class PointwiseDataset(SupervisedDataset):
    """Batches of pairs: datum 2i is the better completion of pair i, datum 2i + 1 the worse one.

    Ties are left out and counted. The last batch may be smaller.
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
            batch_size: Pairs per batch.
            max_length: Maximum tokens of a conversation with a completion. Nothing is cut, because
                the question is at the end: a longer one is refused.
        """
        self.pairs = [one for one in comparisons if one.label != "Tie"]
        self.num_ties = len(comparisons) - len(self.pairs)
        self.batch_size = batch_size
        self._renderer = renderer
        self._max_length = max_length
        self._tokens = find_label_tokens(renderer, POINT_LABELS)
        self._order = list(range(len(self.pairs)))

    def __len__(self) -> int:
        return -(-len(self.pairs) // self.batch_size)

    @property
    def summary(self) -> list[str]:
        """Return what a run says about its data before it starts."""
        ties = f", {self.num_ties} ties left out" if self.num_ties else ""
        return [f"{len(self.pairs)} comparisons{ties}"]

    def set_epoch(self, seed: int = 0) -> None:
        """Shuffle the pairs; the same seed gives the same order."""
        self._order = list(range(len(self.pairs)))
        random.Random(seed).shuffle(self._order)

    def get_batch(self, index: int) -> list[tinker.Datum]:
        """Return the datums of a batch, better and worse completions in turns.

        Raises:
            DataValidationError: naming a comparison that is too long.
        """
        numbers = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        return [datum for number in numbers for datum in self.build_pair(self.pairs[number])]

    def build_pair(self, pair: LabeledComparison) -> list[tinker.Datum]:
        """Return the datums of the better and of the worse completion."""
        comparison = pair.comparison if pair.label == "A" else pair.comparison.swap()
        prompt = comparison.prompt_conversation
        return [
            self._build_datum(prompt, completion, pair.source or "a comparison")
            for completion in (comparison.completion_A, comparison.completion_B)
        ]

    def _build_datum(
        self, prompt: list[Message], completion: list[Message], where: str
    ) -> tinker.Datum:
        import tinker

        messages = pointwise_messages(prompt, completion)
        model_input = self._renderer.build_generation_prompt(messages)
        length = model_input.length
        if self._max_length is not None and length > self._max_length:
            raise DataValidationError(
                f"{where}: a completion with its conversation has {length} tokens, more than "
                f"max_length={self._max_length}; raise max_length or remove the row."
            )
        targets = np.zeros((length, 2), np.int64)
        targets[-1] = self._tokens
        weights = score_weights(np.array([-1.0]), [length])[0]
        return tinker.Datum(
            model_input=model_input,
            loss_fn_inputs={
                "target_tokens": _tensor(targets, "int64"),
                "weights": _tensor(weights, "float32"),
            },
        )


@chz.chz
class PointwiseDatasetBuilder(ChatDatasetBuilder):
    """Build the data of a pointwise judge; `common_config.batch_size` is a number of pairs."""

    comparison_builder: ComparisonDatasetBuilder

    def __call__(self) -> tuple[PointwiseDataset, PointwiseDataset | None]:
        """Return the training and the held-out pairs.

        Raises:
            DataFormatError: if all comparisons are ties.
        """
        trained, held_out = self.comparison_builder.get_labeled_comparisons()
        train = self._build(trained)
        if not train.pairs:
            raise DataFormatError(
                f"all {len(trained)} comparisons are ties; a pointwise judge needs a winner."
            )
        return train, self._build(held_out) if held_out else None

    def _build(self, comparisons: Sequence[LabeledComparison]) -> PointwiseDataset:
        config = self.common_config
        return PointwiseDataset(
            comparisons, self.renderer, batch_size=config.batch_size, max_length=config.max_length
        )


def _tensor(values: np.ndarray, dtype: str) -> tinker.TensorData:
    import tinker

    return tinker.TensorData(
        data=values.reshape(-1),
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        shape=list(values.shape),
    )
