"""One forward pass over a ragged batch: decoding rows and chunks of prompts, mixed as they come.

All tokens of the batch go through the projections together; attention is done pool by pool for
decoding rows (one token each) and chunk by chunk for prompts.

Axes: N tokens of the batch, H hidden, V vocabulary, D head dimension.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tinker_cookbook.local.engine.model.architecture import ArchConfig
from tinker_cookbook.local.engine.model.matrices import DenseMatrix, Matrix
from tinker_cookbook.local.engine.model.ops import RopeTable, apply_rope, rms_norm
from tinker_cookbook.local.engine.model.weights import LayerWeights, ModelWeights
from tinker_cookbook.local.engine.sampling.adapters import LoraRouter, StackedLora
from tinker_cookbook.local.engine.sampling.batch import Batch, Chunk
from tinker_cookbook.local.engine.sampling.kv_cache import Pool, cache_shape

__all__ = ["Decoder"]

_LENGTH_STEP = 32
"""Attention over a pool covers its longest row, rounded up to this many tokens."""


@dataclass(frozen=True)
class _PoolView:
    """What attention over one pool needs, the same in every layer."""

    pool: Pool
    first: int
    num_rows: int
    length: int
    mask: Tensor | None
    rows: Tensor
    """int64 [num_rows]: which rows of the pool."""
    positions: Tensor
    is_dense: bool
    """Whether these are the pool's first rows, which need no copy."""


class Decoder:
    """Runs batches through one base model, whose matrices are tensors."""

    exact = False

    def __init__(self, arch: ArchConfig, weights: ModelWeights) -> None:
        self.overhead_tokens = 8 if weights.device.type == "cpu" else 128
        self.arch = arch
        self.weights = weights
        self.cache_shape = cache_shape(arch, weights, weights.dtype)
        self._rope = RopeTable(arch.rope, arch.head_dim, weights.device)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Return the hidden states [N, H] before the final norm; caches are filled on the way."""
        device = self.weights.device
        tokens = torch.from_numpy(batch.tokens()).to(device)
        positions = torch.from_numpy(batch.positions()).to(device)
        tables = self._rope.up_to(int(positions.max()) + 1)
        rope = [table[positions][:, None] for table in tables]
        router = LoraRouter(batch.adapters(), device)
        views = self._pool_views(batch)
        x = self.weights.embed_tokens(tokens).float()
        for index, layer in enumerate(self.weights.layers):
            x = self._attention_block(x, index, layer, router, rope, views, batch)
            x = self._mlp_block(x, index, layer, router)
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor, adapters: list[tuple[StackedLora | None, int]]) -> Tensor:
        """Return float32 [N, V] for hidden states [N, H] of `forward`."""
        normed = self._norm(hidden, self.weights.final_norm)
        router = LoraRouter(adapters, hidden.device)
        return router.project_head(normed, _weight(self.weights.head)).float()

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.arch.rms_norm_eps)

    def _attention_block(self, x, index, layer: LayerWeights, router, rope, views, batch) -> Tensor:
        arch = self.arch
        normed = self._norm(x, layer.input_norm)
        qkv = router.project(normed, _weight(layer.matrices["qkv"]), index, "qkv")
        if layer.qkv_bias is not None:
            qkv = qkv + layer.qkv_bias
        q_and_k = qkv[:, : arch.q_size + arch.kv_size].unflatten(1, (-1, arch.head_dim))
        if layer.q_norm is not None and layer.k_norm is not None:
            q_and_k = torch.cat(
                [
                    self._norm(q_and_k[:, : arch.num_heads], layer.q_norm),
                    self._norm(q_and_k[:, arch.num_heads :], layer.k_norm),
                ],
                dim=1,
            )
        q_and_k = apply_rope(q_and_k.float(), *rope).to(qkv.dtype)
        q = q_and_k[:, : arch.num_heads]
        v = qkv[:, arch.q_size + arch.kv_size :].unflatten(1, (-1, arch.head_dim))
        kv = torch.stack([q_and_k[:, arch.num_heads :], v], dim=1)
        attended = self._attend(q, kv, index, views, batch)
        return x + router.project(attended, _weight(layer.matrices["o"]), index, "o")

    def _mlp_block(self, x: Tensor, index: int, layer: LayerWeights, router) -> Tensor:
        normed = self._norm(x, layer.post_norm)
        gate_up, down = (_weight(layer.matrices[name]) for name in ("gate_up", "down"))
        gate, up = router.project(normed, gate_up, index, "gate_up").chunk(2, dim=-1)
        return x + router.project(functional.silu(gate) * up, down, index, "down")

    def _attend(self, q: Tensor, kv: Tensor, layer: int, views, batch: Batch) -> Tensor:
        """Store the new keys and values, attend, return [N, num_heads D]."""
        parts = [self._attend_pool(q, kv, layer, view) for view in views]
        first = len(batch.decode_tokens)
        for chunk in batch.chunks:
            last = first + len(chunk.tokens)
            parts.append(self._attend_chunk(q[first:last], kv[first:last], layer, chunk))
            first = last
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_pool(self, q: Tensor, kv: Tensor, layer: int, view: _PoolView) -> Tensor:
        arch = self.arch
        rows = slice(view.first, view.first + view.num_rows)
        stored = view.pool.kv[layer]
        stored.permute(0, 3, 2, 1, 4)[view.rows, view.positions] = kv[rows]
        kept = stored[: view.num_rows] if view.is_dense else stored[view.rows]
        keys, values = kept[:, :, :, : view.length].unbind(2)
        # Query heads that share a key head stand as query positions: no copy of keys per head.
        grouped = q[rows].unflatten(1, (arch.num_kv_heads, -1))
        out = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=view.mask)
        return out.reshape(view.num_rows, -1)

    def _attend_chunk(self, q: Tensor, kv: Tensor, layer: int, chunk: Chunk) -> Tensor:
        num_new, end = len(q), chunk.start + len(q)
        if chunk.row is not None:
            stored = chunk.row.pool.kv[layer, chunk.row.index].permute(2, 1, 0, 3)[:end]
            stored[chunk.start :] = kv
            kv = stored
        keys, values = kv.unbind(1)
        groups = self.arch.num_heads // self.arch.num_kv_heads
        mask = None
        if chunk.start:
            mask = torch.ones(num_new, end, dtype=torch.bool, device=q.device).tril_(chunk.start)
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys.transpose(0, 1).repeat_interleave(groups, 0)[None],
            values.transpose(0, 1).repeat_interleave(groups, 0)[None],
            attn_mask=mask,
            is_causal=mask is None,
        )
        return out[0].transpose(0, 1).flatten(1)

    def _pool_views(self, batch: Batch) -> list[_PoolView]:
        views, first = [], 0
        device = self.weights.device
        for pool, group in itertools.groupby(batch.decode_rows, key=lambda row: row.pool):
            indices = np.array([row.index for row in group], np.int64)
            num_rows = len(indices)
            positions = np.asarray(batch.decode_positions[first : first + num_rows], np.int64)
            longest = int(positions.max()) + 1
            length = min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, pool.capacity)
            valid = np.arange(length)[None, :] <= positions[:, None]
            mask = torch.from_numpy(valid)[:, None, None].to(device)
            rows, places = (torch.from_numpy(i).to(device) for i in (indices, positions))
            is_dense = bool(np.array_equal(indices, np.arange(num_rows)))
            views.append(_PoolView(pool, first, num_rows, length, mask, rows, places, is_dense))
            first += num_rows
        return views


def _weight(matrix: Matrix) -> Tensor:
    assert isinstance(matrix, DenseMatrix), "packed matrices are for the compiled kernels"
    return matrix.weight
