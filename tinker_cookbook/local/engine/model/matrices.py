"""Frozen matrices with an adapter beside them, as torch computes with them.

A matrix is stored with spare columns on its right:

    storage [out, in + room]  =  [ W | B of the adapter in use ]

With them `W x + B (s A x)` is one product over `[x | low]`, accumulated in float32 and rounded
once. Two products added in bfloat16 would round most of a small update away. The training thread
alone writes the spare columns; everything else reads the view `weight`.

`packed_matrix.PackedMatrix` is the counterpart on the compiled kernels, with the same results.
"""

from __future__ import annotations

from typing import Protocol

import torch

from tinker_cookbook.local.engine.model.precision import add_product, lacks_products, product
from tinker_cookbook.local.engine.native.operands import LoraPair

__all__ = ["DenseMatrix", "Matrix", "spare_columns"]


class Matrix(Protocol):
    """W [out, in] of one or more modules that read the same input, stacked.

    Legend: T tokens, `low` [T, rank * modules] the low-rank values, or [T, 0] without an adapter.
    """

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        ...

    def hold(self, lora: LoraPair | None) -> None:
        """Take over an adapter whose matrices changed; before it is given to `forward`."""
        ...

    def new_input(self, rows: int, lora: LoraPair | None) -> tuple[torch.Tensor, torch.Tensor]:
        """An input for `forward`, and the view [T, in] of it that the caller fills."""
        ...

    def forward(
        self,
        z: torch.Tensor,
        lora: LoraPair | None = None,
        *,
        bias: torch.Tensor | None = None,
        add_to: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The product [T, out], plus `bias` [out] or float32 `add_to` [T, out]; and `low`.

        With `add_to` the sum is float32, else it has the dtype of the matrix.
        """
        ...

    def backward(
        self, grad: torch.Tensor, lora: LoraPair | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients [T, in] of x and [T, rank * modules] of `A x`, from that of the product."""
        ...

    def multiply_into(self, out: torch.Tensor, x: torch.Tensor) -> None:
        """The product without adapter into `out`, float32 [T, out]."""
        ...

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """[n, in]: rows of the matrix."""
        ...


class DenseMatrix:
    """A matrix in a tensor, with spare columns where adapters are to be trained beside it."""

    def __init__(self, storage: torch.Tensor, in_features: int | None = None) -> None:
        """`storage` is [out, in + room]; without `in_features` there is no room."""
        self.storage = storage
        self.in_features = storage.shape[1] if in_features is None else in_features
        self._held_rank = 0

    @property
    def weight(self) -> torch.Tensor:
        """[out, in], a view without the spare columns."""
        return self.storage[:, : self.in_features]

    @property
    def out_features(self) -> int:
        return self.storage.shape[0]

    @property
    def num_bytes(self) -> int:
        return self.storage.numel() * self.storage.element_size()

    def widen(self, room: int) -> None:
        """Make so many spare columns; copies if there are fewer."""
        if self.storage.shape[1] < self.in_features + room:
            wider = self.storage.new_zeros(self.out_features, self.in_features + room)
            wider[:, : self.in_features] = self.weight
            self.storage, self._held_rank = wider, 0

    def hold(self, lora: LoraPair | None) -> None:
        """Write the B matrices into the spare columns, block diagonal."""
        if lora is None:
            return
        rank, top = lora.b[0].shape[1], 0
        self.widen(spare_columns(rank, len(lora.b)))
        columns = self.storage[:, self.in_features :]
        if rank != self._held_rank:  # what another rank left; blocks off the diagonal stay zero
            columns.zero_()
        for position, b in enumerate(lora.b):
            rows = slice(top, top + len(b))
            columns[rows, position * rank : (position + 1) * rank].copy_(b)
            top += len(b)
        self._held_rank = rank

    def new_input(self, rows: int, lora: LoraPair | None) -> tuple[torch.Tensor, torch.Tensor]:
        z = self.storage.new_empty(rows, self.in_features + _width(lora))
        # Products in tiles read on behind the last column of `x` and multiply that by zeros, so it
        # must be numbers: NaN times 0 is NaN.
        z[:, self.in_features :] = 0
        return z, z[:, : self.in_features]

    def forward(
        self,
        z: torch.Tensor,
        lora: LoraPair | None = None,
        *,
        bias: torch.Tensor | None = None,
        add_to: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        low = z[:, self.in_features :]
        if lora is not None:
            low = product(z[:, : self.in_features], lora.a.t()).mul_(lora.scale)
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
    """Room for an adapter; a multiple of 32 keeps rows aligned to cache lines."""
    return (rank * num_modules + 31) // 32 * 32


def _width(lora: LoraPair | None) -> int:
    return 0 if lora is None else lora.a.shape[0]
