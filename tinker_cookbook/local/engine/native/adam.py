"""The AdamW step with moments of 24 bits, in one call; see `adam.c`."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from tinker_cookbook.local.engine.native.build import load_kernels

__all__ = ["AdamFactors", "AdamKernel", "adam_kernel"]

_Pointer = ctypes.c_void_p
_Long = ctypes.c_int64
_Float = ctypes.c_float


class _Moment(ctypes.Structure):
    _fields_ = (("upper", _Pointer), ("lower", _Pointer))


class _Call(ctypes.Structure):
    _fields_ = (
        ("size", _Long),
        ("threads", _Long),
        ("values", _Pointer),
        ("gradient", _Pointer),
        ("mean", _Moment),
        ("square", _Moment),
        ("mean_share", _Float),
        ("square_keep", _Float),
        ("square_share", _Float),
        ("root_factor", _Float),
        ("eps", _Float),
        ("decay", _Float),
        ("rate", _Float),
    )


@dataclass(frozen=True)
class AdamFactors:
    """The factors of one AdamW step, for a gradient g:

    mean += (g - mean) mean_share
    square = square square_keep + g square_share g
    values = values decay + mean rate / (sqrt(square) root_factor + eps)
    """

    mean_share: float
    square_keep: float
    square_share: float
    root_factor: float
    eps: float
    decay: float
    rate: float


@functools.lru_cache(maxsize=1)
def adam_kernel() -> AdamKernel | None:
    """Return the kernel, waiting for the compiler if it still runs; None: use torch."""
    library = load_kernels()
    return None if library is None else AdamKernel(library)


class AdamKernel:
    """Calls `adam.c`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.adam_call_size.restype = _Long
        size = library.adam_call_size()
        assert size == ctypes.sizeof(_Call), "_Call differs from the C struct"

    def step(
        self,
        values: Tensor,
        gradient: Tensor,
        mean: tuple[Tensor, Tensor],
        square: tuple[Tensor, Tensor],
        factors: AdamFactors,
    ) -> None:
        """Update `values` and both moments in place.

        Args:
            values: float32 [N] on the CPU, like `gradient`.
            mean: the upper bits, int16 [N], and the lower bits, uint8 [N]; `square` likewise.
        """
        floats = (values, gradient)
        assert all(t.dtype == torch.float32 for t in floats), "the kernel reads float32"
        for tensor in (*floats, *mean, *square):
            assert tensor.is_contiguous(), "the kernel reads dense tensors"
            assert len(tensor) == len(values), "there is one number per parameter"
        call = _Call(
            len(values),
            torch.get_num_threads(),
            values.data_ptr(),
            gradient.data_ptr(),
            _Moment(*(part.data_ptr() for part in mean)),
            _Moment(*(part.data_ptr() for part in square)),
            factors.mean_share,
            factors.square_keep,
            factors.square_share,
            factors.root_factor,
            factors.eps,
            factors.decay,
            factors.rate,
        )
        self._library.adam_step(ctypes.byref(call))
