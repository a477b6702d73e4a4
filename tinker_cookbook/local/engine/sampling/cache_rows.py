"""Memory for keys and values: rows, and pools of rows with one capacity.

All rows of a pool are one tensor [L, R, H, 2, C, D], so a decode step attends to a whole pool in
one call without copying. For one layer, row and head, all C keys are contiguous ([C, D]), and then
all values: reading long contiguous pieces is twice as fast as reading short ones.

Axes: L layers, R rows, C capacity in tokens, H key/value heads, 2 for key and value, D head
dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tinker_cookbook.local.engine.model.architecture import ArchConfig
from tinker_cookbook.local.engine.model.weights import ModelWeights

__all__ = ["CacheShape", "Pool", "Row", "cache_shape"]


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
    hidden_size: int = 0
    """Numbers per hidden state."""
    reads_unwritten: bool = True
    """Whether the decoder multiplies keys and values that were never written, with weight 0."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        per_layer = 2 * self.num_kv_heads * self.head_dim
        return self.num_layers * per_layer * self.dtype.itemsize

    def rows(self, num_rows: int, capacity: int) -> Tensor:
        """Allocate the rows of a pool, [L, R, H, 2, C, D].

        They are zeros if the decoder reads what was not written: 0 times NaN is NaN.
        """
        rows = self.empty(num_rows, capacity)
        return rows.zero_() if self.reads_unwritten else rows

    def empty(self, num_rows: int, capacity: int) -> Tensor:
        """Allocate [L, R, H, 2, C, D] for rows that are read only where they were written."""
        size = (self.num_layers, num_rows, self.num_kv_heads, 2, capacity, self.head_dim)
        return torch.empty(size, dtype=self.dtype, device=self.device)


def cache_shape(arch: ArchConfig, weights: ModelWeights) -> CacheShape:
    """Return the layout for a native model: keys and values have the format of its products."""
    return CacheShape(
        num_layers=arch.num_layers,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        dtype=weights.product_dtype,
        device=weights.device,
        max_tokens=arch.max_positions,
        hidden_size=arch.hidden_size,
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
        self.kv: Tensor = shape.rows(0, capacity)

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
        kv = self._shape.rows(num_rows, self.capacity)
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
