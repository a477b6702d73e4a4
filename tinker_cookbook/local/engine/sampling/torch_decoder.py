"""The batch decoder on torch: one forward pass over a ragged batch of decoding rows and chunks.

All N tokens of the batch go through the projections of `torch_layers` together. Only attention
differs: decoding rows (one token each) attend pool by pool, chunks one by one.

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
from tinker_cookbook.local.engine.model.devices import to_device
from tinker_cookbook.local.engine.model.ops import RopeTable
from tinker_cookbook.local.engine.model.weights import ModelWeights
from tinker_cookbook.local.engine.sampling.adapters import LoraRouter, StackedLora
from tinker_cookbook.local.engine.sampling.batch import Batch, Chunk
from tinker_cookbook.local.engine.sampling.cache_rows import Pool, Row, cache_shape
from tinker_cookbook.local.engine.sampling.torch_layers import TorchLayers

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
    masks: list[Tensor | None]
    """bool [T, end] for each chunk: which tokens each of its tokens attends to. None for a chunk
    that begins its sequence: each token attends to itself and those before."""


class TorchDecoder:
    """Runs batches of any kind through one base model whose matrices are dense tensors."""

    exact = False

    def __init__(self, arch: ArchConfig, weights: ModelWeights) -> None:
        self.overhead_tokens = 8 if weights.device.type == "cpu" else 128
        self.arch = arch
        self.cache_shape = cache_shape(arch, weights)
        self.layers = TorchLayers(arch, weights)
        self.rope = RopeTable(arch.rope, arch.head_dim, weights.device)
        self._device = weights.device

    @torch.inference_mode()
    def forward(self, batch: Batch[Row]) -> Tensor:
        """Return the hidden states [N, H] before the final norm, and write keys and values."""
        device, positions = self._device, batch.positions()
        tables = self.rope.up_to(int(positions.max()) + 1)
        places = to_device(positions, device)
        rope = [table[places][:, None] for table in tables]
        shared = _Pass(batch, self._pool_views(batch), [self._mask(c) for c in batch.chunks])
        return self.layers.hidden(
            to_device(batch.tokens(), device),
            rope,
            LoraRouter(batch.adapters(), device),
            lambda q, kv, layer: self._attend(q, kv, layer, shared),
        )

    def next_logits(self, batch: Batch[Row]) -> Tensor:
        """Return float32 logits [N, V] of a batch without chunks, and write keys and values."""
        return self.logits(self.forward(batch), batch.adapters())

    @torch.inference_mode()
    def logits(self, hidden: Tensor, adapters: list[tuple[StackedLora | None, int]]) -> Tensor:
        """Return float32 logits [N, V] for hidden states [N, H] of `forward`."""
        return self.layers.logits(hidden, LoraRouter(adapters, hidden.device)).float()

    def _mask(self, chunk: Chunk[Row]) -> Tensor | None:
        if not chunk.start:
            return None
        # token t sees the `start` earlier tokens and the chunk up to itself: a shifted triangle
        size = len(chunk.tokens), chunk.start + len(chunk.tokens)
        return torch.ones(size, dtype=torch.bool, device=self._device).tril_(chunk.start)

    def _attend(self, q: Tensor, kv: Tensor, layer: int, shared: _Pass) -> Tensor:
        """Store the new keys and values, attend, and return [N, Q D]."""
        parts = [self._attend_pool(q, kv, layer, view) for view in shared.views]
        first = len(shared.batch.decode_tokens)
        for chunk, mask in zip(shared.batch.chunks, shared.masks, strict=True):
            last = first + len(chunk.tokens)
            parts.append(self._attend_chunk(q[first:last], kv[first:last], layer, chunk, mask))
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

    def _attend_chunk(
        self, q: Tensor, kv: Tensor, layer: int, chunk: Chunk[Row], mask: Tensor | None
    ) -> Tensor:
        """Attend with the T queries of a chunk to all tokens up to its end; returns [T, Q D]."""
        end = chunk.start + len(q)
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
        for pool, group in itertools.groupby(batch.decode_rows, key=lambda row: row.pool):
            indices = np.array([row.index for row in group], np.int64)
            num_rows = len(indices)
            positions = np.asarray(batch.decode_positions[first : first + num_rows], np.int64)
            longest = int(positions.max()) + 1
            length = min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, pool.capacity)
            valid = np.arange(length)[None, :] <= positions[:, None]
            mask = to_device(valid[:, None, None], self._device)
            rows, places = (to_device(i, self._device) for i in (indices, positions))
            is_dense = bool(np.array_equal(indices, np.arange(num_rows)))
            views.append(_PoolView(pool, first, num_rows, length, mask, rows, places, is_dense))
            first += num_rows
        return views
