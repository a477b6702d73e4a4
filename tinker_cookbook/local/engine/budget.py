"""How much memory a run, a sampler and the KV cache get. No torch.

The engine's host reserves memory by these rules, and `serve --plan` adds up the same numbers.
Adapters are float32; `adapter_bytes` is the size of one adapter's parameters.
"""

from __future__ import annotations

__all__ = [
    "KEPT_FORWARD_BYTES",
    "RECENT_SAMPLERS_PER_RUN",
    "SMALLEST_ROW",
    "cache_budget",
    "has_short_moments",
    "run_bytes",
    "sampler_bytes",
]

RECENT_SAMPLERS_PER_RUN = 2
"""Samplers with different weights of one run that stay in memory while they are idle."""
SMALLEST_ROW = 128
"""Tokens of the KV cache's smallest rows; the others are larger by powers of 2."""

KEPT_FORWARD_BYTES = 2 * 2**30
"""Maximum memory of the forward passes that a run keeps between two requests."""

_MAX_CACHE_BYTES = 4 * 2**30
_MIN_CACHE_BYTES = 64 * 2**20


def has_short_moments(dtype: str) -> bool:
    """Return whether a run holds Adam's moments in 24 bits instead of float32.

    Args:
        dtype: number format of products.
    """
    return dtype.removeprefix("torch.") == "bfloat16"


def run_bytes(adapter_bytes: int, *, short_moments: bool, with_gradient: bool) -> int:
    """Return the memory of a training run: its parameters, two Adam moments and the gradient.

    The gradient exists from the first backward pass to the optimizer step; runs that take turns
    reuse one tensor for it.
    """
    moment = adapter_bytes * 3 // 4 if short_moments else adapter_bytes
    return adapter_bytes + 2 * moment + (adapter_bytes if with_gradient else 0)


def sampler_bytes(adapter_bytes: int) -> int:
    """Return the memory of a sampler: its frozen adapter, and the form in which kernels read it."""
    return 2 * adapter_bytes


def cache_budget(free_bytes: int | None) -> int:
    """Return the memory limit of a model's KV cache, given what is free once weights are loaded.

    None stands for an unknown amount of free memory.
    """
    if free_bytes is None:
        return _MAX_CACHE_BYTES // 2
    return max(min(free_bytes // 4, _MAX_CACHE_BYTES), _MIN_CACHE_BYTES)
