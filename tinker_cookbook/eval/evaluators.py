"""Interfaces of evaluators, which a training loop calls to measure the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tinker

__all__ = [
    "Evaluator",
    "EvaluatorBuilder",
    "SamplingClientEvaluator",
    "SamplingClientEvaluatorBuilder",
    "TrainingClientEvaluator",
]


class TrainingClientEvaluator:
    """Evaluates with forward passes of the training client, ordered with its training steps."""

    async def __call__(self, training_client: tinker.TrainingClient) -> dict[str, float]:
        """Return metrics by name."""
        raise NotImplementedError


class SamplingClientEvaluator:
    """Evaluates by sampling from the weights of the current step."""

    async def __call__(self, sampling_client: tinker.SamplingClient) -> dict[str, float]:
        """Return metrics by name."""
        raise NotImplementedError


Evaluator = TrainingClientEvaluator | SamplingClientEvaluator
EvaluatorBuilder = Callable[[], TrainingClientEvaluator | SamplingClientEvaluator]
SamplingClientEvaluatorBuilder = Callable[[], SamplingClientEvaluator]
