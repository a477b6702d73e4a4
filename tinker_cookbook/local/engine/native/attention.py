"""Attention for training on the compiled kernels; see `train_attention.c`. Not thread-safe.

Segments may share a prefix: then each has its own copy of the prefix's keys, and no queries there.
`lengths` are those of the keys, and `shared` counts the first keys of each segment that have no
queries (None: all keys have one). Queries are numbered through all segments without gaps.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["MAX_GROUP", "MAX_HEAD_DIM", "AttentionKernels", "Segment", "num_queries", "segments_of"]

MAX_HEAD_DIM = 256
"""Largest head, as in `train_attention.c`."""
MAX_GROUP = 96
"""Most query heads per key head: `BLOCK_ROWS` there."""

_Pointer = ctypes.c_void_p
_Long = ctypes.c_int64
_PARTS = 12
"""Number of tasks that a backward pass is cut into, so that threads share them evenly."""
_SHORTEST_PART = 512
"""Minimum number of queries in a part of a segment."""
_SHORTEST_PAIRED_PART = 192
"""The same where products are in bfloat16, whose threads share work more finely."""
_IN_ORDER_STEP = 32
"""Number of queries in a task of `forward_in_order`."""
_LANES = 16
"""Upper bound of the kernels' vector width in floats."""


class Segment(NamedTuple):
    """Where a segment's keys and queries are; positions count from the segment's first key."""

    keys: int
    """Row of the first key."""
    query: int
    """Token of the query at position 0, or where it would be."""
    first: int
    """Position of the first query."""
    last: int
    """Position after the last query: the number of keys."""


def segments_of(lengths: Sequence[int], shared: Sequence[int] | None = None) -> Iterator[Segment]:
    """Return the segments in order."""
    keys = tokens = 0
    for length, first in zip(lengths, shared or itertools.repeat(0), strict=False):
        yield Segment(keys, tokens - first, first, length)
        keys, tokens = keys + length, tokens + length - first


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, _Long) for name in ("tokens", "keys", "kv_heads", "group", "dim", "threads")),
        ("num_tasks", _Long),
        ("num_partial", _Long),
        *((name, _Pointer) for name in ("tasks", "q", "k", "v", "out", "lse", "grad")),
        *((name, _Pointer) for name in ("q_grad", "k_grad", "v_grad")),
        *((name, _Pointer) for name in ("partial_k", "partial_v", "scratch")),
    )


class AttentionKernels:
    """The compiled counterpart of `model/attention`, with the same layouts of its tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.attention_limits.restype = library.attention_scratch.restype = _Long
        library.attention_pairs_scratch.restype = _Long
        library.span_tokens.restype = library.span_heads.restype = _Long
        self._span_rows = int(library.span_tokens()) * int(library.span_heads())
        limits = [int(library.attention_limits(_Long(number))) for number in range(4)]
        self._block_rows, max_dim, task, struct = limits
        assert (self._block_rows, max_dim) == (MAX_GROUP, MAX_HEAD_DIM), "limits differ from C's"
        assert task == 5 * 8, "a task differs from the C struct"
        assert struct == ctypes.sizeof(_Attention), "_Attention differs from the C struct"
        self._scratch_floats = int(library.attention_scratch())
        self._scratch = torch.empty(0)

    def fit(self, q: Tensor, group: int) -> bool:
        """Return whether the kernels take queries of this size and format."""
        dim = q.shape[2]
        plain = q.dtype == torch.float32 and q.device.type == "cpu"
        return plain and dim <= MAX_HEAD_DIM and group <= MAX_GROUP

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        shared: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the attended values, in the layout of `q`, and the scores' logsumexp [K, T G]."""
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2])
        tokens = num_queries(lengths, shared)
        step = self._block_rows // (q.shape[1] // tokens)
        tasks = _forward_tasks(lengths, shared, step)
        call = self._call(q, k, v, tokens, tasks, out=out, lse=lse)
        self._library.attention_forward(ctypes.byref(call))
        return out, lse

    def forward_in_order(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        shared: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what `forward` does with the bits of the decoder: values [T, K G D], logsumexp."""
        tokens = num_queries(lengths, shared)
        out = q.new_empty(tokens, q.numel() // tokens)
        lse = q.new_empty(q.shape[:2])
        stride = max(lengths) + _LANES
        self._reserve(self._span_rows * stride)
        tasks = _forward_tasks(lengths, shared, _IN_ORDER_STEP)
        call = self._call(q, k, v, tokens, tasks, out=out, lse=lse)
        self._library.attention_in_order(ctypes.byref(call), _Long(stride))
        return out, lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: Sequence[int],
        shared: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v, given that of `forward`'s values."""
        tasks, num_partial = _backward_tasks(lengths, shared, len(k), _SHORTEST_PART)
        tokens = num_queries(lengths, shared)
        call = self._call(q, k, v, tokens, tasks, out=out, lse=lse, grad=grad)
        return self._run_backward(self._library.attention_backward, call, (q, k, v), num_partial)

    def backward_of_pairs(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: Sequence[int],
        shared: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `backward` does for the values of `forward_in_order`.

        The operands of products are rounded to bfloat16 and multiplied in pairs.
        """
        tasks, num_partial = _backward_tasks(lengths, shared, len(k), _SHORTEST_PAIRED_PART)
        self._reserve(int(self._library.attention_pairs_scratch()))
        tokens = num_queries(lengths, shared)
        call = self._call(q, k, v, tokens, tasks, out=out, lse=lse, grad=grad)
        backward = self._library.attention_backward_pairs
        return self._run_backward(backward, call, (q, k, v), num_partial)

    def _run_backward(
        self,
        backward: Callable[..., object],
        call: _Attention,
        inputs: tuple[Tensor, Tensor, Tensor],
        num_partial: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = inputs
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        partial = k.new_empty(2, len(k), num_partial, k.shape[2])
        call.num_partial = num_partial
        call.partial_k, call.partial_v = partial[0].data_ptr(), partial[1].data_ptr()
        call.q_grad, call.k_grad, call.v_grad = (tensor.data_ptr() for tensor in grads)
        backward(ctypes.byref(call))
        return grads

    def _reserve(self, floats_per_thread: int) -> None:
        size = torch.get_num_threads() * floats_per_thread
        if len(self._scratch) < size:
            self._scratch = torch.empty(size)

    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, tokens: int, tasks: np.ndarray, **tensors: Tensor
    ) -> _Attention:
        """Return the struct of a call. It has addresses only: the caller keeps the arrays."""
        threads = torch.get_num_threads()
        self._reserve(self._scratch_floats)
        for tensor in (q, k, v, *tensors.values()):
            assert tensor.is_contiguous(), "the kernels read dense tensors"
        return _Attention(
            tokens=tokens,
            keys=k.shape[1],
            kv_heads=len(k),
            group=q.shape[1] // tokens,
            dim=k.shape[2],
            threads=threads,
            num_tasks=len(tasks),
            tasks=tasks.ctypes.data,
            q=q.data_ptr(),
            k=k.data_ptr(),
            v=v.data_ptr(),
            scratch=self._scratch.data_ptr(),
            **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        )


def num_queries(lengths: Sequence[int], shared: Sequence[int] | None = None) -> int:
    """Return the number of tokens that have a query."""
    return sum(lengths) - sum(shared or ())


def _forward_tasks(lengths: Sequence[int], shared: Sequence[int] | None, step: int) -> np.ndarray:
    """Return blocks of queries, longest first: int64 [n, 5], see `Task` in train_attention.h."""
    tasks = [
        (at.keys, first, min(first + step, at.last), -1, at.query)
        for at in segments_of(lengths, shared)
        for first in range(at.first, at.last, step)
    ]
    return np.array(sorted(tasks, key=lambda task: -task[2]), np.int64)


def _backward_tasks(
    lengths: Sequence[int], shared: Sequence[int] | None, kv_heads: int, shortest: int
) -> tuple[np.ndarray, int]:
    """Return ranges of queries, as `_forward_tasks` does, and the rows of partial key gradients.

    A long segment is cut into ranges of equal cost: query i meets i keys, so the cost up to i grows
    as i^2 and the cuts are at square roots. The last range sees all keys and writes the segment's
    gradients; the other ranges write partial ones, which are added afterwards.
    """
    wanted = -(-_PARTS // (kv_heads * len(lengths)))
    tasks, num_partial = [], 0
    for at in segments_of(lengths, shared):
        parts = max(1, min(wanted, (at.last - at.first) // shortest))
        low, high = at.first**2, at.last**2
        cuts = [round((low + (high - low) * part / parts) ** 0.5) for part in range(parts + 1)]
        for first, last in itertools.pairwise(cuts):
            whole = last == at.last
            tasks.append((at.keys, first, last, -1 if whole else num_partial, at.query))
            num_partial += 0 if whole else last
    tasks.sort(key=lambda task: task[1] ** 2 - task[2] ** 2)
    return np.array(tasks, np.int64), num_partial
