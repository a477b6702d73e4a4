"""Accuracy, margin and loss on held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tinker_cookbook.eval.evaluators import TrainingClientEvaluator
from tinker_cookbook.preference.losses import PairLossFunction
from tinker_cookbook.preference.pair_gradients import build_pair_batch, sequence_logprobs
from tinker_cookbook.preference.pair_metrics import compute_pair_metrics
from tinker_cookbook.preference.reference import ReferenceScorer

if TYPE_CHECKING:
    import tinker

__all__ = ["HeldOutPairs"]

BATCH_PAIRS = 32
"""Pairs per request."""


class HeldOutPairs(TrainingClientEvaluator):
    """Evaluates the model in training on held-out pairs."""

    def __init__(
        self,
        data: Sequence[tinker.Datum],
        reference: ReferenceScorer,
        loss: PairLossFunction,
        beta: float,
    ) -> None:
        """Keep the pairs.

        Args:
            data: Chosen and rejected completions in turns.
            reference: The reference model.
            loss: Loss of a pair.
            beta: Factor between log ratios and rewards.
        """
        self._data = list(data)
        self._reference = reference
        self._loss = loss
        self._beta = beta

    async def __call__(self, training_client: tinker.TrainingClient) -> dict[str, float]:
        """Return `test/accuracy`, `test/margin`, `test/dpo_loss` and the other pair metrics."""
        size = 2 * BATCH_PAIRS
        batches = [self._data[i : i + size] for i in range(0, len(self._data), size)]
        forwards = [training_client.forward(batch, "cross_entropy") for batch in batches]
        reference = np.concatenate([await self._reference.score(batch) for batch in batches])
        policy = []
        for batch, forward in zip(batches, forwards, strict=True):
            outputs = (await forward).loss_fn_outputs
            policy.append(sequence_logprobs(batch, [output["logprobs"] for output in outputs]))
        pairs = build_pair_batch(self._data, np.concatenate(policy), reference)
        metrics = compute_pair_metrics(pairs, self._loss(pairs), self._beta)
        return {f"test/{name}": value for name, value in metrics.items()}
