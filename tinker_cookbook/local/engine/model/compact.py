"""Frozen matrices in bfloat16 that take 12 bits per number, without loss.

The numbers of a matrix have few different exponents, so 4 bits per number name them; the few
numbers with others are listed next to the panels. `native/compact.h` describes the layout, and the
kernels expand panels while they read them. So products have the bits of the matrix in 16 bits,
which takes a third more memory and, where memory limits the speed, more time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinker_cookbook.local.engine.model.packed_matrix import (
    WIDEST_PANEL,
    BytePanels,
    MatrixBlocks,
    PackedMatrix,
    pack_pairs,
)
from tinker_cookbook.local.engine.native.compact import COMPACT_BITS, CompactKernels
from tinker_cookbook.local.engine.native.products import Products

__all__ = ["CompactBlocks", "CompactMatrix", "CompactShapes"]

_MOST_EXCEPTIONS = 0.005
"""Largest share of numbers that are exceptions; with more, panels would be slow to expand."""
_HEADER_BYTES = 128
_UNIT_INPUTS, _UNIT_BYTES = 4, 6 * WIDEST_PANEL
_GROUP_INPUTS = 32
"""As in `native/compact.h`, for plans on machines without a compiler."""


@dataclass(frozen=True, eq=False)
class CompactMatrix(BytePanels):
    """A packed matrix in 12 bits; `panels` is uint8 [P, bytes of a panel]."""

    bits: int = COMPACT_BITS
    list_bytes: int = 0
    """Bytes of the exceptions, which follow the panels."""
    reader: CompactKernels | None = None

    @property
    def num_bytes(self) -> int:
        return self.panels.nbytes + self.list_bytes

    @property
    def bytes_per_number(self) -> float:
        return COMPACT_BITS / 8

    def rows(self, indices: Tensor) -> Tensor:
        assert self.reader is not None, "a matrix without numbers has no rows"
        return self.reader.rows(self.panels, self.in_features, indices)


class CompactBlocks(MatrixBlocks):
    """Packs matrices in 12 bits per number, for arithmetic in bfloat16.

    A matrix with too many different exponents is packed in 16 bits.
    """

    def __init__(self, products: Products, kernels: CompactKernels) -> None:
        super().__init__(products, paired=True)
        self._kernels = kernels

    def pack(self, matrix: Tensor, outs: Sequence[int], *, head: bool = False) -> PackedMatrix:
        inputs, width = matrix.shape[1], self._products.panel
        pairs = pack_pairs(matrix, outs, width)
        counts = self._kernels.count_exceptions(pairs)
        if int(counts.sum()) > _MOST_EXCEPTIONS * pairs.numel():
            return self._place(pairs, outs, inputs)
        sizes = 4 * counts + self._kernels.list_bytes(inputs)
        panel_bytes = self._kernels.panel_bytes(inputs)
        size = len(pairs) * panel_bytes
        memory = self._blocks.reserve(size + int(sizes.sum()))
        self._kernels.pack(pairs, memory, size + sizes.cumsum(0) - sizes)
        return CompactMatrix(
            memory[:size].view(len(pairs), panel_bytes),
            tuple(outs),
            inputs,
            self._products,
            paired=True,
            width=width,
            list_bytes=int(sizes.sum()),
            reader=self._kernels,
        )


class CompactShapes:
    """Counterpart of `CompactBlocks` for matrices without numbers, which have no exceptions."""

    def pack(self, matrix: Tensor, outs: Sequence[int], *, head: bool = False) -> PackedMatrix:
        inputs = matrix.shape[1]
        panels = sum(-(-out // WIDEST_PANEL) for out in outs)
        size = _HEADER_BYTES + -(-inputs // _UNIT_INPUTS) * _UNIT_BYTES
        shape = torch.empty(panels, size, dtype=torch.uint8, device="meta")
        lists = panels * 4 * (-(-inputs // _GROUP_INPUTS) + 1)
        return CompactMatrix(shape, tuple(outs), inputs, None, paired=True, list_bytes=lists)
