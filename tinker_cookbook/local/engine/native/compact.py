"""Packing of bfloat16 matrices in 12 bits per number, on the compiled kernels; see `compact.h`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from tinker_cookbook.local.engine.native.instructions import choose_set

__all__ = [
    "COMPACT_BITS",
    "CompactKernels",
    "Source",
    "expands_adapters",
    "expands_fast",
    "pack_sources",
]

COMPACT_BITS = 12
"""`COMPACT_BITS` in `compact.h`."""

_Pointer = ctypes.c_void_p
_Long = ctypes.c_int64


class Source(ctypes.Structure):
    """`Source` in `compact.c`: a matrix of an adapter in float32, to be rounded and packed."""

    _fields_ = (
        ("matrix", _Pointer),
        ("rows", _Long),
        ("inputs", _Long),
        ("bits", _Long),
        ("num_bytes", _Long),
        ("to", _Pointer),
    )


def pack_sources(library: ctypes.CDLL, sources: ctypes.Array[Source], *, only_plan: bool) -> None:
    """Choose `bits` and `num_bytes` of matrices, or pack them as they were chosen.

    `bits` is 12 before where that is wanted, and 0 after where it does not pay.

    Raises:
        MemoryError: if there is no memory for a panel.
    """
    library.compact_sources.restype = _Long
    done = library.compact_sources(sources, _Long(len(sources)), _Long(not only_plan), _threads())
    if not done:
        raise MemoryError("no memory to pack an adapter")


def expands_adapters(library: ctypes.CDLL) -> bool:
    """Return whether kernels can read the matrices A of adapters in 12 bits."""
    return bool(library.expands_adapters())


def expands_fast() -> bool:
    """Return whether the kernels expand panels with vector instructions, so that 12 bits pay.

    `FAST_UNITS` in `compact.h` says the same; other instruction sets expand number by number.
    """
    return "avx512bw" in choose_set()[0].needs


class CompactKernels:
    """Calls `compact.c`. Axes: P panels, S steps of a sum (two inputs each)."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.compact_bytes.restype = library.compact_groups.restype = _Long

    def panel_bytes(self, inputs: int) -> int:
        """Return the bytes of a panel, without its exceptions."""
        return int(self._library.compact_bytes(_Long(inputs)))

    def list_bytes(self, inputs: int) -> int:
        """Return the bytes of a panel's list of exceptions where it has none."""
        return 4 * (int(self._library.compact_groups(_Long(inputs))) + 1)

    def count_exceptions(self, pairs: Tensor) -> Tensor:
        """Return how many numbers of each panel need more than 12 bits, int64 [P].

        Args:
            pairs: bfloat16 [P, S, PANEL, 2].
        """
        counts = torch.zeros(len(pairs), dtype=torch.int64)
        self._library.compact_count(*_sizes(pairs), _Pointer(counts.data_ptr()), _threads())
        return counts

    def pack(self, pairs: Tensor, to: Tensor, lists: Tensor) -> None:
        """Write the panels of `pairs` to the beginning of `to`, and their exceptions.

        Args:
            to: uint8.
            lists: int64 [P], the byte of `to` at which each panel's exceptions begin.
        """
        self._library.compact_pack(
            *_sizes(pairs), _Pointer(to.data_ptr()), _Pointer(lists.data_ptr()), _threads()
        )

    def rows(self, panels: Tensor, inputs: int, indices: Tensor) -> Tensor:
        """Return rows of a packed matrix, float32 [n, inputs]."""
        indices, rows = indices.contiguous(), torch.empty(len(indices), inputs)
        self._library.compact_rows(
            _Pointer(panels.data_ptr()),
            _Long(inputs),
            _Pointer(indices.data_ptr()),
            _Long(len(indices)),
            _Pointer(rows.data_ptr()),
        )
        return rows


def _sizes(pairs: Tensor) -> tuple[_Pointer, _Long, _Long]:
    assert pairs.dtype == torch.bfloat16
    assert pairs.is_contiguous(), "the kernels read dense tensors"
    return _Pointer(pairs.data_ptr()), _Long(len(pairs)), _Long(pairs.shape[1])


def _threads() -> _Long:
    return _Long(torch.get_num_threads())
