"""Frozen matrices in the layout that the compiled kernels read; one copy trains and samples.

The rows (outputs) of W [out, in] are grouped into panels of `PANEL` neighbours. Inside a panel the
numbers are ordered input by input, so one vector load reads the same input's weight of several
neighbouring outputs, and each output is summed in one chain from the first input to the last:

    W [out, in]  ->  panels [P, in, PANEL],   panels[p, i, j] = W[p * PANEL + j, i]

Every stacked module starts a new panel; its last panel is filled up with rows of zeros. For
arithmetic in float32, numbers are stored as bfloat16 where that loses nothing, which is true of
most published weights: half the memory and memory traffic of float32, with the same results.

For arithmetic in bfloat16, numbers are rounded to it and two neighbouring inputs of an output form
one 32-bit word, as the processor's instructions multiply them:

    panels[p, i, j] = (W[p * PANEL + j, 2 i], W[p * PANEL + j, 2 i + 1])     [P, in / 2, PANEL, 2]
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from tinker_cookbook.local.engine.memory import LARGE_PAGE, prefer_large_pages
from tinker_cookbook.local.engine.native.operands import LoraPair

if TYPE_CHECKING:
    from tinker_cookbook.local.engine.native.products import Products

__all__ = [
    "WIDEST_PANEL",
    "BytePanels",
    "LargePageBlocks",
    "MatrixBlocks",
    "MatrixPacker",
    "PackedMatrix",
    "ShapePacker",
    "holds_bfloat16",
    "pack_pairs",
    "pack_panels",
]

_BLOCK_BYTES = 64 * 2**20
WIDEST_PANEL = 32
"""Panel width on processors with AVX-512, the widest of all (`PANEL` in native/tiles.h)."""


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """Stacked modules [out, in], each filled up with rows of zeros to whole panels."""

    panels: Tensor
    """float32 [P, in, PANEL]; or bfloat16 [P, in, PANEL / 2, 2], where the two outputs in a pair
    (one 32-bit word) are half a panel apart, so that one vector load yields both halves. With
    `paired`, bfloat16 [P, in / 2, PANEL, 2], where the two in a pair are inputs of one output."""
    outs: tuple[int, ...]
    """Number of rows of each module."""
    in_features: int
    kernels: Products | None
    """Compiled products; None where the matrix has a shape but holds no numbers."""
    paired: bool = False
    """Whether products round their rows to bfloat16, too, and multiply pairs of them."""
    bits: int = 0
    """8 or 4 in `quantised.QuantisedMatrix`, 12 in `compact.CompactMatrix`."""

    @property
    def products(self) -> Products:
        assert self.kernels is not None, "a matrix without numbers has no products"
        return self.kernels

    @property
    def half(self) -> bool:
        """Whether the numbers are stored as bfloat16."""
        return self.panels.dtype == torch.bfloat16

    @property
    def out_features(self) -> int:
        return sum(self.outs)

    @property
    def panel(self) -> int:
        """Number of outputs in a panel."""
        return self.panels.shape[2] if self.paired else self.panels[0, 0].numel()

    @property
    def num_bytes(self) -> int:
        return self.panels.nbytes

    @property
    def bytes_per_number(self) -> float:
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
        low: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if low is None or lora is None:
            return self.products.forward(self, z, lora, bias=bias, add_to=add_to)
        y, _ = self.products.forward(self, z, bias=bias, add_to=add_to)
        parts = zip(y.split(list(self.outs), 1), low.chunk(len(lora.b), 1), lora.b, strict=True)
        for part, values, b in parts:
            part.addmm_(values, b.t())
        return y, low

    def backward(self, grad: Tensor, lora: LoraPair | None = None) -> tuple[Tensor, Tensor]:
        return self.products.backward(self, grad, lora)

    def multiply_into(self, out: Tensor, x: Tensor) -> None:
        self.products.forward(self, x, out=out)

    def module_addresses(self) -> list[int]:
        return self._addresses

    @functools.cached_property
    def _addresses(self) -> list[int]:
        """The address of each module's first panel."""
        step = self.panels[0].numel() * self.panels.element_size()
        firsts, panel = [], 0
        for out in self.outs:
            firsts.append(self.panels.data_ptr() + panel * step)
            panel += -(-out // self.panel)
        return firsts

    def rows(self, indices: Tensor) -> Tensor:
        """Return rows of the first module, float32 [n, in]."""
        panel, lane = indices // self.panel, indices % self.panel
        if self.paired:
            return self.panels[panel, :, lane].flatten(1)[:, : self.in_features].float()
        if not self.half:
            return self.panels[panel, :, lane]
        width = self.panel // 2
        return self.panels[panel, :, lane % width, lane // width].float()


@dataclass(frozen=True, eq=False)
class BytePanels(PackedMatrix):
    """A packed matrix whose panels the kernels expand; `panels` is uint8 [P, ...]."""

    width: int = WIDEST_PANEL
    """Number of outputs in a panel."""

    @property
    def half(self) -> bool:
        return False

    @property
    def panel(self) -> int:
        return self.width


class MatrixPacker(Protocol):
    """Packs matrices for the compiled kernels."""

    def pack(self, matrix: Tensor, outs: Sequence[int], *, head: bool = False) -> PackedMatrix:
        """Return a packed copy of [out, in].

        Args:
            outs: number of rows of each stacked module.
            head: whether the matrix is the output embedding.
        """
        ...


class LargePageBlocks:
    """Copies tensors next to each other into blocks of large memory pages.

    A copy keeps its block alive.
    """

    def __init__(self, block_bytes: int) -> None:
        """
        Args:
            block_bytes: size of a block; a larger tensor gets a block of its size.
        """
        self._block_bytes = block_bytes
        self._free = torch.empty(0, dtype=torch.uint8)

    def place(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy that starts at a cache line."""
        place = self.reserve(tensor.numel() * tensor.element_size()).view(tensor.dtype)
        return place.view(tensor.shape).copy_(tensor)

    def reserve(self, size: int) -> Tensor:
        """Return memory that starts at a cache line, uint8 [size]; its content is undefined."""
        taken = -(-size // 64) * 64
        if len(self._free) < taken:
            num_bytes = -(-max(taken, self._block_bytes) // LARGE_PAGE) * LARGE_PAGE
            block = torch.empty(num_bytes + LARGE_PAGE, dtype=torch.uint8)
            start = -block.data_ptr() % LARGE_PAGE
            self._free = block[start : start + num_bytes]
            prefer_large_pages(self._free.data_ptr(), num_bytes)
        place, self._free = self._free[:size], self._free[taken:]
        return place


class MatrixBlocks:
    """Packs matrices next to each other into blocks of large memory pages.

    A matrix keeps its block alive.
    """

    def __init__(self, products: Products, *, paired: bool = False) -> None:
        """
        Args:
            paired: pack for arithmetic in bfloat16; otherwise for float32.
        """
        self._products = products
        self._paired = paired
        self._blocks = LargePageBlocks(_BLOCK_BYTES)

    def pack(self, matrix: Tensor, outs: Sequence[int], *, head: bool = False) -> PackedMatrix:
        """Return a packed copy of [out, in]."""
        panels = _pack(matrix, outs, self._products.panel, paired=self._paired)
        return self._place(panels, outs, matrix.shape[1])

    def _place(self, panels: Tensor, outs: Sequence[int], inputs: int) -> PackedMatrix:
        place = self._blocks.place(panels)
        return PackedMatrix(place, tuple(outs), inputs, self._products, self._paired)


class ShapePacker:
    """Packs matrices on the device `meta`: the result has the packed shape but no numbers."""

    def __init__(self, panel: int = WIDEST_PANEL, *, paired: bool = False) -> None:
        self._panel, self._paired = panel, paired

    def pack(self, matrix: Tensor, outs: Sequence[int], *, head: bool = False) -> PackedMatrix:
        """Return the shape of a packed copy of [out, in]."""
        panels = _pack(matrix, outs, self._panel, paired=self._paired)
        return PackedMatrix(panels, tuple(outs), matrix.shape[1], None, self._paired)


def _pack(matrix: Tensor, outs: Sequence[int], panel: int, *, paired: bool) -> Tensor:
    """Return the panels of a matrix: pairs, or the shortest format that loses nothing."""
    if paired:
        return pack_pairs(matrix, outs, panel)
    exact = holds_bfloat16(matrix)
    panels = pack_panels(matrix.to(torch.bfloat16 if exact else torch.float32), outs, panel)
    return panels.unflatten(-1, (2, -1)).transpose(-1, -2) if exact else panels


def pack_panels(matrix: Tensor, outs: Sequence[int], panel: int) -> Tensor:
    """Return [out, in] as panels [P, in, panel], with each module filled up to whole panels."""
    if any(out % panel for out in outs):
        parts = matrix.split(list(outs))
        matrix = torch.cat([functional.pad(part, (0, 0, 0, -len(part) % panel)) for part in parts])
    return matrix.unflatten(0, (-1, panel)).transpose(1, 2).contiguous()


def pack_pairs(matrix: Tensor, outs: Sequence[int], panel: int) -> Tensor:
    """Return [out, in] rounded to bfloat16, as panels of pairs [P, in / 2, panel, 2].

    An odd number of inputs is filled up with zeros.
    """
    matrix = functional.pad(matrix.to(torch.bfloat16), (0, matrix.shape[1] % 2))
    panels = pack_panels(matrix, outs, panel)
    return panels.unflatten(1, (-1, 2)).transpose(2, 3).contiguous()


def holds_bfloat16(matrix: Tensor) -> bool:
    """Return whether bfloat16 holds the numbers without loss; unknown numbers count as not."""
    if matrix.dtype == torch.bfloat16:
        return True
    if matrix.is_meta:
        return False
    return torch.equal(matrix.to(torch.bfloat16).to(matrix.dtype), matrix)
