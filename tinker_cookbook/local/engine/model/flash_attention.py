"""Causal attention inside each segment of a pack on torch's flash kernels, forward and backward.

All segments are one call of `varlen_attn` where torch has it, otherwise one call each. Query heads
that share a key head read it without a copy. Heads stay where the projection puts them, so nothing
is transposed. The output carries torch's graph, which holds the tensors that its backward pass
reads: these are the inputs, the output and its logsumexp, nothing more.

`attention` computes the same from blocks of products. It is the reference and serves where no flash
kernel runs.

Legend: T tokens of the pack, N keys (T unless segments share tokens), Q query heads, K key heads, D
head size. Queries arrive multiplied by 1 / sqrt(D).
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from tinker_cookbook.local.engine.model.devices import to_device

__all__ = [
    "SegmentBounds",
    "flash_attention",
    "flash_attention_backward",
    "runs_flash",
    "segment_bounds",
]

logger = logging.getLogger(__name__)

_CAUSAL = (-1, 0)
"""A window that reaches to the first key and not beyond the query. Where a segment has fewer
queries than keys, the last query is at the last key."""


@dataclass(frozen=True)
class SegmentBounds:
    """Where the segments of a pack begin and end."""

    key_lengths: list[int]
    query_lengths: list[int]
    """Smaller where a segment shares its first tokens."""
    keys: torch.Tensor
    """int32 [segments + 1]: the first key of each segment and the end; `queries` likewise."""
    queries: torch.Tensor


def segment_bounds(
    lengths: Sequence[int], device: torch.device, shared: Sequence[int] | None = None
) -> SegmentBounds:
    """Return the bounds of segments.

    Args:
        lengths: number of keys of each segment.
        shared: number of its first keys that have no queries; None if all have one.
    """
    own = [n - s for n, s in zip(lengths, shared or [0] * len(lengths), strict=True)]
    keys, queries = (to_device(np.cumsum([0, *n], dtype=np.int32), device) for n in (lengths, own))
    return SegmentBounds(list(lengths), own, keys, queries)


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: SegmentBounds,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the attended values [T, Q, D], and q, k, v as `flash_attention_backward` takes them.

    Args:
        q: [T, Q, D]; `k` and `v` are [N, K, D].
        bounds: `segment_bounds` on the device of `q`.
    """
    q, k, v = q.detach(), k.detach(), v.detach()
    for tensor in (q, k, v):
        tensor.requires_grad_()
    varlen = _varlen_attention() if q.device.type == "cuda" else None
    with torch.enable_grad():
        if varlen is None:
            out = _segment_by_segment(q, k, v, bounds)
        else:
            longest = max(bounds.query_lengths), max(bounds.key_lengths)
            out = varlen(
                *(q, k, v, bounds.queries, bounds.keys, *longest),
                scale=1.0,
                window_size=_CAUSAL,
                enable_gqa=True,
            )
    return out, q, k, v


def flash_attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q (multiplied, as it arrived), k and v; once for each result.

    Args:
        grad: gradient of the attended values, [T, Q, D].
        q, k, v, out: what `flash_attention` returned.
    """
    q_grad, k_grad, v_grad = torch.autograd.grad(out, (q, k, v), grad)
    return q_grad, k_grad, v_grad


@functools.lru_cache(maxsize=8)
def runs_flash(
    device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> bool:
    """Return whether a GPU computes this attention on flash kernels, by trying it."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    try:
        is_right = _computes_a_shared_prefix(device, dtype, num_heads, num_kv_heads, head_dim)
    except (RuntimeError, TypeError, ValueError) as error:
        logger.warning(
            "attention in training runs without flash kernels, which is slower: %s",
            str(error).partition("\n")[0],
        )
        return False
    if not is_right:
        logger.warning(
            "attention in training runs without flash kernels, which is slower: those of this "
            "torch put the last query of a segment elsewhere than at its last key"
        )
    return is_right


def _computes_a_shared_prefix(
    device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> bool:
    """Return whether attention is right for a sequence whose last two of three keys have queries.

    With equal keys, the values attended to are means of those that a query sees.
    """
    q = torch.ones(3, num_heads, head_dim, dtype=dtype, device=device)
    k = torch.ones(4, num_kv_heads, head_dim, dtype=dtype, device=device)
    v = torch.tensor([7.0, 1.0, 3.0, 8.0], dtype=dtype, device=device)[:, None, None].expand_as(k)
    out, q, k, v = flash_attention(q, k, v.contiguous(), segment_bounds((1, 3), device, (0, 1)))
    *_, v_grad = flash_attention_backward(torch.ones_like(out), q, k, v, out)
    group = num_heads // num_kv_heads
    values, gradients = (tensor[:, 0, 0].float().cpu() for tensor in (out.detach(), v_grad))
    return torch.allclose(values, torch.tensor([7.0, 2.0, 4.0]), atol=0.05) and torch.allclose(
        gradients, torch.tensor([1.0, 5 / 6, 5 / 6, 1 / 3]) * group, rtol=0.02
    )


def _segment_by_segment(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: SegmentBounds
) -> torch.Tensor:
    from torch.nn.attention.bias import causal_lower_right  # takes as long to import as torch

    parts = []
    keys = (tensor.split(bounds.key_lengths) for tensor in (k, v))
    for segment in zip(q.split(bounds.query_lengths), *keys, strict=True):
        heads_first = (tensor.transpose(0, 1)[None] for tensor in segment)
        num_queries, num_keys = len(segment[0]), len(segment[1])
        whole = num_queries == num_keys
        out = functional.scaled_dot_product_attention(
            *heads_first,
            attn_mask=None if whole else causal_lower_right(num_queries, num_keys),
            is_causal=whole,
            scale=1.0,
            enable_gqa=True,
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


@functools.lru_cache(maxsize=1)
def _varlen_attention() -> Callable[..., Any] | None:
    """Return torch's attention over segments; None for versions without grouped heads in it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= set(known) else None
