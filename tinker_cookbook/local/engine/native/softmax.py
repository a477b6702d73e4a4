"""Exponentials of logits with their sums, and draws from them, each in one call, for sampling."""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import torch
from torch import Tensor

from tinker_cookbook.local.engine.native.build import load_kernels

__all__ = ["BLOCK", "draw_rows", "exp_blocks"]

BLOCK = 128
"""Number of tokens in a block, as in `softmax.c`."""
_Pointer = ctypes.c_void_p
_Long = ctypes.c_int64


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    library = load_kernels()
    if library is not None:
        library.draw_rows.argtypes = [*[_Pointer] * 4, _Long, *[_Pointer] * 2, *[_Long] * 3]
    return library


def _library_for(logits_NV: Tensor) -> ctypes.CDLL | None:
    """Return the kernels if they can read the logits."""
    fits = logits_NV.dtype == torch.float32 and logits_NV.device.type == "cpu"
    return _library() if fits and logits_NV.stride(1) == 1 else None


def exp_blocks(
    logits_NV: Tensor, inverse_N: Tensor | None, *, keep_weights: bool
) -> tuple[Tensor | None, Tensor, Tensor] | None:
    """Return exponentials, their block sums and their logsumexp; None where the kernel is missing.

    It is missing for other devices and formats, and without a compiler.

    Args:
        inverse_N: factor of each row's logits, such as 1 / temperature; None for ones.
        keep_weights: whether to return the exponentials.

    Returns:
        exp(logit * inverse - max) [N, B, BLOCK], filled up with zeros, or None without
        `keep_weights`; float64 sums [N, B]; float32 logsumexp of logit * inverse [N].
    """
    rows, vocab = logits_NV.shape
    library = _library_for(logits_NV)
    if library is None:
        return None
    num_blocks = -(-vocab // BLOCK)
    weights = torch.empty(rows, num_blocks, BLOCK) if keep_weights else None
    sums, lse = torch.empty(rows, num_blocks, dtype=torch.float64), torch.empty(rows)
    library.exp_blocks(
        _Pointer(None if weights is None else weights.data_ptr()),
        _Pointer(sums.data_ptr()),
        _Pointer(lse.data_ptr()),
        _Pointer(logits_NV.data_ptr()),
        _Long(logits_NV.stride(0)),
        _Pointer(None if inverse_N is None else inverse_N.data_ptr()),
        _Long(rows),
        _Long(vocab),
        _Long(torch.get_num_threads()),
    )
    return weights, sums, lse


def draw_rows(
    logits_NV: Tensor, inverse_N: np.ndarray | None, uniforms_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Draw one token per row; None where the kernel is missing, as in `exp_blocks`.

    Args:
        inverse_N: float32, 1 / temperature of each row; None for ones.
        uniforms_N: float64 in [0, 1), where the cumulative distribution is inverted.

    Returns:
        Tokens, int64, and their logprobs at temperature 1, float32.
    """
    rows, vocab = logits_NV.shape
    library = _library_for(logits_NV)
    if library is None:
        return None
    uniforms_N = np.ascontiguousarray(uniforms_N, np.float64)
    tokens_N, logprobs_N = np.empty(rows, np.int64), np.empty(rows, np.float32)
    sums_NB = np.empty((rows, -(-vocab // BLOCK)))
    library.draw_rows(
        tokens_N.ctypes.data,
        logprobs_N.ctypes.data,
        sums_NB.ctypes.data,
        logits_NV.data_ptr(),
        logits_NV.stride(0),
        None if inverse_N is None else inverse_N.ctypes.data,
        uniforms_N.ctypes.data,
        rows,
        vocab,
        torch.get_num_threads(),
    )
    return tokens_N, logprobs_N
