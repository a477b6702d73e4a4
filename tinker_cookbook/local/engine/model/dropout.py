"""Dropout on the inputs of an adapter's A matrices, as in PEFT; the frozen products keep theirs.

A mask is a function of a seed and the group's name, so the backward pass makes the same one again
and no mask is kept.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["AdapterDropout"]


@dataclass(frozen=True)
class AdapterDropout:
    """The dropout of one pass over one pack."""

    rate: float
    """Share of the numbers that become 0; above 0 and below 1."""
    seed: str

    def factors(self, x: Tensor, group: str) -> Tensor:
        """Return 0 or 1 / (1 - rate) for each number of `x` [T, in], float32."""
        digest = hashlib.blake2b(f"{self.seed}.{group}".encode(), digest_size=7).digest()
        generator = torch.Generator(x.device).manual_seed(int.from_bytes(digest, "little"))
        kept = torch.empty(x.shape, device=x.device).bernoulli_(1 - self.rate, generator=generator)
        return kept.div_(1 - self.rate)
