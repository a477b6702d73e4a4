"""The KV cache: keys and values of running sequences, and of finished ones for later prompts.

Each sequence has one row, and rows are kept in pools by capacity (128, 256, 512, ... tokens). Rows
are contiguous, not cut into pages: a sequence that outgrows its row moves to a larger pool.
Capacities double, so all moves of a sequence together copy each token about once, and at most half
of a row is unused (beyond the smallest size).

Memory is bounded: `allocate` and `grow` return None instead of exceeding the budget.
"""

from __future__ import annotations

import numpy as np

from tinker_cookbook.local.engine.budget import SMALLEST_ROW
from tinker_cookbook.local.engine.sampling.cache_rows import CacheShape, Pool, Row
from tinker_cookbook.local.engine.sampling.prefix_store import PrefixStore, StoredPrefix

__all__ = ["KvCache"]


class KvCache:
    """All pools and stored prefixes of one model, within one budget of bytes."""

    def __init__(self, shape: CacheShape, max_bytes: int) -> None:
        self.shape = shape
        self.max_bytes = max_bytes
        self.prefixes = PrefixStore(shape, self._prefix_limit)
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

    def restore(self, prefix: StoredPrefix, row: Row, num_tokens: int) -> None:
        """Copy the first `num_tokens` tokens of a stored prefix into a row."""
        self.copy(prefix.row, row, num_tokens)

    def remember(self, key: int, tokens: np.ndarray, row: Row) -> None:
        """Store a finished sequence for later prompts, where there is room."""
        self.prefixes.add(key, tokens, row)

    def _prefix_limit(self) -> int:
        """Return how many bytes stored prefixes may take: at most a quarter of the budget."""
        pools = sum(pool.num_bytes for pool in self._pools.values())
        return min(self.max_bytes - pools, self.max_bytes // 4)

    def _capacities(self) -> list[int]:
        sizes = []
        size = SMALLEST_ROW
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
