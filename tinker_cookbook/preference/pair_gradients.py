"""From a preference loss to a gradient on the service, without torch in the client.

A loss L of the target log probabilities p needs two requests: `forward` returns p; the client
computes dL/dp with NumPy; `forward_backward` with the loss `cross_entropy` and the weights -dL/dp
then adds exactly the gradient of L, because cross entropy is -sum(weights * p).

The client must have p before it can send the second request. So that the service does not wait, a
batch is sent in halves: while one half is computed, the client prepares the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from tinker_cookbook.preference.losses import PairBatch, PairLoss, PairLossFunction

if TYPE_CHECKING:
    import tinker

__all__ = ["PairStep", "build_pair_batch", "sequence_logprobs", "submit_pair_gradient"]

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
    middle = 2 * ((num_pairs + 1) // 2)
    halves = [part for part in (slice(0, middle), slice(middle, len(data))) if data[part]]
    # The service executes the requests of a run in the order of their submission.
    forwards = [client.forward(list(data[half]), "cross_entropy") for half in halves]
    batches, losses, gradients = [], [], []
    for half, forward in zip(halves, forwards, strict=True):
        output = await forward
        policy = sequence_logprobs(data[half], [o["logprobs"] for o in output.loss_fn_outputs])
        batch = build_pair_batch(data[half], policy, reference_logprobs[half])
        result = loss(batch)
        weighted = _with_gradient(data[half], result, num_pairs)
        gradients.append(client.forward_backward(weighted, "cross_entropy"))
        batches.append(batch)
        losses.append(result)
    return PairStep(_join(batches), _join(losses), gradients)


def sequence_logprobs(
    data: Sequence[tinker.Datum], logprobs: Sequence[tinker.TensorData]
) -> np.ndarray:
    """Return the weighted sum of the log probabilities of each datum, float64 [N].

    Args:
        data: N datums with `weights`.
        logprobs: Log probability of every target token, one array per datum.
    """
    return np.array(
        [
            np.dot(
                datum.loss_fn_inputs["weights"].to_numpy().astype(np.float64),
                found.to_numpy().astype(np.float64),
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


def _with_gradient(
    data: Sequence[tinker.Datum], loss: PairLoss, num_pairs: int
) -> list[tinker.Datum]:
    """Return the datums with weights that give the gradient of the mean loss."""
    import tinker

    slopes = np.empty(len(data))
    slopes[0::2], slopes[1::2] = loss.by_chosen_P, loss.by_rejected_P
    weighted = []
    for datum, slope in zip(data, slopes, strict=True):
        weights = datum.loss_fn_inputs["weights"].to_numpy()
        values = (-slope / num_pairs * weights).astype(np.float32)
        inputs = {
            **datum.loss_fn_inputs,
            "weights": tinker.TensorData(data=values, dtype="float32", shape=[len(values)]),
        }
        weighted.append(tinker.Datum(model_input=datum.model_input, loss_fn_inputs=inputs))
    return weighted


def _join(parts: list[T]) -> T:
    """Return the parts of a batch as one."""
    arrays = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in fields(parts[0])
    }
    return type(parts[0])(**arrays)
