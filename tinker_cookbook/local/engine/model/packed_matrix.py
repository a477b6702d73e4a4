"""Frozen matrices as the compiled kernels read them; one copy serves training and sampling.

`PANEL` neighbouring outputs stand side by side, so that a vector holds neighbours and an output is
summed in one chain. Numbers are bfloat16 where that loses nothing, as with the weights of most
published models: half the memory and half the traffic of float32, with the same results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from tinker_cookbook.local.engine.memory import prefer_large_pages
from tinker_cookbook.local.engine.native.operands import LoraPair

if TYPE_CHECKING:
    from tinker_cookbook.local.engine.native.products import Products

__all__ = ["MatrixBlocks", "PackedMatrix", "holds_bfloat16", "pack_panels"]

_LARGE_PAGE = 2 * 2**20
_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """Stacked modules [out, in], each filled up with rows of zeros to whole panels."""

    panels: Tensor
    """float32 [P, in, PANEL]; or bfloat16 [P, in, PANEL / 2, 2], where two outputs that are half a
    panel apart are neighbours (a word of 32 bits)."""
    outs: tuple[int, ...]
    """Rows of each module."""
    products: Products

    @property
    def half(self) -> bool:
        """Whether the numbers are bfloat16."""
        return self.panels.dtype == torch.bfloat16

    @property
    def in_features(self) -> int:
        return self.panels.shape[1]

    @property
    def out_features(self) -> int:
        return sum(self.outs)

    @property
    def panel(self) -> int:
        """Outputs side by side."""
        return self.panels[0, 0].numel()

    @property
    def num_bytes(self) -> int:
        return self.panels.numel() * self.panels.element_size()

    def hold(self, lora: LoraPair | None) -> None:
        """Nothing: products read the adapter where it is."""

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
        """Where each module's first panel begins."""
        step = self.panel * self.in_features * self.panels.element_size()
        firsts, panel = [], 0
        for out in self.outs:
            firsts.append(self.panels.data_ptr() + panel * step)
            panel += -(-out // self.panel)
        return firsts

    def rows(self, indices: Tensor) -> Tensor:
        """float32 [n, in]: rows of the first module."""
        panel, lane = indices // self.panel, indices % self.panel
        if not self.half:
            return self.panels[panel, :, lane]
        width = self.panel // 2
        return self.panels[panel, :, lane % width, lane // width].float()


class MatrixBlocks:
    """Packs matrices side by side into blocks of large pages; a matrix in a block holds it."""

    def __init__(self, products: Products) -> None:
        self._products = products
        self._free = torch.empty(0, dtype=torch.uint8)

    def pack(self, matrix: Tensor, outs: Sequence[int]) -> PackedMatrix:
        """A packed copy of [out, in], in bfloat16 where that loses nothing."""
        exact = holds_bfloat16(matrix)
        matrix = matrix.to(torch.bfloat16 if exact else torch.float32)
        panels = pack_panels(matrix, outs, self._products.panel)
        if exact:
            panels = panels.unflatten(-1, (2, -1)).transpose(-1, -2)
        return PackedMatrix(self._place(panels), tuple(outs), self._products)

    def _place(self, tensor: Tensor) -> Tensor:
        """A dense copy, aligned to lines of the cache."""
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


def pack_panels(matrix: Tensor, outs: Sequence[int], panel: int) -> Tensor:
    """[out, in] as panels [P, in, panel] of neighbouring rows, those of each module filled up."""
    if any(out % panel for out in outs):
        parts = matrix.split(list(outs))
        matrix = torch.cat([functional.pad(part, (0, 0, 0, -len(part) % panel)) for part in parts])
    return matrix.unflatten(0, (-1, panel)).transpose(1, 2).contiguous()


def holds_bfloat16(matrix: Tensor) -> bool:
    """Whether bfloat16 holds the numbers without loss."""
    if matrix.dtype == torch.bfloat16:
        return True
    return torch.equal(matrix.to(torch.bfloat16).to(matrix.dtype), matrix)
