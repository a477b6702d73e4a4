"""Computes a loss of `losses.LOSSES`, and its gradient, for one pack."""

from __future__ import annotations

import torch

from tinker_cookbook.local.engine.training.losses import Config, Inputs, Loss

__all__ = ["BuiltInPackLoss", "loss_and_gradient"]


def loss_and_gradient(
    loss: Loss, training_logprobs: torch.Tensor, inputs: Inputs, config: Config
) -> tuple[float, torch.Tensor]:
    """Return the summed loss and its gradient with respect to the logprobs."""
    leaf = training_logprobs.detach().requires_grad_()
    with torch.enable_grad():
        values = loss.compute(leaf, inputs, config)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return float(values.detach().double().sum()), gradient


class BuiltInPackLoss:
    """The loss of one pack, a `PackLoss`; the model asks for its gradient slice by slice."""

    def __init__(self, loss: Loss, config: Config, inputs: Inputs) -> None:
        """`inputs` are [M, K] (and `sequence` [M, 1])."""
        self.by_sequence = loss.by_sequence
        self.total = 0.0
        self.metrics: dict[str, float] = {}
        self._loss, self._config, self._inputs = loss, config, inputs
        self._gradient: torch.Tensor | None = None

    def see_all(self, training_logprobs: torch.Tensor) -> None:
        """Compute everything at once, from logprobs [M, 1]; for losses `by_sequence`."""
        inputs = {name: values[:, 0] for name, values in self._inputs.items()}
        self.total, gradient = loss_and_gradient(
            self._loss, training_logprobs[:, 0], inputs, self._config
        )
        self._gradient = gradient[:, None]

    def gradient(self, rows: slice, training_logprobs: torch.Tensor) -> torch.Tensor:
        """Return the gradient [C, K] for these rows' logprobs [C, K]; add their loss to `total`."""
        if self._gradient is not None:
            return self._gradient[rows]
        inputs = {name: values[rows] for name, values in self._inputs.items()}
        value, gradient = loss_and_gradient(self._loss, training_logprobs, inputs, self._config)
        self.total += value
        return gradient
