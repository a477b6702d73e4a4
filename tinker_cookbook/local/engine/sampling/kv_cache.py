"""Keys and values of running sequences, and of finished ones that a later prompt may begin with.

Sequences live in pools by capacity (128, 256, 512, ... tokens). All rows of a pool are one tensor,
so a decode step attends to a pool in one call without copying, and at most half of a row is unused.
Memory is bounded: `allocate` and `grow` say no instead of exceeding the budget.

The keys of a head stand one after the other, and so do its values: memory is twice as fast there as
at short pieces.

Axes: L layers, R rows, C capacity in tokens, H key/value heads, D head dimension.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinker_cookbook.local.engine.model.architecture import ArchConfig
from tinker_cookbook.local.engine.model.weights import ModelWeights

__all__ = ["CacheShape", "KvCache", "Pool", "PrefixStore", "Row", "cache_shape", "num_shared"]

_SMALLEST_CAPACITY = 128
_MIN_SHARED_TOKENS = 8
_MAX_STORED_PREFIXES = 512


@dataclass(frozen=True)
class CacheShape:
    """What a cached token looks like."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    max_tokens: int
    """Longest sequence, the model's context length."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        per_layer = 2 * self.num_kv_heads * self.head_dim
        return self.num_layers * per_layer * self.dtype.itemsize

    def zeros(self, num_rows: int, capacity: int) -> Tensor:
        """Allocate [L, R, H, 2, C, D]. Masked places may hold anything finite, but no NaN."""
        size = (self.num_layers, num_rows, self.num_kv_heads, 2, capacity, self.head_dim)
        return torch.zeros(size, dtype=self.dtype, device=self.device)


def cache_shape(arch: ArchConfig, weights: ModelWeights, dtype: torch.dtype) -> CacheShape:
    """The cached token of a native model, its keys and values in `dtype`."""
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
    """Place of one sequence."""

    pool: Pool
    index: int
    owner: Any = None


class Pool:
    """Rows of one capacity; `rows[:num_active]` are decoding, the rest are being prefilled."""

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
        """Allocated rows that nobody uses."""
        return self.kv.shape[1] - len(self.rows)

    def resize(self, num_rows: int) -> None:
        """Allocate for exactly `num_rows`, at least those in use."""
        kv = self._shape.zeros(num_rows, self.capacity)
        kv[:, : len(self.rows)] = self.kv[:, : len(self.rows)]
        self.kv = kv

    def add(self) -> Row:
        """Take a spare row."""
        row = Row(self, len(self.rows))
        self.rows.append(row)
        return row

    def activate(self, row: Row) -> None:
        """Move a prefilled row among the decoding ones."""
        self._swap(row.index, self.num_active)
        self.num_active += 1

    def remove(self, row: Row) -> None:
        """Give a row back; others move so that the used and the decoding ones stay dense."""
        if row.index < self.num_active:
            self.num_active -= 1
            self._move(self.num_active, row.index)
        self._move(len(self.rows) - 1, row.index)
        self.rows.pop()

    def _move(self, source: int, target: int) -> None:
        """Exchange two rows of which the target's content is not needed any more."""
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
    """All pools of one model, within one budget of bytes."""

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
        """Longest sequence that fits when the cache holds nothing else."""
        fitting = [size for size in self._capacities() if self._row_bytes(size) <= self.max_bytes]
        return fitting[-1] if fitting else 0

    def active_pools(self) -> list[Pool]:
        """Pools with decoding rows, smallest capacity first."""
        return [self._pools[size] for size in sorted(self._pools) if self._pools[size].num_active]

    def allocate(self, num_tokens: int, expected: int = 1) -> Row | None:
        """Take a row for `num_tokens` tokens; None if the budget does not allow it now.

        Args:
            expected: how many such rows are likely to be taken, this one included. Growing a pool
                copies it, so it grows for all of them where memory is free.
        """
        capacity = self._capacity_for(num_tokens)
        pool = self._pools.get(capacity)
        if pool is None:
            pool = self._pools[capacity] = Pool(self.shape, capacity)
        if pool.num_spare == 0 and not self._extend(pool, expected):
            return None
        return pool.add()

    def grow(self, row: Row, num_tokens: int) -> Row | None:
        """Return a row with room for `num_tokens` that holds what `row` held; None if none is free.

        A decoding row stays decoding. On success the old row is given back.
        """
        if num_tokens <= row.pool.capacity:
            return row
        larger = self.allocate(num_tokens)
        if larger is None:
            return None
        self.copy(row, larger, row.pool.capacity)
        larger.owner = row.owner
        if row.index < row.pool.num_active:
            larger.pool.activate(larger)
        self.free(row)
        return larger

    def copy(self, source: Row, target: Row, num_tokens: int) -> None:
        """Copy the first tokens of a row into another."""
        kept = source.pool.kv[:, source.index, ..., :num_tokens, :]
        target.pool.kv[:, target.index, ..., :num_tokens, :] = kept

    def free(self, row: Row) -> None:
        """Give a row back; an empty pool returns its memory."""
        row.pool.remove(row)
        if not row.pool.rows:
            self._pools.pop(row.pool.capacity, None)

    def restore(self, key: int, tokens: np.ndarray, row: Row, *, longer_than: int) -> int:
        """Copy the longest stored beginning of `tokens` into a row; return its length or 0."""
        return self.prefixes.restore(key, tokens, row, longer_than=longer_than)

    def forget(self, key: int) -> None:
        """Drop stored prefixes of weights that are gone."""
        self.prefixes.forget(key)

    def remember(self, key: int, tokens: np.ndarray, row: Row) -> None:
        """Keep a copy of a finished sequence for prompts that begin with it, if there is room."""
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
        """Make room for more bytes: unused rows first, then the oldest prefixes."""
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
    """Keys and values of recent sequences, oldest dropped first, found by their tokens."""

    def __init__(self, shape: CacheShape) -> None:
        self._shape = shape
        self._entries: OrderedDict[int, _Prefix] = OrderedDict()
        self._next_id = 0
        self.num_bytes = 0

    def add(self, key: int, tokens: np.ndarray, row: Row) -> None:
        """Keep a copy of what a row holds for `tokens`; `key` stands for the weights."""
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
        """Copy the longest known beginning of `tokens` into a row; return its length or 0."""
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
        """Drop all entries made with weights that are gone."""
        for entry_id in [i for i, entry in self._entries.items() if entry.key == key]:
            self._drop(entry_id)

    def shrink(self, max_bytes: int) -> None:
        """Drop the least recently used entries until at most `max_bytes` remain."""
        while self._entries and self.num_bytes > max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, entry_id: int) -> None:
        self.num_bytes -= self._entries.pop(entry_id).num_bytes


def num_shared(first: np.ndarray, second: np.ndarray) -> int:
    """Return how many leading tokens two sequences share."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
