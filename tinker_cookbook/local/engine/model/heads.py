"""Attention of one decoder block: from the stacked projection to attended values, and back.

Splits the projection into heads, norms and rotates queries and keys, attends, and merges the heads.
Three implementations, in three layouts:

    compiled, bfloat16 pairs   queries [K, T G, D], keys [K, T, D], attended values [T, K G D]
    flash kernels of a GPU     queries [T, K G, D], keys [T, K, D], attended values [T, K G, D]
    blocks of products         queries [K, T G, D], keys [K, T, D], attended values [K, T G, D]

Where sequences share tokens, attention reads copies of their keys and values (`prefix_sharing`),
which are made here for each pass.

Legend: T packed tokens, K key heads, G query heads per key head, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tinker_cookbook.local.engine.model.architecture import ArchConfig
from tinker_cookbook.local.engine.model.attention import (
    attention_backward,
    attention_forward,
    paired_attention_backward,
    paired_attention_forward,
)
from tinker_cookbook.local.engine.model.devices import to_device
from tinker_cookbook.local.engine.model.flash_attention import (
    flash_attention,
    flash_attention_backward,
    runs_flash,
    segment_bounds,
)
from tinker_cookbook.local.engine.model.ops import (
    RopeTable,
    inverse_rms,
    rms_norm,
    rms_norm_backward,
    rope_into,
)
from tinker_cookbook.local.engine.model.prefix_sharing import PrefixSharing
from tinker_cookbook.local.engine.model.tape import Kept, Segments
from tinker_cookbook.local.engine.model.weights import LayerWeights, ModelWeights
from tinker_cookbook.local.engine.native.attention import segments_of
from tinker_cookbook.local.engine.native.train_ops import HeadLayout, HeadNorms, train_kernels

__all__ = ["AttentionHeads"]

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries, keys and values in the layout of the implementation."""


class AttentionHeads:
    """The attention of all blocks of one model."""

    def __init__(
        self, arch: ArchConfig, weights: ModelWeights, *, flash: bool | None = None
    ) -> None:
        """`flash` uses flash kernels, or does not; None uses them where a GPU has them."""
        self._arch = arch
        self._weights = weights
        self._group_size = arch.num_heads // arch.num_kv_heads
        self._paired = weights.paired
        self._rope = RopeTable(arch.rope, arch.head_dim, weights.device)
        sizes = arch.num_heads, arch.num_kv_heads, arch.head_dim
        self._flash = runs_flash(weights.device, weights.dtype, *sizes) if flash is None else flash
        self._token_axis = 0 if self._flash else 1

    def segments(self, lengths: Sequence[int], sharing: PrefixSharing | None = None) -> Segments:
        """Return what all blocks need to know about the sequences of a pack."""
        device = self._weights.device
        shared = None if sharing is None else sharing.shared
        parts = [np.arange(at.first, at.last) for at in segments_of(lengths, shared)]
        positions = to_device(np.concatenate(parts), device)
        half = self._arch.head_dim // 2
        tables = self._rope.up_to(max(lengths))
        cos, sin = (table[positions, None, None, :half] for table in tables)
        bounds = segment_bounds(lengths, device, shared) if self._flash else None
        layout = self._head_layout(positions, *tables)
        return Segments(list(lengths), cos, sin, layout, bounds, sharing)

    def forward(
        self, qkv: torch.Tensor, layer: LayerWeights, segments: Segments
    ) -> tuple[Heads, torch.Tensor, torch.Tensor | None]:
        """Return the heads, the attended values and, if it is needed later, their logsumexp."""
        q, k, v = self._split(qkv, layer, segments)
        keys, values = (segments.with_copies(part, self._token_axis) for part in (k, v))
        if segments.bounds is not None:
            out, *heads = flash_attention(q, keys, values, segments.bounds)
            return (heads[0], heads[1], heads[2]), out, None
        attend = paired_attention_forward if self._paired else attention_forward
        out, lse = attend(q, keys, values, segments.lengths, segments.shared)
        return (q, k, v), out, lse

    def merge(self, attended: torch.Tensor, out: torch.Tensor) -> None:
        """Write attended values of the last two layouts into [T, K G D], token by token."""
        if self._flash:
            out.copy_(attended.flatten(1))
            return
        heads = out.unflatten(-1, (self._arch.num_kv_heads, self._group_size, self._arch.head_dim))
        heads.copy_(attended.unflatten(1, (-1, self._group_size)).transpose(0, 1))

    def backward(
        self, merged_grad: torch.Tensor, kept: Kept, layer: LayerWeights, segments: Segments
    ) -> torch.Tensor:
        """Return the gradient [T, (K G + 2 K) D] of the stacked projection's result.

        It undoes `forward` in reverse order: attention, rotation, norm. The gradient of a rotation
        is the rotation back, hence the negated sines.
        """
        arch = self._arch
        q_grad, *kv_grads = self._attended_backward(merged_grad, kept, segments)
        k_grad, v_grad = (segments.without_copies(part, self._token_axis) for part in kv_grads)
        kernels = train_kernels()
        if segments.layout is not None and kernels is not None:
            result = kernels.join_heads(segments.layout, q_grad, k_grad, v_grad)
            self._norms_backward(result, kept, layer)
            return result
        result = q_grad.new_empty(merged_grad.shape[0], arch.q_size + 2 * arch.kv_size)
        q_out, k_out, v_out = self._views(result)
        scale = arch.head_dim**-0.5
        cos, sin = segments.cos, segments.sin
        rope_into(q_out, self._by_token(q_grad, self._group_size), cos * scale, sin * -scale)
        rope_into(k_out, self._by_token(k_grad, 1), cos, -sin)
        v_out.copy_(self._by_token(v_grad, 1))
        self._norms_backward(result, kept, layer)
        return result

    def _head_layout(
        self, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> HeadLayout | None:
        arch, dtype = self._arch, self._weights.dtype
        plain = dtype == torch.float32 and self._weights.device.type == "cpu" and not self._flash
        if not (plain and (self._paired or not arch.qk_norm)) or train_kernels() is None:
            return None
        sizes = arch.num_kv_heads, self._group_size, arch.head_dim
        return HeadLayout(*sizes, positions, cos, sin, rounded=self._paired)

    def _split(self, qkv: torch.Tensor, layer: LayerWeights, segments: Segments) -> Heads:
        """Return queries, normed, rotated and divided by sqrt(D), rotated keys, and values."""
        arch = self._arch
        kernels = train_kernels()
        if segments.layout is not None and kernels is not None:
            return kernels.split_heads(segments.layout, qkv, self._norms(layer))
        q, k, v = self._views(qkv)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rms_norm(q, layer.q_norm, arch.rms_norm_eps)
            k = rms_norm(k, layer.k_norm, arch.rms_norm_eps)
        q_out, k_out = self._empty(qkv, self._group_size), self._empty(qkv, 1)
        scale = arch.head_dim**-0.5
        cos, sin = segments.cos, segments.sin
        rope_into(self._by_token(q_out, self._group_size), q, cos * scale, sin * scale)
        rope_into(self._by_token(k_out, 1), k, cos, sin)
        values = v[:, :, 0] if self._flash else v[:, :, 0].transpose(0, 1)
        return q_out, k_out, values.contiguous()

    def _empty(self, like: torch.Tensor, count: int) -> torch.Tensor:
        """Return empty heads, `count` of them for each key head."""
        num_tokens, arch = like.shape[0], self._arch
        if self._flash:
            return like.new_empty(num_tokens, arch.num_kv_heads * count, arch.head_dim)
        return like.new_empty(arch.num_kv_heads, num_tokens * count, arch.head_dim)

    def _by_token(self, heads: torch.Tensor, count: int) -> torch.Tensor:
        """Return a view [T, K, count, D] of heads, `count` of them for each key head."""
        if self._flash:
            return heads.unflatten(1, (-1, count))
        return heads.unflatten(1, (-1, count)).transpose(0, 1)

    def _norms(self, layer: LayerWeights) -> HeadNorms | None:
        if layer.q_norm is None or layer.k_norm is None:
            return None
        return HeadNorms(layer.q_norm, layer.k_norm, self._arch.rms_norm_eps)

    def _views(self, qkv: torch.Tensor) -> Heads:
        """Return views of the queries [T, K, G, D], the keys and the values [T, K, 1, D]."""
        arch = self._arch
        q, k, v = qkv.split([arch.q_size, arch.kv_size, arch.kv_size], dim=-1)
        q_heads = (arch.num_kv_heads, self._group_size, arch.head_dim)
        kv_heads = (arch.num_kv_heads, 1, arch.head_dim)
        return q.unflatten(-1, q_heads), k.unflatten(-1, kv_heads), v.unflatten(-1, kv_heads)

    def _attended_backward(
        self, merged_grad: torch.Tensor, kept: Kept, segments: Segments
    ) -> Heads:
        """Return the gradients of queries and of the keys and values that attention read.

        `merged_grad` is that of the attended values, [T, K G D].
        """
        q, attended, lse = kept.q, kept.attended, kept.attended_lse
        if self._flash:
            grad = merged_grad.unflatten(1, attended.shape[1:])
            return flash_attention_backward(grad, q, kept.k, kept.v, attended)
        k, v = (segments.with_copies(part, self._token_axis) for part in (kept.k, kept.v))
        at = segments.lengths, segments.shared
        if self._paired and lse is not None:
            return paired_attention_backward(merged_grad, q, k, v, attended, lse, *at)
        grad, group = torch.empty_like(attended), self._group_size
        heads = merged_grad.unflatten(-1, (self._arch.num_kv_heads, group, self._arch.head_dim))
        grad.unflatten(1, (-1, group)).copy_(heads.transpose(0, 1))
        return attention_backward(grad, q, k, v, attended, lse, *at)

    def _norms_backward(self, grad: torch.Tensor, kept: Kept, layer: LayerWeights) -> None:
        """Turn the gradient of normed queries and keys into that of `kept.qkv`, in place."""
        if kept.qkv is None or layer.q_norm is None or layer.k_norm is None:
            return
        q, k, _ = self._views(kept.qkv)
        q_grad, k_grad, _ = self._views(grad)
        for part, part_grad, weight in ((q, q_grad, layer.q_norm), (k, k_grad, layer.k_norm)):
            inverse = inverse_rms(part, self._arch.rms_norm_eps)
            part_grad.copy_(rms_norm_backward(part_grad, part, weight, inverse))
