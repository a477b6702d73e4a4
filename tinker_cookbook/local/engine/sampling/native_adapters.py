"""Adapters in the form that the compiled kernels read: the matrices A and B of each projection.

For arithmetic in bfloat16 they are rounded and packed in pairs. Where the kernels expand panels
fast, A has 12 bits per number instead of 16 (`native/compact.h`), which loses nothing; a matrix
with too many different exponents, or a small one, stays in 16 bits. So does B: its panels are
short, and it is fetched while other products run, so expanding it took longer than it saved.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tinker_cookbook.local.engine.model.architecture import ArchConfig
from tinker_cookbook.local.engine.model.lora import HEAD_PATH, Adapter, layer_group
from tinker_cookbook.local.engine.model.packed_matrix import LargePageBlocks, pack_panels
from tinker_cookbook.local.engine.model.weights import FUSED
from tinker_cookbook.local.engine.native.compact import (
    COMPACT_BITS,
    Source,
    expands_adapters,
    pack_sources,
)
from tinker_cookbook.local.engine.native.products import Products
from tinker_cookbook.local.engine.sampling.adapters import StackedLora
from tinker_cookbook.local.engine.sampling.native_structs import Lora, Pointer

__all__ = [
    "AdapterPacker",
    "PackedLora",
    "PairPacker",
    "adapter_packer",
    "lora_table",
]

_BLOCK_BYTES = 4 * 2**20
"""Bytes of the blocks that hold an adapter; the last one is not full."""


@dataclass(frozen=True)
class PackedLora:
    """A matrix as the kernels read it."""

    panels: Tensor
    bits: int


class AdapterPacker(Protocol):
    """Packs the matrices of an adapter for the kernels."""

    def pack(self, matrices: list[Tensor], compact: list[bool]) -> list[PackedLora]:
        """Return packed matrices.

        Args:
            compact: which of them may be packed in 12 bits.
        """
        ...


class _FloatPacker:
    """Packs for arithmetic in float32."""

    def __init__(self, panel: int) -> None:
        self._panel = panel

    def pack(self, matrices: list[Tensor], compact: list[bool]) -> list[PackedLora]:
        blocks = LargePageBlocks(_BLOCK_BYTES)
        return [
            PackedLora(blocks.place(pack_panels(matrix, [len(matrix)], self._panel)), 0)
            for matrix in matrices
        ]


class PairPacker:
    """Packs for arithmetic in bfloat16."""

    def __init__(self, library: ctypes.CDLL, *, compact: bool) -> None:
        """
        Args:
            compact: whether the kernels read matrices in 12 bits.
        """
        self._library = library
        self._compact = compact

    def pack(self, matrices: list[Tensor], compact: list[bool]) -> list[PackedLora]:
        assert all(m.dtype == torch.float32 and m.is_contiguous() for m in matrices)
        sources = (Source * len(matrices))()
        for source, matrix, wanted in zip(sources, matrices, compact, strict=True):
            source.matrix, (source.rows, source.inputs) = matrix.data_ptr(), matrix.shape
            source.bits = COMPACT_BITS if self._compact and wanted else 0
        pack_sources(self._library, sources, only_plan=True)
        blocks, packed = LargePageBlocks(_BLOCK_BYTES), list[PackedLora]()
        for source in sources:
            packed.append(PackedLora(blocks.reserve(source.num_bytes), source.bits))
            source.to = packed[-1].panels.data_ptr()
        pack_sources(self._library, sources, only_plan=False)
        return packed


def adapter_packer(library: ctypes.CDLL, *, paired: bool) -> AdapterPacker:
    """Return the packer for the arithmetic of a base model.

    Args:
        paired: whether products are in bfloat16.
    """
    if not paired:
        return _FloatPacker(Products(library).panel)
    return PairPacker(library, compact=expands_adapters(library))


@dataclass(frozen=True)
class _LoraTable:
    """An adapter as the kernels read it."""

    entries: ctypes.Array[Lora]
    kept_alive: list[PackedLora]


def lora_table(stacked: StackedLora, arch: ArchConfig, packer: AdapterPacker) -> ctypes.Array[Lora]:
    """Return the packed matrices of an adapter per block and projection, then those of the head."""
    table = stacked.native_table
    if not isinstance(table, _LoraTable):
        table = stacked.native_table = _new_table(stacked.adapter, arch, packer)
    return table.entries


def _new_table(adapter: Adapter, arch: ArchConfig, packer: AdapterPacker) -> _LoraTable:
    groups = [layer_group(index, name) for index in range(arch.num_layers) for name in FUSED]
    matrices = [_matrices(adapter, group) for group in [*groups, HEAD_PATH]]
    is_a = [number == 0 for group in matrices for number in range(len(group))]
    packed = packer.pack([matrix for group in matrices for matrix in group], is_a)
    parts = iter(packed)
    structs = [_lora_struct([next(parts) for _ in group]) for group in matrices]
    return _LoraTable((Lora * len(structs))(*structs), packed)


def _matrices(adapter: Adapter, group: str) -> list[Tensor]:
    """Return the stacked A of a group, then the B of each module; empty where it is not trained."""
    targets = adapter.group(group)
    if not targets:
        return []
    return [adapter.stacked_a(group), *(adapter.b(target.path) for target in targets)]


def _lora_struct(packed: list[PackedLora]) -> Lora:
    if not packed:
        return Lora()
    a, *b = packed
    return Lora(
        a=a.panels.data_ptr(),
        b=(Pointer * 3)(*(part.panels.data_ptr() for part in b)),
        a_bits=a.bits,
    )
