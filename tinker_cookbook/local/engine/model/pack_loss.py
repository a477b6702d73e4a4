"""The interface of a loss to the model, the same for built-in and uploaded losses."""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["PackLoss"]


class PackLoss(Protocol):
    """The loss of one pack. M rows with K targets each, as in `Pack`."""

    by_sequence: bool
    """Whether a row's gradient depends on other rows' logprobs, so that `see_all` comes first."""
    total: float
    """The loss, summed over the rows seen so far."""
    metrics: dict[str, float]
    """Metrics that the loss reports, summed over the data of the pack."""

    def see_all(self, training_logprobs: torch.Tensor) -> None:
        """Compute everything at once from float32 logprobs [M, K]; for losses `by_sequence`."""
        ...

    def gradient(self, rows: slice, training_logprobs: torch.Tensor) -> torch.Tensor:
        """Return float32 [C, K], the loss's gradient by the logprobs [C, K] of these rows."""
        ...
