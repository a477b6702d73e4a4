"""Frozen matrices in the layout that the compiled kernels read; one copy trains and samples.

The rows (outputs) of W [out, in] are grouped into panels of `PANEL` neighbours. Inside a panel the
numbers are ordered input by input, so one vector load reads the same input's weight of several
neighbouring outputs, and each output is summed in one chain from the first input to the last:

    W [out, in]  ->  panels [P, in, PANEL],   panels[p, i, j] = W[p * PANEL + j, i]

Every stacked module starts a new panel; its last panel is filled up with rows of zeros. Numbers are
stored as bfloat16 where that loses nothing, which is true of most published weights: half the
memory and memory traffic of float32, with the same results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from tinker_cookbook.local.engine.memory import prefer_large_pages
from tinker_cookbook.local.engine.native.operands import LoraPair

if TYPE_CHECKING:
    from tinker_cookbook.local.engine.native.products import Products

__all__ = [
    "MatrixBlocks",
    "MatrixPacker",
    "PackedMatrix",
    "ShapePacker",
    "holds_bfloat16",
    "pack_panels",
]

_LARGE_PAGE = 2 * 2**20
_BLOCK_BYTES = 64 * 2**20
_WIDEST_PANEL = 32
"""Panel width on processors with AVX-512, the widest of all (`PANEL` in native/tiles.h)."""


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """Stacked modules [out, in], each filled up with rows of zeros to whole panels."""

    panels: Tensor
    """float32 [P, in, PANEL]; or bfloat16 [P, in, PANEL / 2, 2], where the two outputs in a pair
    (one 32-bit word) are half a panel apart, so that one vector load yields both halves."""
    outs: tuple[int, ...]
    """Number of rows of each module."""
    kernels: Products | None
    """Compiled products; None where the matrix has a shape but holds no numbers."""

    @property
    def products(self) -> Products:
        assert self.kernels is not None, "a matrix without numbers has no products"
        return self.kernels

    @property
    def half(self) -> bool:
        """Whether the numbers are stored as bfloat16."""
        return self.panels.dtype == torch.bfloat16

    @property
    def in_features(self) -> int:
        return self.panels.shape[1]

    @property
    def out_features(self) -> int:
        return sum(self.outs)

    @property
    def panel(self) -> int:
        """Number of outputs in a panel."""
        return self.panels[0, 0].numel()

    @property
    def num_bytes(self) -> int:
        return self.panels.nbytes

    @property
    def bytes_per_number(self) -> int:
        return self.panels.element_size()

    def hold(self, lora: LoraPair | None) -> None:
        """Do nothing: the compiled products read the adapter from its own tensors."""

    def new_input(self, rows: int, lora: LoraPair | None) -> tuple[Tensor, Tensor]:
        x = torch.empty(rows, self.in_features)
        return x, x

    def forward(
        self,
        z: Tensor,
        lora: LoraPair | None = None,
        *,
        bias: Tensor | None = None,
        add_to: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return self.products.forward(self, z, lora, bias=bias, add_to=add_to)

    def backward(self, grad: Tensor, lora: LoraPair | None = None) -> tuple[Tensor, Tensor]:
        return self.products.backward(self, grad, lora)

    def multiply_into(self, out: Tensor, x: Tensor) -> None:
        self.products.forward(self, x, out=out)

    def module_addresses(self) -> list[int]:
        """Return the address of each module's first panel."""
        step = self.panel * self.in_features * self.panels.element_size()
        firsts, panel = [], 0
        for out in self.outs:
            firsts.append(self.panels.data_ptr() + panel * step)
            panel += -(-out // self.panel)
        return firsts

    def rows(self, indices: Tensor) -> Tensor:
        """Return rows of the first module, float32 [n, in]."""
        panel, lane = indices // self.panel, indices % self.panel
        if not self.half:
            return self.panels[panel, :, lane]
        width = self.panel // 2
        return self.panels[panel, :, lane % width, lane // width].float()


class MatrixPacker(Protocol):
    """Packs matrices for the compiled kernels."""

    def pack(self, matrix: Tensor, outs: Sequence[int]) -> PackedMatrix:
        """Return a packed copy of [out, in]; `outs` are the rows of each stacked module."""
        ...


class MatrixBlocks:
    """Packs matrices next to each other into blocks of large memory pages.

    A matrix keeps its block alive.
    """

    def __init__(self, products: Products) -> None:
        self._products = products
        self._free = torch.empty(0, dtype=torch.uint8)

    def pack(self, matrix: Tensor, outs: Sequence[int]) -> PackedMatrix:
        """Return a packed copy of [out, in], in bfloat16 where that loses nothing."""
        panels = _pack_shortest(matrix, outs, self._products.panel)
        return PackedMatrix(self._place(panels), tuple(outs), self._products)

    def _place(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy that starts at a cache line."""
        size = tensor.numel() * tensor.element_size()
        taken = -(-size // 64) * 64
        if len(self._free) < taken:
            num_bytes = -(-max(taken, _BLOCK_BYTES) // _LARGE_PAGE) * _LARGE_PAGE
            block = torch.empty(num_bytes + _LARGE_PAGE, dtype=torch.uint8)
            start = -block.data_ptr() % _LARGE_PAGE
            self._free = block[start : start + num_bytes]
            prefer_large_pages(self._free.data_ptr(), num_bytes)
        place, self._free = self._free[:size].view(tensor.dtype), self._free[taken:]
        return place.view(tensor.shape).copy_(tensor)


class ShapePacker:
    """Packs matrices on the device `meta`: the result has the packed shape but no numbers."""

    def __init__(self, panel: int = _WIDEST_PANEL) -> None:
        self._panel = panel

    def pack(self, matrix: Tensor, outs: Sequence[int]) -> PackedMatrix:
        """Return the shape of a packed copy of [out, in]."""
        return PackedMatrix(_pack_shortest(matrix, outs, self._panel), tuple(outs), None)


def _pack_shortest(matrix: Tensor, outs: Sequence[int], panel: int) -> Tensor:
    """Return the panels of a matrix, in bfloat16 where that loses nothing."""
    exact = holds_bfloat16(matrix)
    panels = pack_panels(matrix.to(torch.bfloat16 if exact else torch.float32), outs, panel)
    return panels.unflatten(-1, (2, -1)).transpose(-1, -2) if exact else panels


def pack_panels(matrix: Tensor, outs: Sequence[int], panel: int) -> Tensor:
    """Return [out, in] as panels [P, in, panel], with each module filled up to whole panels."""
    if any(out % panel for out in outs):
        parts = matrix.split(list(outs))
        matrix = torch.cat([functional.pad(part, (0, 0, 0, -len(part) % panel)) for part in parts])
    return matrix.unflatten(0, (-1, panel)).transpose(1, 2).contiguous()


def holds_bfloat16(matrix: Tensor) -> bool:
    """Return whether bfloat16 holds the numbers without loss; unknown numbers count as not."""
    if matrix.dtype == torch.bfloat16:
        return True
    if matrix.is_meta:
        return False
    return torch.equal(matrix.to(torch.bfloat16).to(matrix.dtype), matrix)
