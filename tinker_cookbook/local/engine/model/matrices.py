"""Frozen matrices with one adapter, as torch computes with them.

A matrix is stored with spare columns on its right, which hold the active adapter's B:

    storage [out, in + room]  =  [ W | B ]          z [T, in + room]  =  [ x | low ]

So `x W' + low B'` with `low = scale x A'` is the single product `z storage'`, accumulated in
float32 and rounded once. Adding two products in bfloat16 would round away most of a small update.
Only the training thread writes the spare columns; everything else reads the view `weight`.

`packed_matrix.PackedMatrix` is the counterpart for the compiled kernels, with the same results.
"""

from __future__ import annotations

from typing import Protocol

import torch

from tinker_cookbook.local.engine.model.precision import add_product, lacks_products, product
from tinker_cookbook.local.engine.native.operands import LoraPair

__all__ = ["DenseMatrix", "Matrix", "spare_columns"]


class Matrix(Protocol):
    """The stacked W [out, in] of one or more modules that read the same input.

    Legend: T tokens; `low` [T, rank * modules] are the low-rank values, [T, 0] without an adapter.
    """

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def num_bytes(self) -> int:
        """Memory of the matrix in bytes."""
        ...

    @property
    def bytes_per_number(self) -> float:
        """Size of one stored number in bytes."""
        ...

    def hold(self, lora: LoraPair | None) -> None:
        """Take over an adapter whose matrices changed; to be called before `forward`."""
        ...

    def new_input(self, rows: int, lora: LoraPair | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return an input buffer for `forward` and its view [T, in], which the caller fills."""
        ...

    def forward(
        self,
        z: torch.Tensor,
        lora: LoraPair | None = None,
        *,
        bias: torch.Tensor | None = None,
        add_to: torch.Tensor | None = None,
        low: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the product [T, out], plus `bias` [out] or float32 `add_to` [T, out]; and `low`.

        With `add_to` the sum is float32, otherwise it has the dtype of the matrix. A given `low` is
        used instead of the adapter's A.
        """
        ...

    def backward(
        self, grad: torch.Tensor, lora: LoraPair | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of x [T, in] and of `x A'` [T, rank * modules].

        `grad` [T, out] is the gradient of the product.
        """
        ...

    def multiply_into(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """Write the product without the adapter into `out`, float32 [T, out]."""
        ...

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Return rows of the matrix, [n, in]."""
        ...


class DenseMatrix:
    """A matrix in a tensor, with spare columns for the active adapter where one can be trained."""

    def __init__(self, storage: torch.Tensor, in_features: int | None = None) -> None:
        """`storage` is [out, in + room]; without `in_features` it has no spare columns."""
        self.storage = storage
        self.in_features = storage.shape[1] if in_features is None else in_features
        self._held_rank = 0

    @property
    def weight(self) -> torch.Tensor:
        """A view [out, in] without the spare columns."""
        return self.storage[:, : self.in_features]

    @property
    def out_features(self) -> int:
        return self.storage.shape[0]

    @property
    def num_bytes(self) -> int:
        return self.storage.nbytes

    @property
    def bytes_per_number(self) -> float:
        return self.storage.element_size()

    def widen(self, room: int) -> None:
        """Make sure that there are at least `room` spare columns; copy the matrix if not."""
        if self.storage.shape[1] < self.in_features + room:
            wider = self.storage.new_zeros(self.out_features, self.in_features + room)
            wider[:, : self.in_features] = self.weight
            self.storage, self._held_rank = wider, 0

    def hold(self, lora: LoraPair | None) -> None:
        """Write the B matrices into the spare columns.

        They form a block diagonal, since each module's rows read their own rank columns of `low`.
        """
        if lora is None:
            return
        rank, top = lora.b[0].shape[1], 0
        self.widen(spare_columns(rank, len(lora.b)))
        columns = self.storage[:, self.in_features :]
        # Another rank left its blocks in other places; with the same rank, the zeros stay zero.
        if rank != self._held_rank:
            columns.zero_()
        for position, b in enumerate(lora.b):
            rows = slice(top, top + len(b))
            columns[rows, position * rank : (position + 1) * rank].copy_(b)
            top += len(b)
        self._held_rank = rank

    def new_input(self, rows: int, lora: LoraPair | None) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.storage.new_empty(rows, self.in_features + _width(lora))
        # Tiled products read past the last column of `x` and multiply what they find by zeros. It
        # must hold numbers, since NaN times 0 is NaN.
        z[:, self.in_features :] = 0
        return z, z[:, : self.in_features]

    def forward(
        self,
        z: torch.Tensor,
        lora: LoraPair | None = None,
        *,
        bias: torch.Tensor | None = None,
        add_to: torch.Tensor | None = None,
        low: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if low is not None:
            low = low.to(z.dtype)
        elif lora is not None:
            low = product(z[:, : self.in_features], lora.a.t()).mul_(lora.scale)
        else:
            low = z[:, self.in_features :]
        z[:, self.in_features :] = low
        matrix = self.storage[:, : z.shape[1]].t()
        return product(z, matrix, add=bias if add_to is None else add_to), low

    def backward(
        self, grad: torch.Tensor, lora: LoraPair | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        z_grad = product(grad, self.storage[:, : self.in_features + _width(lora)])
        x_grad, low_grad = z_grad[:, : self.in_features], z_grad[:, self.in_features :]
        if lora is not None:
            low_grad = low_grad.mul_(lora.scale)
            add_product(x_grad, low_grad, lora.a)
        return x_grad, low_grad

    def multiply_into(self, out: torch.Tensor, x: torch.Tensor) -> None:
        if x.dtype == out.dtype:
            torch.mm(x, self.weight.t(), out=out)
        elif lacks_products(x):
            torch.mm(x.float(), self.weight.t().float(), out=out)
        else:
            out.copy_(x @ self.weight.t())

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(indices, self.storage)


def spare_columns(rank: int, num_modules: int) -> int:
    """Return the columns that an adapter needs; a multiple of 32 aligns rows to cache lines."""
    return (rank * num_modules + 31) // 32 * 32


def _width(lora: LoraPair | None) -> int:
    return 0 if lora is None else lora.a.shape[0]
