"""Optimizer steps: gradient requests and updates are submitted before any result is awaited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tinker_cookbook.rl.data_processing import drop_client_inputs
from tinker_cookbook.rl.metrics import SamplingGap, compute_kl_sample_train, measure_sampling_gap
from tinker_cookbook.runs.training_client import add_service_metrics, failed_step
from tinker_cookbook.utils import trace
from tinker_cookbook.utils.misc_utils import split_list
from tinker_cookbook.utils.sdk_compat import awaitable

if TYPE_CHECKING:
    import tinker

__all__ = ["PendingUpdate", "train_step"]


@dataclass
class PendingUpdate:
    """The requests of one training step, in the order in which the service runs them."""

    training_client: tinker.TrainingClient
    loss_fn: str
    loss_fn_config: dict[str, float] | None
    adam_params: tinker.AdamParams
    data_D: list[tinker.Datum] = field(default_factory=list)
    """All datums sent so far, with their `mask`."""
    gap: SamplingGap | None = None
    """The gap on the data before the first optimizer step; set when the update is finished."""
    _gradients: list[tinker.APIFuture[tinker.ForwardBackwardOutput]] = field(default_factory=list)
    _steps: list[tinker.APIFuture[tinker.OptimStepResponse]] = field(default_factory=list)
    _has_gradients: bool = False
    _num_before_step: int = 0

    def add_gradients(self, data_D: Sequence[tinker.Datum]) -> None:
        """Submit a forward and backward pass; gradients accumulate until the next step."""
        if not data_D:
            return
        sent = drop_client_inputs(data_D, self.loss_fn)
        self._gradients.append(
            self.training_client.forward_backward(
                sent,
                self.loss_fn,  # pyright: ignore[reportArgumentType]
                loss_fn_config=self.loss_fn_config,
            )
        )
        self.data_D += data_D
        self._has_gradients = True

    def step(self) -> None:
        """Submit an optimizer step; do nothing if no gradient was submitted."""
        if self._has_gradients:
            self._num_before_step = self._num_before_step or len(self.data_D)
            self._steps.append(self.training_client.optim_step(self.adam_params))
            self._has_gradients = False

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps submitted."""
        return len(self._steps)

    @trace.scope
    async def finish(self) -> tuple[list[np.ndarray], dict[str, float]]:
        """Wait for all results.

        Returns:
            The trainer's log probabilities of each datum, from its gradient pass, and the metrics
            of the service with `optim/kl_sample_train_*`.

        Raises:
            TrainingError: if the service failed.
        """
        import tinker

        logprobs_D: list[np.ndarray] = []
        metrics: dict[str, float] = {}
        try:
            for future in self._gradients:
                result = await awaitable(future)
                logprobs_D += [output["logprobs"].to_numpy() for output in result.loss_fn_outputs]
                add_service_metrics(metrics, result.metrics)
            for future in self._steps:
                add_service_metrics(metrics, (await awaitable(future)).metrics)
        except (tinker.TinkerError, ValueError) as error:
            raise failed_step(error) from error
        first = slice(0, self._num_before_step)
        self.gap = measure_sampling_gap(self.data_D[first], logprobs_D[first])
        return logprobs_D, metrics | compute_kl_sample_train(self.data_D, logprobs_D)


async def train_step(
    data_D: list[tinker.Datum],
    training_client: tinker.TrainingClient,
    learning_rate: float,
    num_substeps: int,
    loss_fn: str,
    loss_fn_config: dict[str, float] | None = None,
    metrics: dict[str, Any] | None = None,
) -> list[np.ndarray]:
    """Train on a batch in `num_substeps` optimizer steps, each on a consecutive part of it.

    Args:
        data_D: Datums from `assemble_training_data`.
        training_client: The training client.
        learning_rate: Learning rate of Adam with betas 0.9 and 0.95.
        num_substeps: Number of optimizer steps; at most one per datum.
        loss_fn: Name of the loss.
        loss_fn_config: Settings of the loss.
        metrics: A dict that receives the metrics of the service.

    Returns:
        The trainer's log probabilities of each datum.
    """
    import tinker

    adam_params = tinker.AdamParams(learning_rate=learning_rate, beta1=0.9, beta2=0.95, eps=1e-8)
    update = PendingUpdate(training_client, loss_fn, loss_fn_config, adam_params)
    submit_substeps(update, data_D, num_substeps)
    logprobs_D, found = await update.finish()
    if metrics is not None:
        metrics.update(found)
    return logprobs_D


def submit_substeps(
    update: PendingUpdate, data_D: Sequence[tinker.Datum], num_substeps: int
) -> None:
    """Submit a batch as consecutive optimizer steps."""
    if not data_D:
        return
    for part in split_list(data_D, min(num_substeps, len(data_D))):
        update.add_gradients(part)
        update.step()
