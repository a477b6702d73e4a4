"""From a preference loss to a gradient on the service, without torch in the client.

`runs.custom_gradient` explains how.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from tinker_cookbook.preference.losses import PairBatch, PairLoss, PairLossFunction
from tinker_cookbook.runs.custom_gradient import submit_custom_gradient

if TYPE_CHECKING:
    import tinker

__all__ = [
    "PairStep",
    "build_pair_batch",
    "sequence_logprobs",
    "submit_pair_gradient",
    "weighted_sums",
]

T = TypeVar("T", PairBatch, PairLoss)


@dataclass(frozen=True)
class PairStep:
    """A preference step whose gradient has been submitted."""

    batch: PairBatch
    loss: PairLoss
    gradients: list[tinker.APIFuture[tinker.ForwardBackwardOutput]]
    """Await these before the step counts as done."""


async def submit_pair_gradient(
    client: tinker.TrainingClient,
    data: Sequence[tinker.Datum],
    reference_logprobs: np.ndarray,
    loss: PairLossFunction,
) -> PairStep:
    """Submit the gradient of the mean loss over the pairs of a batch.

    Args:
        client: The model in training.
        data: 2P datums, chosen and rejected in turns.
        reference_logprobs: float64 [2P], sequence log probabilities under the reference model.
        loss: The loss of each pair.

    Returns:
        Losses and log probabilities from before the step. The gradient requests are in the queue
        of the service: an `optim_step` submitted now applies them.
    """
    num_pairs = len(data) // 2
    batches, losses = [], []

    def weigh(part: slice, logprobs: list[np.ndarray]) -> list[np.ndarray]:
        policy = weighted_sums(data[part], logprobs)
        batch = build_pair_batch(data[part], policy, reference_logprobs[part])
        result = loss(batch)
        batches.append(batch)
        losses.append(result)
        return _gradient_weights(data[part], result, num_pairs)

    gradients = await submit_custom_gradient(client, data, weigh, group_size=2)
    return PairStep(_join(batches), _join(losses), gradients)


def sequence_logprobs(
    data: Sequence[tinker.Datum], logprobs: Sequence[tinker.TensorData]
) -> np.ndarray:
    """Return the weighted sum of the log probabilities of each datum, float64 [N].

    Args:
        data: N datums with `weights`.
        logprobs: Log probability of every target token, one array per datum.
    """
    return weighted_sums(data, [found.to_numpy() for found in logprobs])


def weighted_sums(data: Sequence[tinker.Datum], logprobs: Sequence[np.ndarray]) -> np.ndarray:
    """Return the sum of weight times log probability of each datum, float64 [N]."""
    return np.array(
        [
            np.dot(
                datum.loss_fn_inputs["weights"].to_numpy().astype(np.float64),
                found.astype(np.float64),
            )
            for datum, found in zip(data, logprobs, strict=True)
        ]
    )


def build_pair_batch(
    data: Sequence[tinker.Datum], policy: np.ndarray, reference: np.ndarray
) -> PairBatch:
    """Build the input of a loss from datums and sequence log probabilities [2P] in their order."""
    lengths = np.array(
        [datum.loss_fn_inputs["weights"].to_numpy().sum(dtype=np.float64) for datum in data]
    )
    return PairBatch(
        policy[0::2], policy[1::2], reference[0::2], reference[1::2], lengths[0::2], lengths[1::2]
    )


def _gradient_weights(
    data: Sequence[tinker.Datum], loss: PairLoss, num_pairs: int
) -> list[np.ndarray]:
    """Return, per datum, the weights that give the gradient of the mean loss."""
    slopes = np.empty(len(data))
    slopes[0::2], slopes[1::2] = loss.by_chosen_P, loss.by_rejected_P
    return [
        -slope / num_pairs * datum.loss_fn_inputs["weights"].to_numpy()
        for datum, slope in zip(data, slopes, strict=True)
    ]


def _join(parts: list[T]) -> T:
    """Return the parts of a batch as one."""
    arrays = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in fields(parts[0])
    }
    return type(parts[0])(**arrays)
