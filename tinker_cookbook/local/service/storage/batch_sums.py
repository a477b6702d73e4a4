"""Sums over the batches between two optimizer steps, for the dashboard."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tinker_cookbook.local.engine.types import SparseRows, TrainDatum

__all__ = ["BatchSums"]


@dataclass
class BatchSums:
    """Sums over datums. A mean is None if nothing was counted or its value is not finite."""

    num_batches: int = 0
    num_tokens: int = 0
    loss: float = 0.0
    weight: float = 0.0
    """Number of tokens in the loss: the sum of weights, or the number of non-zero advantages."""
    is_linear: bool = False
    """Whether a weight is negative: then the client sends a gradient instead of a loss."""
    num_scored: int = 0
    """Number of tokens whose weight or advantage is not 0."""
    negative_logprob: float = 0.0
    num_compared: int = 0
    """Number of scored tokens that also have a sampling log probability."""
    half_square: float = 0.0
    """Sum of half the squared differences of sampling and training log probabilities."""

    def add(self, datum: TrainDatum, training_logprobs: np.ndarray | None) -> None:
        """Add a datum; `training_logprobs` is float32 [N] or [N, K]."""
        self.num_tokens += len(datum.tokens)
        name, values = _weights_of(datum)
        if values is None:
            self.weight += len(datum.tokens)
            return
        if name == "weights":
            self.weight += float(np.sum(values))
            self.is_linear = self.is_linear or bool(np.any(values < 0))
        else:
            self.weight += float(np.count_nonzero(values))
        if training_logprobs is not None and training_logprobs.shape == values.shape:
            self._score(datum, training_logprobs, values != 0)

    def _score(self, datum: TrainDatum, training_logprobs: np.ndarray, mask: np.ndarray) -> None:
        scored = training_logprobs[mask]
        self.num_scored += scored.size
        self.negative_logprob -= float(scored.sum(dtype=np.float64))
        sampling_logprobs = datum.loss_inputs.get("logprobs")
        if isinstance(sampling_logprobs, np.ndarray) and sampling_logprobs.shape == mask.shape:
            difference = sampling_logprobs[mask].astype(np.float64) - scored
            self.num_compared += scored.size
            self.half_square += 0.5 * float(np.square(difference).sum())

    @property
    def mean_loss(self) -> float | None:
        return None if self.is_linear else _mean(self.loss, self.weight)

    @property
    def mean_negative_logprob(self) -> float | None:
        """Nats per token. For sampled tokens, this estimates the entropy of the policy."""
        return _mean(self.negative_logprob, self.num_scored)

    @property
    def divergence(self) -> float | None:
        """Estimated KL divergence between sampler and trainer, in nats per token."""
        return _mean(self.half_square, self.num_compared)


def _weights_of(datum: TrainDatum) -> tuple[str, np.ndarray | None]:
    for name in ("weights", "advantages"):
        values = datum.loss_inputs.get(name)
        if values is not None:
            return name, values.values if isinstance(values, SparseRows) else values
    return "", None


def _mean(total: float, number: float) -> float | None:
    if number <= 0 or not math.isfinite(total):
        return None
    return total / number
