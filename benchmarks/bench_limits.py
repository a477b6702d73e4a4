"""What a machine can do at most, and what a model needs: for the shares that `engine.py` prints."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

__all__ = [
    "bytes_per_token",
    "flops_per_token",
    "format_in_use",
    "product_flops",
    "read_bandwidth",
]

_BUFFER_BYTES = 512 * 2**20
"""Much more than a cache holds."""
_PAGE = 2 * 2**20


def format_in_use(device: str = "cpu") -> str:
    """Return the name of the format in which a service multiplies by default."""
    import torch

    from tinker_cookbook.local.engine.model.devices import choose_dtype
    from tinker_cookbook.local.engine.model.precision import product_dtype

    return str(product_dtype(choose_dtype(None, torch.device(device)))).removeprefix("torch.")


def product_flops(threads: int) -> dict[str, float]:
    """Return the rate of large matrix products by format, in operations per second."""
    import torch

    torch.set_num_threads(threads)
    rates = {}
    for dtype in dict.fromkeys(("float32", format_in_use())):
        kind = getattr(torch, dtype)
        left, right = torch.randn(2048, 576).to(kind), torch.randn(3072, 576).to(kind)
        product = torch.empty(2048, 3072, dtype=kind)
        seconds = []
        for _ in range(25):
            started = time.perf_counter()
            torch.mm(left, right.t(), out=product)
            seconds.append(time.perf_counter() - started)
        rates[dtype] = 2 * 2048 * 576 * 3072 / statistics.median(seconds[5:])
    return rates


def read_bandwidth(threads: int) -> float:
    """Return how many bytes per second a sum over a large buffer reads, in large memory pages."""
    import torch

    from tinker_cookbook.local.engine.memory import prefer_large_pages

    torch.set_num_threads(threads)
    buffer = torch.empty(_BUFFER_BYTES // 4)
    prefer_large_pages(-(-buffer.data_ptr() // _PAGE) * _PAGE, _BUFFER_BYTES - _PAGE)
    buffer.fill_(1.0)
    seconds = []
    for _ in range(9):
        started = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - started)
    return _BUFFER_BYTES / statistics.median(seconds[2:])


def flops_per_token(folder: str) -> float:
    """Count forward and backward without weight gradients; 2/3 of the head's rows run twice."""
    from tinker_cookbook.local.engine.model.architecture import read_arch
    from tinker_cookbook.local.engine.model.weights import module_shapes

    arch = read_arch(Path(folder))
    assert arch is not None, "the default model is native"
    weights = sum(rows * columns for rows, columns in module_shapes(arch).values())
    head = 2 * arch.vocab_size * arch.hidden_size
    return 4 * weights * arch.num_layers + head * (1 + 2 / 3)


def bytes_per_token(folder: str, length: int, rank: int) -> float:
    """Count what decoding one token reads: weights, an adapter, and keys and values before it."""
    import torch

    from tinker_cookbook.local.engine.types import LoraSpec
    from tinker_cookbook.local.plan_shapes import read_sizes

    dtype = getattr(torch, format_in_use())
    sizes = read_sizes(Path(folder), LoraSpec(rank=rank, train_unembed=False), dtype, compiled=True)
    assert sizes.native is not None, "the default model is native"
    adapter = sizes.adapter_parameters * dtype.itemsize
    return sizes.native.read_bytes + adapter + length * sizes.bytes_per_cached_token
