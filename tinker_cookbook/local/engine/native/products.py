"""Products with a packed matrix and an adapter, forward and backward, in one call each.

The compiled counterpart of the products of `matrices.DenseMatrix`; see `products.c`, which computes
parts (results) as sums over terms. With a matrix of pairs, all operands of the products are rounded
to bfloat16 while they are read; sums and results are float32. Not thread-safe.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from tinker_cookbook.local.engine.native.operands import LoraPair, PackedOperand

__all__ = ["Products"]

_MAX_PARTS = 4
_PANELS, _PANELS_TURNED, _ROWS, _COLUMNS = range(4)
_BYTES = 4
"""Size of a float32."""
_Pointer = ctypes.c_void_p
_Long = ctypes.c_int64


class _Right(ctypes.Structure):
    _fields_ = (
        ("at", _Pointer),
        ("layout", _Long),
        ("half", _Long),
        ("stride", _Long),
        ("bits", _Long),
    )


class _Term(ctypes.Structure):
    _fields_ = (
        ("x", _Pointer),
        ("stride", _Long),
        ("count", _Long),
        ("right", _Right * _MAX_PARTS),
    )


class _Part(ctypes.Structure):
    _fields_ = (
        ("y", _Pointer),
        ("stride", _Long),
        ("outs", _Long),
        ("bias", _Pointer),
        ("start", _Pointer),
        ("start_stride", _Long),
        ("scale", ctypes.c_float),
    )


class _Product(ctypes.Structure):
    _fields_ = (
        ("rows", _Long),
        ("threads", _Long),
        ("num_terms", _Long),
        ("num_parts", _Long),
        ("num_given", _Long),
        ("scratch", _Pointer),
        ("terms", _Term * 4),
        ("parts", _Part * _MAX_PARTS),
    )


_STRUCTS = (_Right, _Term, _Part, _Product)


class Products:
    """Calls `products.c`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for function in (library.product_struct_size, library.panel_width):
            function.restype = _Long
        for function in (library.product_scratch, library.product_pairs_scratch):
            function.restype = _Long
        for number, struct in enumerate(_STRUCTS):
            size = library.product_struct_size(_Long(number))
            assert size == ctypes.sizeof(struct), f"{struct.__name__} differs from the C struct"
        self.panel = int(library.panel_width())
        """Number of outputs in a panel, on this machine."""
        self._scratch = torch.empty(0)

    def forward(
        self,
        matrix: PackedOperand,
        x: Tensor,
        lora: LoraPair | None = None,
        *,
        bias: Tensor | None = None,
        add_to: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return `x W' + low B' (+ bias) (+ add_to)`, [T, out], and `low = scale x A'`.

        Args:
            out: takes the result, if given.

        Returns:
            The product, and `low` [T, rank * modules].
        """
        rows = x.shape[0]
        y = x.new_empty(rows, matrix.out_features) if out is None else out
        low = x.new_empty(rows, 0 if lora is None else lora.a.shape[0])
        call = self._call(rows, 1, len(matrix.outs))
        call.terms[0] = _term(x, 0, matrix.in_features)
        parts, rights = call.parts, call.terms[0].right
        top = 0
        for index, (address, count) in enumerate(
            zip(matrix.module_addresses(), matrix.outs, strict=True)
        ):
            parts[index] = _part(y, top, count, bias=bias, start=add_to)
            rights[index] = _packed(matrix, address, _PANELS)
            top += count
        if lora is not None:
            self._add_lora(call, lora, low)
        self._run(call, matrix)
        return y, low

    def backward(
        self, matrix: PackedOperand, grad: Tensor, lora: LoraPair | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of `x` [T, in] and of `x A'` [T, rank * modules].

        `grad` [T, out] is the gradient of `forward`'s product.
        """
        rows = grad.shape[0]
        x_grad = grad.new_empty(rows, matrix.in_features)
        low_grad = grad.new_empty(rows, 0 if lora is None else lora.a.shape[0])
        call = self._call(rows, len(matrix.outs), 1)
        call.parts[0] = _part(x_grad, 0, matrix.in_features)
        terms, top = call.terms, 0
        for index, (address, count) in enumerate(
            zip(matrix.module_addresses(), matrix.outs, strict=True)
        ):
            terms[index] = _term(grad, top, count)
            terms[index].right[0] = _packed(matrix, address, _PANELS_TURNED)
            top += count
        if lora is not None:
            self._add_lora_gradient(call, lora, low_grad)
        self._run(call, matrix)
        return x_grad, low_grad

    def _add_lora(self, call: _Product, lora: LoraPair, low: Tensor) -> None:
        """Add `low` as one more part, and a term per module that reads its columns of `low`."""
        num_modules, rank = len(lora.b), lora.b[0].shape[1]
        call.parts[num_modules] = _part(low, 0, num_modules * rank, scale=lora.scale)
        call.terms[0].right[num_modules] = _plain(lora.a, _COLUMNS)
        terms = call.terms
        for index, b in enumerate(lora.b):
            terms[1 + index] = _term(low, index * rank, rank)
            terms[1 + index].right[index] = _plain(b, _COLUMNS)
        call.num_parts, call.num_terms = num_modules + 1, num_modules + 1

    def _add_lora_gradient(self, call: _Product, lora: LoraPair, low_grad: Tensor) -> None:
        """Add a part for each module's columns of `low_grad`, and one term that reads them all."""
        num_modules, rank = len(lora.b), lora.b[0].shape[1]
        parts, terms = call.parts, call.terms
        for index, b in enumerate(lora.b):
            parts[1 + index] = _part(low_grad, index * rank, rank, scale=lora.scale)
            terms[index].right[1 + index] = _plain(b, _ROWS)
        terms[num_modules] = _term(low_grad, 0, num_modules * rank)
        terms[num_modules].right[0] = _plain(lora.a, _ROWS)
        call.num_parts, call.num_terms = num_modules + 1, num_modules + 1

    def _call(self, rows: int, num_terms: int, num_parts: int) -> _Product:
        return _Product(rows, torch.get_num_threads(), num_terms, num_parts, num_terms)

    def _run(self, call: _Product, matrix: PackedOperand) -> None:
        library = self._library
        product, scratch = library.product, library.product_scratch
        if matrix.paired:
            product, scratch = library.product_pairs, library.product_pairs_scratch
        if call.rows:
            floats = scratch(ctypes.byref(call))
            if len(self._scratch) < floats:
                self._scratch = torch.empty(floats)
            call.scratch = self._scratch.data_ptr()
            product(ctypes.byref(call))


def _term(x: Tensor, first: int, count: int) -> _Term:
    """Return a term that reads `count` columns of x from number `first` on."""
    assert x.stride(1) == 1, "rows must be dense"
    assert x.dtype == torch.float32, "the kernels read float32"
    return _Term(x.data_ptr() + _BYTES * first, x.stride(0), count)


def _part(
    y: Tensor,
    first: int,
    outs: int,
    *,
    bias: Tensor | None = None,
    start: Tensor | None = None,
    scale: float = 1.0,
) -> _Part:
    """Return a part that writes `outs` columns of y from number `first` on.

    It adds the same columns of `bias` and `start`.
    """
    skipped = _BYTES * first
    return _Part(
        y.data_ptr() + skipped,
        y.stride(0),
        outs,
        None if bias is None else bias.data_ptr() + skipped,
        None if start is None else start.data_ptr() + skipped,
        0 if start is None else start.stride(0),
        scale,
    )


def _packed(matrix: PackedOperand, address: int, layout: int) -> _Right:
    return _Right(address, layout, matrix.half, matrix.in_features, matrix.bits)


def _plain(matrix: Tensor, layout: int) -> _Right:
    return _Right(matrix.data_ptr(), layout, 0, matrix.stride(0))
