"""Upper bounds on one step of the scheduler. No torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SchedulerLimits"]


@dataclass(frozen=True)
class SchedulerLimits:
    """How many tokens and sequences a step may compute."""

    max_batch_tokens: int = 512
    """Maximum tokens per forward pass: decoding sequences and prompt chunks together."""
    max_sequences: int = 128
    """Maximum running sequences of all clients."""
    own_sequences: int = 8
    """Number of these places that a client gets even while other clients hold all of them."""
