"""What the compiled products read: a packed matrix, and an adapter beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

__all__ = ["LoraPair", "PackedOperand"]


@dataclass(frozen=True)
class LoraPair:
    """An adapter's part of a stacked matrix: `y += B low`, `low = scale A x`, module by module."""

    a: torch.Tensor
    """[rank * modules, in] in the format of the matrix."""
    b: tuple[torch.Tensor, ...]
    """Per module float32 [out, rank]."""
    scale: float


class PackedOperand(Protocol):
    """A matrix [out, in] of stacked modules, in panels of neighbouring outputs."""

    @property
    def outs(self) -> tuple[int, ...]:
        """Outputs of each module."""
        ...

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def half(self) -> bool:
        """Whether the numbers are bfloat16; otherwise they are float32."""
        ...

    def module_addresses(self) -> list[int]:
        """Where each module's first panel begins."""
        ...
