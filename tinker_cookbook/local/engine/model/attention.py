"""Causal attention inside each segment of a pack, forward and backward.

Queries go in blocks against all keys up to the block's end, so the masked half is mostly not
computed and no [n, n] matrix of a long sequence exists. The probabilities are computed again in the
backward pass. Query heads that share a key head are interleaved row by row, so grouped attention is
one product per key head.

Queries come multiplied by 1 / sqrt(D).

Legend: K key heads, G query heads per key head, n tokens of a segment, T of the pack, D head size.
Queries and outputs are [K, T G, D] (row t G + g), keys and values [K, T, D].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch

from tinker_cookbook.local.engine.model.precision import lacks_products
from tinker_cookbook.local.engine.native.attention import AttentionKernels
from tinker_cookbook.local.engine.native.build import load_kernels

__all__ = ["attention_backward", "attention_forward"]

_BLOCK_TOKENS = 128


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attended values, in the layout of `q`, and what the backward pass of the compiled kernels
    needs beside them."""
    if lacks_products(q):
        out, beside = attention_forward(q.float(), k.float(), v.float(), lengths)
        return out.to(q.dtype), beside
    kernels = _kernels()
    if kernels is not None and kernels.fit(q, k):
        return kernels.forward(q, k, v, lengths)
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for keys, rows, diagonal in _blocks(lengths, group):
        probabilities = _probabilities(q[:, rows], k[:, keys], diagonal, group)
        torch.bmm(probabilities, v[:, keys], out=out[:, rows])
    return out, None


def attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    beside: torch.Tensor | None,
    lengths: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q (as it came, multiplied), k and v from the gradient of the output; `out` and
    `beside` are what `attention_forward` gave."""
    if lacks_products(q):
        grad, wide_q, wide_k, wide_v, out = (t.float() for t in (grad, q, k, v, out))
        grads = attention_backward(grad, wide_q, wide_k, wide_v, out, beside, lengths)
        return grads[0].to(q.dtype), grads[1].to(q.dtype), grads[2].to(q.dtype)
    kernels = _kernels()
    if kernels is not None and beside is not None:
        return kernels.backward(grad, q, k, v, out, beside, lengths)
    q_grad, k_grad, v_grad = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    group = q.shape[1] // k.shape[1]
    # sum_j P_ij dP_ij, which the gradient of softmax subtracts, is the dot of out and its gradient.
    dots = torch.linalg.vecdot(grad.float(), out.float()).unsqueeze(-1)
    for keys, rows, diagonal in _blocks(lengths, group):
        k_part, v_part, grad_part = k[:, keys], v[:, keys], grad[:, rows]
        probabilities = _probabilities(q[:, rows], k_part, diagonal, group)
        v_grad[:, keys].baddbmm_(probabilities.transpose(1, 2), grad_part)
        scores_grad = torch.bmm(grad_part, v_part.transpose(1, 2))
        scores_grad.sub_(dots[:, rows]).mul_(probabilities)
        torch.bmm(scores_grad, k_part, out=q_grad[:, rows])
        k_grad[:, keys].baddbmm_(scores_grad.transpose(1, 2), q[:, rows])
    return q_grad, k_grad, v_grad


@functools.lru_cache(maxsize=1)
def _kernels() -> AttentionKernels | None:
    """The compiled kernels, waiting for the compiler if it still runs; None: use torch."""
    library = load_kernels()
    return None if library is None else AttentionKernels(library)


def _blocks(lengths: Sequence[int], group: int) -> Iterator[tuple[slice, slice, int]]:
    """(keys, query rows, tokens in the query block) of every block of every segment."""
    start = 0
    for length in lengths:
        for first in range(0, length, _BLOCK_TOKENS):
            last = min(first + _BLOCK_TOKENS, length)
            rows = slice((start + first) * group, (start + last) * group)
            yield slice(start, start + last), rows, last - first
        start += length


def _probabilities(q: torch.Tensor, k: torch.Tensor, diagonal: int, group: int) -> torch.Tensor:
    scores = torch.bmm(q, k.transpose(1, 2))
    mask = _mask(group, scores.dtype, scores.device)
    scores[:, :, -diagonal:].add_(mask[: diagonal * group, :diagonal])
    if scores.dtype == torch.float32:
        return torch.softmax(scores, dim=-1)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)


@functools.lru_cache(maxsize=16)
def _mask(group: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[block G, block]: minus infinity where a key comes after the query."""
    above = torch.full((_BLOCK_TOKENS, _BLOCK_TOKENS), -math.inf, dtype=dtype, device=device)
    return above.triu_(1).repeat_interleave(group, dim=0)
