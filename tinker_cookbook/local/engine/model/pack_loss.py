"""What a model asks of the loss of a pack, whichever loss it is."""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["PackLoss"]


class PackLoss(Protocol):
    """The loss of one pack. M rows with K targets each, as in `Pack`."""

    by_sequence: bool
    """The gradient of a row depends on the logprobs of other rows: `see_all` comes first."""
    compares: bool
    """The loss compares with the sampler's logprobs, so they are computed in its arithmetic."""
    total: float
    """The loss, summed over the rows seen so far."""
    metrics: dict[str, float]
    """Sums over the pack's data, of losses that report any."""

    def see_all(self, training_logprobs: torch.Tensor) -> None:
        """Compute everything at once, from float32 logprobs [M, K]; for losses `by_sequence`."""
        ...

    def gradient(self, rows: slice, training_logprobs: torch.Tensor) -> torch.Tensor:
        """Return float32 [C, K], the loss's gradient by the logprobs [C, K] of these rows."""
        ...
