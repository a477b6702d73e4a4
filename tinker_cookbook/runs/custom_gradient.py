"""The gradient of any function of target log probabilities, without torch in the client.

A loss L of the target log probabilities p needs two requests: `forward` returns p; the client
computes dL/dp with NumPy; `forward_backward` with the loss `cross_entropy` and the weights -dL/dp
then adds exactly the gradient of L, because cross entropy is -sum(weights * p).

The client must have p before it can send the second request. So that the service does not wait, a
batch is sent in halves: while one half is computed, the client prepares the other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tinker

__all__ = ["submit_custom_gradient", "with_weights"]

WeighFunction = Callable[
    [slice, list[np.ndarray]], "list[np.ndarray] | Awaitable[list[np.ndarray]]"
]
"""Takes the part of the batch and the log probabilities of its targets; returns the weights, or an
awaitable of them."""


async def submit_custom_gradient(
    client: tinker.TrainingClient,
    data: Sequence[tinker.Datum],
    weigh: WeighFunction,
    *,
    group_size: int = 1,
) -> list[tinker.APIFuture[tinker.ForwardBackwardOutput]]:
    """Submit the gradient that `weigh` describes.

    Args:
        client: The model in training.
        data: Datums with `target_tokens` and `weights`, [N] or [N, K].
        weigh: Called for consecutive parts of the batch. The arrays that it takes and returns have
            the shape of the datum's targets; it returns minus the derivatives.
        group_size: Number of neighbouring datums that must be in the same part.

    Returns:
        Gradient requests in the queue of the service: an `optim_step` submitted now applies them.
        Await them before the step counts as done.
    """
    num_groups = len(data) // group_size
    middle = group_size * ((num_groups + 1) // 2)
    halves = [part for part in (slice(0, middle), slice(middle, len(data))) if data[part]]
    # The service executes the requests of a run in the order of their submission.
    forwards = [client.forward(list(data[half]), "cross_entropy") for half in halves]
    gradients = []
    for half, forward in zip(halves, forwards, strict=True):
        output = await forward
        logprobs = [result["logprobs"].to_numpy() for result in output.loss_fn_outputs]
        found = weigh(half, logprobs)
        weights = await found if isinstance(found, Awaitable) else found
        weighted = [with_weights(*pair) for pair in zip(data[half], weights, strict=True)]
        gradients.append(client.forward_backward(weighted, "cross_entropy"))
    return gradients


def with_weights(datum: tinker.Datum, weights: np.ndarray) -> tinker.Datum:
    """Return the datum with other weights, in the shape of its targets."""
    import tinker

    values = np.ascontiguousarray(weights, np.float32)
    data = tinker.TensorData(data=values.reshape(-1), dtype="float32", shape=list(values.shape))
    inputs = {**datum.loss_fn_inputs, "weights": data}
    return tinker.Datum(model_input=datum.model_input, loss_fn_inputs=inputs)
