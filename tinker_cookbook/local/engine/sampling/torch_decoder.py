"""The batch decoder on torch: one forward pass over a ragged batch of decoding rows and chunks.

All N tokens of the batch go through the projections together, since these treat every token alike.
Only attention differs: decoding rows (one token each) attend pool by pool, chunks one by one.

Axes: N tokens of the batch, R decoding rows of one pool, T tokens of one chunk, H hidden, V
vocabulary, Q query heads, K key/value heads, C length of the cache, D head dimension.
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
from tinker_cookbook.local.engine.model.weights import ModelWeights
from tinker_cookbook.local.engine.sampling.adapters import LoraRouter, StackedLora
from tinker_cookbook.local.engine.sampling.batch import Batch, Chunk
from tinker_cookbook.local.engine.sampling.cache_rows import Pool, Row, cache_shape

__all__ = ["TorchDecoder"]

_LENGTH_STEP = 32
"""Attention over a pool covers its longest row, rounded up to a multiple of this many tokens."""


@dataclass(frozen=True)
class _PoolView:
    """What attention over the decoding rows of one pool needs; the same in every layer."""

    pool: Pool
    first: int
    """Number of its first row within the batch."""
    num_rows: int
    """R."""
    length: int
    """C: number of cached tokens that are read, at least those of the longest row."""
    mask: Tensor
    """bool [R, 1, 1, C]: which cached tokens each row attends to."""
    rows: Tensor
    """int64 [R]: indices in the pool."""
    positions: Tensor
    """int64 [R]: position of each row's new token."""
    is_dense: bool
    """Whether these are the pool's first R rows: then a view is enough, without a copy."""


@dataclass(frozen=True)
class _Pass:
    """What all layers of one forward pass share."""

    batch: Batch[Row]
    views: list[_PoolView]
    router: LoraRouter
    rope: list[Tensor]
    """Cosines and sines, [N, 1, D] each."""


class TorchDecoder:
    """Runs batches through one base model whose matrices are dense tensors."""

    exact = False

    def __init__(self, arch: ArchConfig, weights: ModelWeights) -> None:
        self.overhead_tokens = 8 if weights.device.type == "cpu" else 128
        self.arch = arch
        self.weights = weights
        self.cache_shape = cache_shape(arch, weights)
        self._rope = RopeTable(arch.rope, arch.head_dim, weights.device)

    @torch.inference_mode()
    def forward(self, batch: Batch[Row]) -> Tensor:
        """Return the hidden states [N, H] before the final norm, and write keys and values."""
        device = self.weights.device
        tokens = torch.from_numpy(batch.tokens()).to(device)
        positions = torch.from_numpy(batch.positions()).to(device)
        tables = self._rope.up_to(int(positions.max()) + 1)
        rope = [table[positions][:, None] for table in tables]
        shared = _Pass(batch, self._pool_views(batch), LoraRouter(batch.adapters(), device), rope)
        x = self.weights.embed_tokens(tokens).float()
        for index in range(len(self.weights.layers)):
            x = self._attention_block(x, index, shared)
            x = self._mlp_block(x, index, shared.router)
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor, adapters: list[tuple[StackedLora | None, int]]) -> Tensor:
        """Return float32 logits [N, V] for hidden states [N, H] of `forward`."""
        normed = self._norm(hidden, self.weights.final_norm)
        router = LoraRouter(adapters, hidden.device)
        return router.project_head(normed, _weight(self.weights.head)).float()

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.arch.rms_norm_eps)

    def _attention_block(self, x: Tensor, index: int, shared: _Pass) -> Tensor:
        """Return x + attention(norm(x)), [N, H]."""
        arch, layer, router = self.arch, self.weights.layers[index], shared.router
        normed = self._norm(x, layer.input_norm)
        # one stacked product: the columns of all Q query heads, of K key heads, of K value heads
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
        q_and_k = apply_rope(q_and_k.float(), *shared.rope).to(qkv.dtype)
        q = q_and_k[:, : arch.num_heads]  # [N, Q, D]
        v = qkv[:, arch.q_size + arch.kv_size :].unflatten(1, (-1, arch.head_dim))
        kv = torch.stack([q_and_k[:, arch.num_heads :], v], dim=1)  # [N, 2, K, D]
        attended = self._attend(q, kv, index, shared)
        return x + router.project(attended, _weight(layer.matrices["o"]), index, "o")

    def _mlp_block(self, x: Tensor, index: int, router: LoraRouter) -> Tensor:
        """Return x + mlp(norm(x)), [N, H]."""
        layer = self.weights.layers[index]
        normed = self._norm(x, layer.post_norm)
        gate_up, down = (_weight(layer.matrices[name]) for name in ("gate_up", "down"))
        gate, up = router.project(normed, gate_up, index, "gate_up").chunk(2, dim=-1)
        return x + router.project(functional.silu(gate) * up, down, index, "down")

    def _attend(self, q: Tensor, kv: Tensor, layer: int, shared: _Pass) -> Tensor:
        """Store the new keys and values, attend, and return [N, Q D]."""
        parts = [self._attend_pool(q, kv, layer, view) for view in shared.views]
        first = len(shared.batch.decode_tokens)
        for chunk in shared.batch.chunks:
            last = first + len(chunk.tokens)
            parts.append(self._attend_chunk(q[first:last], kv[first:last], layer, chunk))
            first = last
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_pool(self, q: Tensor, kv: Tensor, layer: int, view: _PoolView) -> Tensor:
        """Attend with one query per decoding row of a pool; returns [R, Q D]."""
        arch = self.arch
        rows = slice(view.first, view.first + view.num_rows)
        stored = view.pool.kv[layer]  # [rows of the pool, K, 2, capacity, D]
        # as [row, position, 2, K, D], the new tokens are one indexed assignment of [R, 2, K, D]
        stored.permute(0, 3, 2, 1, 4)[view.rows, view.positions] = kv[rows]
        kept = stored[: view.num_rows] if view.is_dense else stored[view.rows]
        keys, values = kept[:, :, :, : view.length].unbind(2)  # [R, K, C, D]
        # The Q / K query heads that share a key head take the axis of query positions, which has
        # length 1 here. So keys are not copied per query head: [R, K, Q / K, D].
        grouped = q[rows].unflatten(1, (arch.num_kv_heads, -1))
        out = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=view.mask)
        return out.reshape(view.num_rows, -1)

    def _attend_chunk(self, q: Tensor, kv: Tensor, layer: int, chunk: Chunk[Row]) -> Tensor:
        """Attend with the T queries of a chunk to all tokens up to its end; returns [T, Q D]."""
        num_new, end = len(q), chunk.start + len(q)
        if chunk.row is not None:
            # [capacity, 2, K, D], a view: assigning to it fills the cache
            stored = chunk.row.pool.kv[layer, chunk.row.index].permute(2, 1, 0, 3)[:end]
            stored[chunk.start :] = kv
            kv = stored
        elif chunk.prefix is not None:
            known = chunk.prefix.pool.kv[layer, chunk.prefix.index].permute(2, 1, 0, 3)
            kv = torch.cat([known[: chunk.start], kv])
        keys, values = kv.unbind(1)
        groups = self.arch.num_heads // self.arch.num_kv_heads
        mask = None
        if chunk.start:
            # query t sees the `start` earlier tokens and the chunk up to itself: a shifted triangle
            mask = torch.ones(num_new, end, dtype=torch.bool, device=q.device).tril_(chunk.start)
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys.transpose(0, 1).repeat_interleave(groups, 0)[None],
            values.transpose(0, 1).repeat_interleave(groups, 0)[None],
            attn_mask=mask,
            is_causal=mask is None,
        )
        return out[0].transpose(0, 1).flatten(1)

    def _pool_views(self, batch: Batch[Row]) -> list[_PoolView]:
        """Return a view per pool with decoding rows; the batch has them grouped by pool."""
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
