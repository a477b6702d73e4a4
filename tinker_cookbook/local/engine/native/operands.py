"""The operands of the compiled products: a packed matrix and an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["LoraPair", "PackedOperand"]


@dataclass(frozen=True)
class LoraPair:
    """An adapter's A and B for a stacked matrix: `y += low B'` per module, `low = scale x A'`."""

    a: torch.Tensor
    """[rank * modules, in], in the format of the matrix."""
    b: tuple[torch.Tensor, ...]
    """float32 [out, rank] for each module."""
    scale: float


class PackedOperand(Protocol):
    """A matrix [out, in] of stacked modules, in panels; see `model/packed_matrix`."""

    @property
    def outs(self) -> tuple[int, ...]:
        """Number of outputs of each module."""
        ...

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def half(self) -> bool:
        """Whether the numbers are bfloat16; otherwise they are float32."""
        ...

    @property
    def bits(self) -> int:
        """8 or 4 if the matrix is quantised, 12 if it is compact, otherwise 0."""
        ...

    @property
    def paired(self) -> bool:
        """Whether rows are rounded to bfloat16 and multiplied in pairs."""
        ...

    def module_addresses(self) -> list[int]:
        """Return the address of each module's first panel."""
        ...
