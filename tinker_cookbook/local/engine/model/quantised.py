"""Frozen matrices in 8 or 4 bits: how they are rounded, and how the compiled kernels store them.

The inputs of an output are cut into groups of `GROUP`. A group has one scale in bfloat16, and a
weight is `scale * number`, rounded once to bfloat16. Training (forward and backward) and sampling
use the same weights.

Per panel and group of inputs, the packed matrix has the scales of all outputs and then their
numbers, so that they are next to each other in memory; `native/quantised.h` describes the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tinker_cookbook.local.engine.model.packed_matrix import (
    WIDEST_PANEL,
    BytePanels,
    MatrixBlocks,
    PackedMatrix,
    pack_panels,
)
from tinker_cookbook.local.engine.native.products import Products

__all__ = ["GROUP", "QuantisedBlocks", "QuantisedMatrix", "QuantisedShapes", "round_to_bits"]

GROUP = 32
"""Number of inputs with one scale (`GROUP` in native/quantised.h)."""
_ROWS_BYTES = 2 * 2**20
"""Memory of the float32 copy that is quantised at a time."""
_SMALLEST_SCALE = 2.0**-100
"""Groups below it become zeros: their weights would leave the range of normal numbers."""


@dataclass(frozen=True, eq=False)
class QuantisedMatrix(BytePanels):
    """A packed matrix in 8 or 4 bits; `panels` is uint8 [P, groups, bytes of a group]."""

    bits: int = 8

    @property
    def bytes_per_number(self) -> float:
        return (self.bits + 16 / GROUP) / 8

    def rows(self, indices: Tensor) -> Tensor:
        panel, lane = indices // self.width, indices % self.width
        begin = 2 * self.width
        scales = self.panels[:, :, :begin].view(torch.bfloat16)[panel, :, lane]  # [n, groups]
        stored = self.panels[:, :, begin:]
        if self.paired:
            words = stored.view(torch.int32).unflatten(2, (-1, self.width, 2))
            numbers = _from_words(words[panel, :, :, lane], self.bits)
        else:
            columns = stored.view(torch.int8).unflatten(2, (-1, self.width))
            numbers = _from_bytes(columns[panel, :, :, lane], self.bits)
        weights = (numbers.float() * scales.float()[:, :, None]).bfloat16()
        return weights.flatten(1)[:, : self.in_features].float()


class QuantisedBlocks(MatrixBlocks):
    """Packs matrices in 8 or 4 bits, and the output embedding in 8."""

    def __init__(self, products: Products, bits: int, *, paired: bool = False) -> None:
        super().__init__(products, paired=paired)
        self._bits = bits

    def pack(self, matrix: Tensor, outs: Sequence[int], *, head: bool = False) -> PackedMatrix:
        bits, width = 8 if head else self._bits, self._products.panel
        place = self._blocks.place(_pack(matrix, outs, width, bits, paired=self._paired))
        inputs = matrix.shape[1]
        return QuantisedMatrix(
            place, tuple(outs), inputs, self._products, self._paired, bits=bits, width=width
        )


class QuantisedShapes:
    """Counterpart of `QuantisedBlocks` for matrices without numbers."""

    def __init__(self, bits: int, *, paired: bool = False) -> None:
        self._bits, self._paired = bits, paired

    def pack(self, matrix: Tensor, outs: Sequence[int], *, head: bool = False) -> PackedMatrix:
        bits, inputs = 8 if head else self._bits, matrix.shape[1]
        panels = sum(-(-out // WIDEST_PANEL) for out in outs)
        block = WIDEST_PANEL * (2 + GROUP * bits // 8)
        shape = torch.empty(panels, -(-inputs // GROUP), block, dtype=torch.uint8, device="meta")
        return QuantisedMatrix(shape, tuple(outs), inputs, None, self._paired, bits=bits)


def round_to_bits(matrix: Tensor, bits: int) -> Tensor:
    """Return the weights that a quantised [out, in] has, in bfloat16."""
    parts = []
    for part in matrix.split(_rows_at_a_time(matrix)):
        numbers, scales = _quantise(part, bits)
        weights = numbers.unflatten(1, (-1, GROUP)).float() * scales.float()[:, :, None]
        parts.append(weights.bfloat16().flatten(1)[:, : matrix.shape[1]])
    return torch.cat(parts)


def _rows_at_a_time(matrix: Tensor) -> int:
    return max(1, _ROWS_BYTES // (4 * matrix.shape[1]))


def _quantise(matrix: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return int8 numbers [out, groups * GROUP] and bfloat16 scales [out, groups].

    The largest weight of a group becomes the most negative number, whose size is one more than that
    of the largest positive one. So a scale may be negative.
    """
    groups = functional.pad(matrix.float(), (0, -matrix.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    lowest, highest = groups.amin(2), groups.amax(2)
    largest = torch.where(highest > -lowest, highest, lowest)
    limit = 2 ** (bits - 1)
    scales = (largest / -limit).bfloat16()
    usable = scales.float().abs() > _SMALLEST_SCALE
    scales = torch.where(usable, scales, 0)
    inverse = torch.where(usable, 1 / scales.float(), 0)
    numbers = (groups * inverse[:, :, None]).round_().clamp_(-limit, limit - 1)
    return numbers.to(torch.int8).flatten(1), scales


def _pack(matrix: Tensor, outs: Sequence[int], panel: int, bits: int, *, paired: bool) -> Tensor:
    """Return the panels of a quantised copy of [out, in], uint8 [P, groups, bytes of a group]."""
    parts = [_quantise(part, bits) for part in matrix.split(_rows_at_a_time(matrix))]
    scales = torch.cat([part for _, part in parts])
    store = _to_words if paired else _to_bytes
    # [out, groups * units, bytes of a unit]: the units of an output are next to those of the others
    units = torch.cat([store(numbers, bits) for numbers, _ in parts])
    rows = [pack_panels(part, outs, panel) for part in units.unbind(2)]
    stored = torch.stack(rows, 3).unflatten(1, (scales.shape[1], -1)).flatten(2)
    return torch.cat(
        [pack_panels(scales, outs, panel).view(torch.uint8), stored.view(torch.uint8)], 2
    )


def _to_bytes(numbers: Tensor, bits: int) -> Tensor:
    """Return int8 numbers [out, in] as bytes [out, bytes, 1], in the layout for float32."""
    if bits == 4:
        numbers = (numbers[:, 0::2] & 15) | (numbers[:, 1::2] << 4)
    return numbers[:, :, None]


def _from_bytes(stored: Tensor, bits: int) -> Tensor:
    """Return the numbers [..., GROUP] of int8 [..., bytes of a group]."""
    if bits == 4:
        return torch.stack([(stored << 4) >> 4, stored >> 4], -1).flatten(-2)
    return stored


def _first_bit(bits: int) -> int:
    """Return the place of a word's first number (`FIRST_BIT` in native/quantised.h)."""
    return 1 if bits == 8 else 5


def _to_words(numbers: Tensor, bits: int) -> Tensor:
    """Return int8 numbers [out, in] as int32 [out, runs, 2], in the layout for pairs.

    A run has 8 inputs (16 in 4 bits), those with even numbers in its first word.
    """
    positive = numbers.to(torch.int32) + 2 ** (bits - 1)
    columns = positive.unflatten(1, (-1, 32 // bits, 2))  # [out, runs, numbers of a word, 2]
    words = columns.new_zeros(columns[:, :, 0].shape)
    for index, column in enumerate(columns.unbind(2)):
        place = (_first_bit(bits) + bits * index) % 32
        words |= column << place  # of the number that crosses bit 31, the lower part
        if place + bits > 32:
            words |= column >> (32 - place)
    return words


def _from_words(words: Tensor, bits: int) -> Tensor:
    """Return the numbers [..., GROUP] of int32 [..., runs of a group, 2]."""
    columns = []
    for index in range(32 // bits):
        place = (_first_bit(bits) + bits * index) % 32
        column = words >> place
        if place + bits > 32:
            lower = (1 << (32 - place)) - 1  # a shift to the right repeats the sign
            column = (column & lower) | (words << (32 - place))
        columns.append((column & (2**bits - 1)) - 2 ** (bits - 1))
    return torch.stack(columns, -2).flatten(-3)  # [..., runs, numbers of a word, 2] flattened
