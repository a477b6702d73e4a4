"""Products with a packed matrix and an adapter, forward and backward, in one call each.

The compiled counterpart of the products of `matrices.DenseMatrix`; see `products.c`, which computes
parts (results) as sums over terms. With a matrix of pairs, all operands of the products are rounded
to bfloat16 while they are read; sums and results are float32. Not thread-safe.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from tinker_cookbook.local.engine.native.operands import LoraPair, PackedOperand

__all__ = ["Products"]

_MAX_PARTS = 4
_PANELS, _PANELS_TURNED, _ROWS, _COLUMNS = range(4)
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
        y = x.new_empty(len(x), matrix.out_features) if out is None else out
        low = x.new_empty(len(x), 0 if lora is None else len(lora.a))
        call, terms, parts = self._call(len(x), 1, len(matrix.outs))
        _set_term(terms[0], x)
        top = 0
        for index, (part, address, count) in enumerate(
            zip(parts, matrix.module_addresses(), matrix.outs, strict=False)
        ):
            columns = slice(top, top + count)
            _set_part(part, y[:, columns], bias=None if bias is None else bias[columns])
            if add_to is not None:
                part.start, part.start_stride = add_to[:, columns].data_ptr(), add_to.stride(0)
            _set_packed(terms[0].right[index], matrix, address, _PANELS)
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
        x_grad = grad.new_empty(len(grad), matrix.in_features)
        low_grad = grad.new_empty(len(grad), 0 if lora is None else len(lora.a))
        call, terms, parts = self._call(len(grad), len(matrix.outs), 1)
        _set_part(parts[0], x_grad)
        top = 0
        for term, address, count in zip(
            terms, matrix.module_addresses(), matrix.outs, strict=False
        ):
            _set_term(term, grad[:, top : top + count])
            _set_packed(term.right[0], matrix, address, _PANELS_TURNED)
            top += count
        if lora is not None:
            self._add_lora_gradient(call, lora, low_grad)
        self._run(call, matrix)
        return x_grad, low_grad

    def _add_lora(self, call: _Product, lora: LoraPair, low: Tensor) -> None:
        """Add `low` as one more part, and a term per module that reads its columns of `low`."""
        num_modules, rank = len(lora.b), lora.b[0].shape[1]
        _set_part(call.parts[num_modules], low, scale=lora.scale)
        _set_right(call.terms[0].right[num_modules], lora.a, _COLUMNS)
        for index, b in enumerate(lora.b):
            term = call.terms[1 + index]
            _set_term(term, low[:, index * rank : (index + 1) * rank])
            _set_right(term.right[index], b, _COLUMNS)
        call.num_parts, call.num_terms = num_modules + 1, num_modules + 1

    def _add_lora_gradient(self, call: _Product, lora: LoraPair, low_grad: Tensor) -> None:
        """Add a part for each module's columns of `low_grad`, and one term that reads them all."""
        num_modules, rank = len(lora.b), lora.b[0].shape[1]
        for index, b in enumerate(lora.b):
            columns = low_grad[:, index * rank : (index + 1) * rank]
            _set_part(call.parts[1 + index], columns, scale=lora.scale)
            _set_right(call.terms[index].right[1 + index], b, _ROWS)
        term = call.terms[num_modules]
        _set_term(term, low_grad)
        _set_right(term.right[0], lora.a, _ROWS)
        call.num_parts, call.num_terms = num_modules + 1, num_modules + 1

    def _call(
        self, rows: int, num_terms: int, num_parts: int
    ) -> tuple[_Product, Sequence[_Term], Sequence[_Part]]:
        call = _Product(rows, torch.get_num_threads(), num_terms, num_parts, num_terms)
        return call, call.terms, call.parts

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


def _set_term(term: _Term, x: Tensor) -> None:
    assert x.stride(1) == 1, "rows must be dense"
    assert x.dtype == torch.float32, "the kernels read float32"
    term.x, term.stride, term.count = x.data_ptr(), x.stride(0), x.shape[1]


def _set_part(part: _Part, y: Tensor, *, bias: Tensor | None = None, scale: float = 1.0) -> None:
    part.y, part.stride, part.outs, part.scale = y.data_ptr(), y.stride(0), y.shape[1], scale
    if bias is not None:
        part.bias = bias.data_ptr()


def _set_packed(right: _Right, matrix: PackedOperand, address: int, layout: int) -> None:
    right.at, right.layout, right.half = address, layout, matrix.half
    right.stride, right.bits = matrix.in_features, matrix.bits


def _set_right(right: _Right, matrix: Tensor, layout: int) -> None:
    right.at, right.layout, right.stride = matrix.data_ptr(), layout, matrix.stride(0)
