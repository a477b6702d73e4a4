"""What a forward pass over a pack records for its backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tinker_cookbook.local.engine.model.dropout import AdapterDropout
from tinker_cookbook.local.engine.model.flash_attention import SegmentBounds
from tinker_cookbook.local.engine.model.prefix_sharing import PrefixSharing
from tinker_cookbook.local.engine.native.train_ops import HeadLayout

__all__ = ["BlockBytes", "ForwardPass", "Kept", "Segments", "Tape"]


@dataclass
class Kept:
    """What one block computed in the forward pass and needs in the backward pass.

    The normed inputs and silu(gate) * up are missing: recomputing them is cheaper than keeping
    them. `PackedTransformer.activation_bytes` counts these fields.
    """

    inverse_in: torch.Tensor
    """float32 [T, 1], 1 / rms of the block's input; `inverse_mid` likewise of `hidden_mid`."""
    qkv_low: torch.Tensor
    """[T, 3 rank]; the other `low` fields have one rank per module too. [T, 0] if not trained."""
    qkv: torch.Tensor | None
    """[T, (K G + 2 K) D] before the norm of queries and keys; None for architectures without it."""
    q: torch.Tensor
    """[K, T G, D], rotated and divided by sqrt(D); row t G + g belongs to token t. On flash kernels
    [T, K G, D], `k` and `v` [T, K, D]."""
    k: torch.Tensor
    """[K, T, D], rotated; `v` likewise, not rotated. With paired matrices, bfloat16 numbers. On
    flash kernels, what attention read: with the copies of shared tokens."""
    v: torch.Tensor
    attended: torch.Tensor
    """[K, T G, D]; with paired matrices [T, K G D]; on flash kernels [T, K G, D]."""
    attended_lse: torch.Tensor | None
    """[K, T G], logsumexp of the scores; None where torch recomputes the probabilities."""
    o_low: torch.Tensor
    hidden_mid: torch.Tensor
    """float32 [T, H], the residual stream between attention and MLP."""
    inverse_mid: torch.Tensor
    gate_up_low: torch.Tensor
    gate_up: torch.Tensor
    """[T, 2 I], before silu."""
    down_low: torch.Tensor


@dataclass(frozen=True)
class Segments:
    """The sequences of a pack, as attention needs them."""

    lengths: list[int]
    """Number of keys of each sequence."""
    cos: torch.Tensor
    """float32 [T, 1, 1, D / 2] for each token's position in its sequence; `sin` likewise."""
    sin: torch.Tensor
    layout: HeadLayout | None
    """Head layout for the compiled kernels; None where torch splits the heads."""
    bounds: SegmentBounds | None
    """Where segments begin, for flash kernels."""
    sharing: PrefixSharing | None = None
    """The tokens that sequences share; None if they share none."""

    @property
    def shared(self) -> list[int] | None:
        """Number of leading keys of each sequence that have no queries; None if all have some."""
        return None if self.sharing is None else self.sharing.shared

    def with_copies(self, values: torch.Tensor, axis: int) -> torch.Tensor:
        """Return values of keys, given those of tokens."""
        return values if self.sharing is None else self.sharing.copy(values, axis)

    def without_copies(self, gradient: torch.Tensor, axis: int) -> torch.Tensor:
        """Return the gradient of tokens, given that of keys."""
        return gradient if self.sharing is None else self.sharing.gather(gradient, axis)


@dataclass
class Tape:
    """The record of a forward pass; it can be run backward once."""

    segments: Segments
    inputs: list[torch.Tensor]
    """Input [T, H] of every block, then the input of the final norm."""
    kept: list[Kept | None]
    """One entry per block; None where the block is recomputed in the backward pass."""
    dropout: AdapterDropout | None = None


ForwardPass = tuple[torch.Tensor, Tape]
"""Hidden states [T, H] after the final norm, and the record from which the pass is run backward."""


@dataclass(frozen=True)
class BlockBytes:
    """Memory that one block keeps for the backward pass, in bytes."""

    full: int
    """With everything in `Kept` and the block's input."""
    least: int
    """With the input alone, from which the block is recomputed."""
