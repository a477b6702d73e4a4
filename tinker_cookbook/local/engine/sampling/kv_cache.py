"""The KV cache: keys and values of running sequences, and of finished ones for later prompts.

Each sequence has one row, and rows are kept in pools by capacity (128, 256, 512, ... tokens). All
rows of a pool are one tensor [L, R, H, 2, C, D], so a decode step attends to a whole pool in one
call without copying. Rows are contiguous, not cut into pages: a sequence that outgrows its row
moves to a larger pool. Capacities double, so all moves of a sequence together copy each token about
once, and at most half of a row is unused (beyond the smallest size).

Memory is bounded: `allocate` and `grow` return None instead of exceeding the budget.

For one layer, row and head, all C keys are contiguous ([C, D]), and then all values: reading long
contiguous pieces is twice as fast as reading short ones.

Axes: L layers, R rows, C capacity in tokens, H key/value heads, 2 for key and value, D head
dimension.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tinker_cookbook.local.engine.model.architecture import ArchConfig
from tinker_cookbook.local.engine.model.weights import ModelWeights

__all__ = ["CacheShape", "KvCache", "Pool", "PrefixStore", "Row", "cache_shape", "num_shared"]

_SMALLEST_CAPACITY = 128
_MIN_SHARED_TOKENS = 8
"""Shorter prefixes are not stored and not copied: computing them is as fast."""
_MAX_STORED_PREFIXES = 512


@dataclass(frozen=True)
class CacheShape:
    """Layout of the keys and values of one token."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    max_tokens: int
    """Maximum tokens per sequence: the model's context length."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        per_layer = 2 * self.num_kv_heads * self.head_dim
        return self.num_layers * per_layer * self.dtype.itemsize

    def zeros(self, num_rows: int, capacity: int) -> Tensor:
        """Allocate [L, R, H, 2, C, D].

        Zeros, not uninitialized memory: masked positions get weight 0, and 0 times NaN is NaN.
        """
        size = (self.num_layers, num_rows, self.num_kv_heads, 2, capacity, self.head_dim)
        return torch.zeros(size, dtype=self.dtype, device=self.device)


def cache_shape(arch: ArchConfig, weights: ModelWeights, dtype: torch.dtype) -> CacheShape:
    """Return the layout for a native model, with keys and values in `dtype`."""
    return CacheShape(
        num_layers=arch.num_layers,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        dtype=dtype,
        device=weights.device,
        max_tokens=arch.max_positions,
    )


@dataclass(eq=False)
class Row:
    """The place of one sequence: `pool.kv[:, index]`."""

    pool: Pool
    index: int
    """Place in the pool; it changes when rows are freed or activated."""

    def activate(self) -> None:
        """Move the row among those that decode."""
        self.pool.activate(self)


class Pool:
    """Rows of one capacity.

    `rows[:num_active]` belong to sequences that decode, the other rows to sequences in prefill. So
    a decode step reads the first rows of the tensor, a view, and no row that is half computed.
    """

    def __init__(self, shape: CacheShape, capacity: int) -> None:
        self.capacity = capacity
        self.rows: list[Row] = []
        self.num_active = 0
        self._shape = shape
        self.kv: Tensor = shape.zeros(0, capacity)

    @property
    def num_bytes(self) -> int:
        """Allocated bytes."""
        return self.kv.shape[1] * self.bytes_per_row

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one row."""
        return self.capacity * self._shape.bytes_per_token

    @property
    def num_spare(self) -> int:
        """Number of allocated rows without a sequence."""
        return self.kv.shape[1] - len(self.rows)

    def resize(self, num_rows: int) -> None:
        """Change the allocation to `num_rows` rows, which must include those in use."""
        kv = self._shape.zeros(num_rows, self.capacity)
        kv[:, : len(self.rows)] = self.kv[:, : len(self.rows)]
        self.kv = kv

    def add(self) -> Row:
        """Take a spare row."""
        row = Row(self, len(self.rows))
        self.rows.append(row)
        return row

    def activate(self, row: Row) -> None:
        """Exchange a prefilled row with the first one that does not decode."""
        self._swap(row.index, self.num_active)
        self.num_active += 1

    def remove(self, row: Row) -> None:
        """Give a row back and close the gap.

        At most two rows are copied: the last decoding row moves into the gap, and the last row in
        prefill moves into the place that this leaves.
        """
        if row.index < self.num_active:
            self.num_active -= 1
            self._move(self.num_active, row.index)
        self._move(len(self.rows) - 1, row.index)
        self.rows.pop()

    def _move(self, source: int, target: int) -> None:
        """Like `_swap`, but the content of `target` is lost: one copy instead of three."""
        if source == target:
            return
        self.kv[:, target] = self.kv[:, source]
        self._exchange(source, target)

    def _swap(self, first: int, second: int) -> None:
        if first == second:
            return
        kept = self.kv[:, second].clone()
        self.kv[:, second] = self.kv[:, first]
        self.kv[:, first] = kept
        self._exchange(first, second)

    def _exchange(self, first: int, second: int) -> None:
        rows = self.rows
        rows[first], rows[second] = rows[second], rows[first]
        rows[first].index, rows[second].index = first, second


class KvCache:
    """All pools and stored prefixes of one model, within one budget of bytes."""

    def __init__(self, shape: CacheShape, max_bytes: int) -> None:
        self.shape = shape
        self.max_bytes = max_bytes
        self.shares_prefixes = True
        self.prefixes = PrefixStore(shape)
        self._pools: dict[int, Pool] = {}

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values."""
        return self.shape.bytes_per_token

    @property
    def num_bytes(self) -> int:
        """Allocated bytes, stored prefixes included."""
        return sum(pool.num_bytes for pool in self._pools.values()) + self.prefixes.num_bytes

    @property
    def max_row_tokens(self) -> int:
        """Maximum tokens of a sequence when the cache holds nothing else."""
        fitting = [size for size in self._capacities() if self._row_bytes(size) <= self.max_bytes]
        return fitting[-1] if fitting else 0

    def allocate(self, num_tokens: int, expected: int = 1) -> Row | None:
        """Return a row for `num_tokens` tokens; None if the budget does not allow it now.

        Args:
            expected: how many such rows are likely to be taken soon, including this one. A pool
                that grows is copied, so it grows for all of them at once where memory is free.
        """
        capacity = self._capacity_for(num_tokens)
        pool = self._pools.get(capacity)
        if pool is None:
            pool = self._pools[capacity] = Pool(self.shape, capacity)
        if pool.num_spare == 0 and not self._extend(pool, expected):
            return None
        return pool.add()

    def grow(self, row: Row, num_tokens: int) -> Row | None:
        """Return a row with room for `num_tokens` and the content of `row`; None if none is free.

        A decoding row stays decoding. If the content moved, the old row is given back.
        """
        if num_tokens <= row.pool.capacity:
            return row
        larger = self.allocate(num_tokens)
        if larger is None:
            return None
        self.copy(row, larger, row.pool.capacity)
        if row.index < row.pool.num_active:
            larger.pool.activate(larger)
        self.free(row)
        return larger

    def copy(self, source: Row, target: Row, num_tokens: int) -> None:
        """Copy keys and values of the first `num_tokens` tokens into another row."""
        kept = source.pool.kv[:, source.index, ..., :num_tokens, :]
        target.pool.kv[:, target.index, ..., :num_tokens, :] = kept

    def free(self, row: Row) -> None:
        """Give a row back; the last one of a pool frees the pool's memory."""
        row.pool.remove(row)
        if not row.pool.rows:
            self._pools.pop(row.pool.capacity, None)

    def restore(self, key: int, tokens: np.ndarray, row: Row, *, longer_than: int) -> int:
        """Copy the longest stored prefix of `tokens` into a row; see `PrefixStore.restore`."""
        return self.prefixes.restore(key, tokens, row, longer_than=longer_than)

    def forget(self, key: int) -> None:
        """Drop the stored prefixes of weights that are gone."""
        self.prefixes.forget(key)

    def remember(self, key: int, tokens: np.ndarray, row: Row) -> None:
        """Store a finished sequence for later prompts; at most a quarter of the budget is used."""
        num_bytes = len(tokens) * self.shape.bytes_per_token
        pools = self.num_bytes - self.prefixes.num_bytes
        room = min(self.max_bytes - pools, self.max_bytes // 4) - num_bytes
        if room >= 0:
            self.prefixes.shrink(room)
            self.prefixes.add(key, tokens, row)

    def _capacities(self) -> list[int]:
        sizes = []
        size = _SMALLEST_CAPACITY
        while size < self.shape.max_tokens:
            sizes.append(size)
            size *= 2
        return [*sizes, self.shape.max_tokens]

    def _capacity_for(self, num_tokens: int) -> int:
        return next(size for size in self._capacities() if size >= num_tokens)

    def _row_bytes(self, capacity: int) -> int:
        return capacity * self.shape.bytes_per_token

    def _extend(self, pool: Pool, expected: int) -> bool:
        """Allocate more rows: for all expected ones, twice as many, or at least one more."""
        used = len(pool.rows)
        free = (self.max_bytes - self.num_bytes) // pool.bytes_per_row
        for wanted in (max(used + min(expected, free), 2 * used, 4), used + 1):
            if self._reclaim((wanted - used) * pool.bytes_per_row):
                pool.resize(wanted)
                return True
        if not pool.rows:
            self._pools.pop(pool.capacity, None)
        return False

    def _reclaim(self, num_bytes: int) -> bool:
        """Free memory until `num_bytes` more fit: spare rows first, then the oldest prefixes."""
        if self.num_bytes + num_bytes <= self.max_bytes:
            return True
        in_use = sum(len(pool.rows) * pool.bytes_per_row for pool in self._pools.values())
        if in_use + num_bytes > self.max_bytes:
            return False
        for pool in self._pools.values():
            if pool.num_spare:
                pool.resize(len(pool.rows))
        self.prefixes.shrink(self.max_bytes - num_bytes - in_use)
        return self.num_bytes + num_bytes <= self.max_bytes


@dataclass(eq=False)
class _Prefix:
    key: int
    tokens: np.ndarray
    kv: Tensor

    @property
    def num_bytes(self) -> int:
        return self.kv.numel() * self.kv.element_size()


class PrefixStore:
    """Keys and values of recent sequences, found by their tokens (least recently used go first)."""

    def __init__(self, shape: CacheShape) -> None:
        self._shape = shape
        self._entries: OrderedDict[int, _Prefix] = OrderedDict()
        self._next_id = 0
        self.num_bytes = 0

    def add(self, key: int, tokens: np.ndarray, row: Row) -> None:
        """Keep a copy of a row's keys and values of `tokens`; `key` identifies the weights."""
        if len(tokens) < _MIN_SHARED_TOKENS:
            return
        kv = row.pool.kv[:, row.index, ..., : len(tokens), :].clone()
        entry = _Prefix(key, np.ascontiguousarray(tokens), kv)
        self._entries[self._next_id] = entry
        self._next_id += 1
        self.num_bytes += entry.num_bytes
        while len(self._entries) > _MAX_STORED_PREFIXES:
            self._drop(next(iter(self._entries)))

    def restore(self, key: int, tokens: np.ndarray, row: Row, *, longer_than: int) -> int:
        """Copy the longest stored prefix of `tokens` into a row.

        Args:
            longer_than: a shorter or equal prefix is not copied: the caller has a better source.

        Returns:
            The number of tokens copied, or 0.
        """
        best_id, best = -1, max(longer_than, _MIN_SHARED_TOKENS - 1)
        for entry_id, entry in self._entries.items():
            if entry.key == key and (shared := num_shared(entry.tokens, tokens)) > best:
                best_id, best = entry_id, shared
        if best_id < 0:
            return 0
        row.pool.kv[:, row.index, ..., :best, :] = self._entries[best_id].kv[..., :best, :]
        self._entries.move_to_end(best_id)
        return best

    def forget(self, key: int) -> None:
        """Drop all entries of weights that are gone."""
        for entry_id in [i for i, entry in self._entries.items() if entry.key == key]:
            self._drop(entry_id)

    def shrink(self, max_bytes: int) -> None:
        """Drop the least recently used entries until at most `max_bytes` are held."""
        while self._entries and self.num_bytes > max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, entry_id: int) -> None:
        self.num_bytes -= self._entries.pop(entry_id).num_bytes


def num_shared(first: np.ndarray, second: np.ndarray) -> int:
    """Return how many leading tokens two sequences share."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
