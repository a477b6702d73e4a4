"""Causal attention inside each segment of a pack, forward and backward.

Each block of queries meets all keys up to the block's end, so most of the masked half is not
computed and no [n, n] matrix of a long sequence exists. The backward pass recomputes the
probabilities. Query heads that share a key head are interleaved row by row, so grouped attention is
one matrix product per key head.

Queries arrive multiplied by 1 / sqrt(D). With S = q k', P = softmax(S), out = P v:

    v_grad = P' grad            P_grad = grad v'
    S_grad = P * (P_grad - sum_j P_ij P_grad_ij)
    q_grad = S_grad k           k_grad = S_grad' q

Segments may share a prefix, which has one set of queries but is copied to the keys of each segment:
`lengths` counts the keys, and the first `shared` of them have no queries in that segment.

Legend: K key heads, G query heads per key head, n tokens of a segment, T of the pack, N keys (T if
nothing is shared), D head size.
Queries and outputs are [K, T G, D] (row t G + g), keys and values [K, N, D].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch

from tinker_cookbook.local.engine.model.precision import lacks_products
from tinker_cookbook.local.engine.native.attention import (
    AttentionKernels,
    num_queries,
    segments_of,
)
from tinker_cookbook.local.engine.native.build import load_kernels

__all__ = [
    "attention_backward",
    "attention_forward",
    "paired_attention_backward",
    "paired_attention_forward",
]

_BLOCK_TOKENS = 128


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
    shared: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the attended values, in the layout of `q`, and the logsumexp [K, T G] of the scores.

    The second is None where torch computed the first, whose backward pass does not read it.
    """
    if lacks_products(q):
        out, lse = attention_forward(q.float(), k.float(), v.float(), lengths, shared)
        return out.to(q.dtype), lse
    kernels = _kernels()
    group = q.shape[1] // num_queries(lengths, shared)
    if kernels is not None and kernels.fit(q, group):
        return kernels.forward(q, k, v, lengths, shared)
    out = torch.empty_like(q)
    for keys, rows, diagonal in _blocks(lengths, shared, group):
        probabilities = _probabilities(q[:, rows], k[:, keys], diagonal, group)
        torch.bmm(probabilities, v[:, keys], out=out[:, rows])
    return out, None


def attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    lengths: Sequence[int],
    shared: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q (multiplied, as it arrived), k and v, given that of the output.

    `out` and `lse` are the results of `attention_forward`.
    """
    if lacks_products(q):
        grad, wide_q, wide_k, wide_v, out = (t.float() for t in (grad, q, k, v, out))
        grads = attention_backward(grad, wide_q, wide_k, wide_v, out, lse, lengths, shared)
        return grads[0].to(q.dtype), grads[1].to(q.dtype), grads[2].to(q.dtype)
    kernels = _kernels()
    if kernels is not None and lse is not None:
        return kernels.backward(grad, q, k, v, out, lse, lengths, shared)
    q_grad, k_grad, v_grad = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    group = q.shape[1] // num_queries(lengths, shared)
    # sum_j P_ij P_grad_ij = sum_j P_ij (grad_i . v_j) = grad_i . out_i: one dot product per row.
    dots = torch.linalg.vecdot(grad.float(), out.float()).unsqueeze(-1)
    for keys, rows, diagonal in _blocks(lengths, shared, group):
        k_part, v_part, grad_part = k[:, keys], v[:, keys], grad[:, rows]
        probabilities = _probabilities(q[:, rows], k_part, diagonal, group)
        v_grad[:, keys].baddbmm_(probabilities.transpose(1, 2), grad_part)
        scores_grad = torch.bmm(grad_part, v_part.transpose(1, 2))
        scores_grad.sub_(dots[:, rows]).mul_(probabilities)
        torch.bmm(scores_grad, k_part, out=q_grad[:, rows])
        k_grad[:, keys].baddbmm_(scores_grad.transpose(1, 2), q[:, rows])
    return q_grad, k_grad, v_grad


def paired_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
    shared: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `attention_forward` does, for models whose matrices are `paired`.

    Sums run in the order of the compiled decoder, for the same bits.

    Returns:
        The attended values [T, K G D], with the heads of a token side by side; and the logsumexp.
    """
    return _kernels_of_pairs().forward_in_order(q, k, v, lengths, shared)


def paired_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lengths: Sequence[int],
    shared: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `attention_backward` does, from operands that are rounded to bfloat16.

    `grad` and `out` are [T, K G D].
    """
    return _kernels_of_pairs().backward_of_pairs(grad, q, k, v, out, lse, lengths, shared)


def _kernels_of_pairs() -> AttentionKernels:
    kernels = _kernels()
    assert kernels is not None, "paired matrices exist with compiled kernels only"
    return kernels


@functools.lru_cache(maxsize=1)
def _kernels() -> AttentionKernels | None:
    """Return the compiled kernels, waiting for the compiler if it still runs; None: use torch."""
    library = load_kernels()
    return None if library is None else AttentionKernels(library)


def _blocks(
    lengths: Sequence[int], shared: Sequence[int] | None, group: int
) -> Iterator[tuple[slice, slice, int]]:
    """Yield (keys, query rows, tokens in the query block) for every block of every segment."""
    for at in segments_of(lengths, shared):
        for first in range(at.first, at.last, _BLOCK_TOKENS):
            last = min(first + _BLOCK_TOKENS, at.last)
            rows = slice((at.query + first) * group, (at.query + last) * group)
            yield slice(at.keys, at.keys + last), rows, last - first


def _probabilities(q: torch.Tensor, k: torch.Tensor, diagonal: int, group: int) -> torch.Tensor:
    """Return softmax(q k') for one block; only its last `diagonal` keys can be masked."""
    scores = torch.bmm(q, k.transpose(1, 2))
    mask = _mask(group, scores.dtype, scores.device)
    scores[:, :, -diagonal:].add_(mask[: diagonal * group, :diagonal])
    if scores.dtype == torch.float32:
        return torch.softmax(scores, dim=-1)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)


@functools.lru_cache(maxsize=16)
def _mask(group: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return [block G, block]: minus infinity where a key comes after the query, otherwise 0."""
    above = torch.full((_BLOCK_TOKENS, _BLOCK_TOKENS), -math.inf, dtype=dtype, device=device)
    return above.triu_(1).repeat_interleave(group, dim=0)
