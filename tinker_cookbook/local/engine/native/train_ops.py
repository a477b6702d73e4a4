"""The elementwise parts of training, each in one pass; `model/ops` uses them where they apply.

They take float32 tensors on the CPU whose last axis is contiguous. For other tensors, and without a
compiler, `ops` computes the same with torch.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from tinker_cookbook.local.engine.native.build import load_kernels

__all__ = ["HeadLayout", "HeadNorms", "TrainKernels", "train_kernels"]

_Pointer = ctypes.c_void_p
_Long = ctypes.c_int64


class _Heads(ctypes.Structure):
    _fields_ = (
        ("rows", _Long),
        ("kv_heads", _Long),
        ("group", _Long),
        ("dim", _Long),
        ("threads", _Long),
        ("positions", _Pointer),
        ("cos", _Pointer),
        ("sin", _Pointer),
        ("q_norm", _Pointer),
        ("k_norm", _Pointer),
        ("eps", ctypes.c_float),
        ("rounded", _Long),
    )


@dataclass(frozen=True)
class HeadLayout:
    """The heads and positions of a pack of T tokens."""

    kv_heads: int
    group: int
    """Number of query heads per key head."""
    dim: int
    positions: Tensor
    """int64 [T]."""
    cos: Tensor
    """float32 [P, dim] by position, from `RopeTable`; `sin` likewise."""
    sin: Tensor
    rounded: bool = False
    """Whether keys and values are rounded to bfloat16 numbers; their tensors stay float32."""

    def struct(self, norms: HeadNorms | None = None) -> _Heads:
        """Return the record that the kernels read."""
        heads = _Heads(
            len(self.positions),
            self.kv_heads,
            self.group,
            self.dim,
            torch.get_num_threads(),
            self.positions.data_ptr(),
            self.cos.data_ptr(),
            self.sin.data_ptr(),
            rounded=self.rounded,
        )
        if norms is not None:
            heads.q_norm, heads.k_norm = norms.q_norm.data_ptr(), norms.k_norm.data_ptr()
            heads.eps = norms.eps
        return heads


@dataclass(frozen=True)
class HeadNorms:
    """The norms of queries and keys, before their rotation."""

    q_norm: Tensor
    """float32 [dim]; `k_norm` likewise."""
    k_norm: Tensor
    eps: float


@functools.lru_cache(maxsize=1)
def train_kernels() -> TrainKernels | None:
    """Return the kernels, waiting for the compiler if it still runs; None: use torch."""
    library = load_kernels()
    return None if library is None else TrainKernels(library)


class TrainKernels:
    """Calls `train_kernels.c`; the caller must have checked with `fits`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    @staticmethod
    def fits(*tensors: Tensor) -> bool:
        """Return whether all are float32 matrices on the CPU with contiguous rows."""
        return all(
            t.dtype == torch.float32
            and t.dim() == 2
            and t.stride(1) == 1
            and t.device.type == "cpu"
            for t in tensors
        )

    def swiglu(self, out: Tensor, gate_up: Tensor) -> None:
        """Compute `ops.swiglu_into`."""
        rows, inner = out.shape
        self._library.swiglu_forward(
            *_row(out), _at(gate_up), _Long(rows), _Long(inner), _threads()
        )

    def swiglu_gradient(self, grad: Tensor, gate_up: Tensor, activation: Tensor) -> Tensor:
        """Compute `ops.swiglu_backward`."""
        result = torch.empty_like(gate_up)
        rows, inner = grad.shape
        self._library.swiglu_gradient(
            _at(result),
            _at(activation),
            *_row(grad),
            _at(gate_up),
            _Long(rows),
            _Long(inner),
            _threads(),
        )
        return result

    def inverse_rms(self, x: Tensor, eps: float) -> Tensor:
        """Compute `ops.inverse_rms` of [T, H] with the bits of the decoder."""
        rows, size = x.shape
        inverse = x.new_empty(rows, 1)
        self._library.inverse_rms(
            _at(inverse), _at(x), _Long(rows), _Long(size), ctypes.c_float(eps), _threads()
        )
        return inverse

    def norm(self, out: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> None:
        """Compute `ops.rms_norm_into`."""
        rows, size = x.shape
        self._library.norm_forward(
            *_row(out), _at(x), _at(inverse), _at(weight), _Long(rows), _Long(size), _threads()
        )

    def norm_gradient(
        self, grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, add: Tensor | None
    ) -> Tensor:
        """Compute `ops.rms_norm_backward`."""
        rows, size = x.shape
        result = torch.empty_like(x)
        self._library.norm_gradient(
            _at(result),
            *_row(grad),
            _at(x),
            _at(inverse),
            _at(weight),
            _Pointer(None) if add is None else _at(add),
            _Long(rows),
            _Long(size),
            _threads(),
        )
        return result

    def split_heads(
        self, layout: HeadLayout, qkv: Tensor, norms: HeadNorms | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated and scaled queries [K, T G, D], rotated keys and values [K, T, D].

        Args:
            norms: the norms of queries and keys, applied first.
        """
        rows = len(qkv)
        q = qkv.new_empty(layout.kv_heads, rows * layout.group, layout.dim)
        k = qkv.new_empty(layout.kv_heads, rows, layout.dim)
        v = torch.empty_like(k)
        struct = layout.struct(norms)
        self._library.split_heads(ctypes.byref(struct), _at(qkv), _at(q), _at(k), _at(v))
        return q, k, v

    def join_heads(self, layout: HeadLayout, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the gradient [T, (K G + 2 K) D], given those of `split_heads`' results."""
        width = (layout.group + 2) * layout.kv_heads * layout.dim
        qkv = q.new_empty(len(layout.positions), width)
        struct = layout.struct()
        self._library.join_heads(ctypes.byref(struct), _at(qkv), _at(q), _at(k), _at(v))
        return qkv


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return _Pointer(tensor.data_ptr())


def _row(tensor: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    """Return the address of a matrix and the distance between its rows, in numbers."""
    return _at(tensor), _Long(tensor.stride(0))


def _threads() -> ctypes.c_int64:
    return _Long(torch.get_num_threads())
