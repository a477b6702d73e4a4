"""Products of bfloat16 matrices, and the processors that have instructions for them.

Without such instructions torch needs 10 to 20 times as long as for float32. There, products are
computed in float32 and rounded once. The result is that of bfloat16 hardware, up to the order of a
sum.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["add_product", "fastest_dtype", "lacks_products", "product", "product_dtype"]


def fastest_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """Return bfloat16 where the hardware multiplies it fast, otherwise float32."""
    device = torch.device(device)
    if device.type == "cpu":
        fast = _cpu_multiplies_bfloat16()
    elif device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


@functools.lru_cache(maxsize=1)
def _cpu_multiplies_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 faster than float32.

    ARM processors with the feature `bf16` do not count: the instructions that keep the order of
    sums (`native/pairs.h`) multiply as many numbers at a time as those for float32, and bfloat16
    weights take 16 bits each in both formats.
    """
    return torch.backends.mkldnn.is_available() and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def lacks_products(tensor: Tensor) -> bool:
    """Return whether the processor has no instructions for products of this bfloat16 tensor."""
    on_cpu = tensor.device.type == "cpu"
    return on_cpu and tensor.dtype == torch.bfloat16 and not _cpu_multiplies_bfloat16()


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the format in which a CPU multiplies tensors of `dtype`."""
    return torch.float32 if lacks_products(torch.empty(0, dtype=dtype)) else dtype


def product(x: Tensor, w: Tensor, *, add: Tensor | None = None) -> Tensor:
    """Return `x w`, plus `add`, summed in float32.

    The result has the dtype of `add`; without it, that of `x` and `w`.
    """
    if lacks_products(x):
        result = x.float() @ w.float()
        if add is None:
            return result.to(x.dtype)
        return result.add_(add).to(add.dtype)
    if add is None:
        return x @ w
    return torch.addmm(add, x, w) if add.dtype == x.dtype else add + x @ w


def add_product(into: Tensor, x: Tensor, w: Tensor) -> None:
    """Compute `into += x w`, summed in float32."""
    if lacks_products(x):
        into.copy_(product(x, w, add=into))
    elif into.dtype == x.dtype:
        into.addmm_(x, w)
    else:
        into.add_(x @ w)
