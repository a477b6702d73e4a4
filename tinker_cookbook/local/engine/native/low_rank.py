"""Gradients of LoRA matrices where products are in bfloat16; see `pair_gradients.c`.

Not thread-safe.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinker_cookbook.local.engine.native.build import load_kernels

__all__ = ["LowRankGradients", "LowRankJob", "low_rank_gradients"]

_MAX_JOBS = 4
_Pointer = ctypes.c_void_p
_Long = ctypes.c_int64


class _Job(ctypes.Structure):
    _fields_ = (
        ("left", _Pointer),
        ("right", _Pointer),
        ("left_stride", _Long),
        ("right_stride", _Long),
        ("rank", _Long),
        ("outs", _Long),
        ("y", _Pointer),
        ("y_stride", _Long),
        ("turned", _Long),
        ("packed", _Pointer),
    )


class _LowRank(ctypes.Structure):
    _fields_ = (
        ("tokens", _Long),
        ("threads", _Long),
        ("num_jobs", _Long),
        ("scratch", _Pointer),
        ("thread_floats", _Long),
        ("jobs", _Job * _MAX_JOBS),
    )


@dataclass(frozen=True)
class LowRankJob:
    """One gradient: `into += left' right`, or its transpose."""

    into: Tensor
    """float32 [rank, outs], or [outs, rank] if `turned`."""
    left: Tensor
    """float32 [T, rank]."""
    right: Tensor
    """float32 [T, outs]."""
    turned: bool


@functools.lru_cache(maxsize=1)
def low_rank_gradients() -> LowRankGradients | None:
    """Return the kernels, waiting for the compiler if it still runs; None: use torch."""
    library = load_kernels()
    return None if library is None else LowRankGradients(library)


class LowRankGradients:
    """Calls `pair_gradients.c`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for function in (library.low_rank_words, library.low_rank_scratch, library.low_rank_size):
            function.restype = _Long
        for number, struct in enumerate((_Job, _LowRank)):
            size = library.low_rank_size(_Long(number))
            assert size == ctypes.sizeof(struct), f"{struct.__name__} differs from the C struct"
        self._packed = torch.empty(0, dtype=torch.int32)
        self._scratch = torch.empty(0)

    def add(self, jobs: Sequence[LowRankJob]) -> None:
        """Compute gradients over the same T tokens."""
        for first in range(0, len(jobs), _MAX_JOBS):
            self._add(jobs[first : first + _MAX_JOBS])

    def _add(self, jobs: Sequence[LowRankJob]) -> None:
        tokens, threads = len(jobs[0].left), torch.get_num_threads()
        if tokens == 0:
            return
        ranks = [job.left.shape[1] for job in jobs]
        words = [self._library.low_rank_words(_Long(tokens), _Long(rank)) for rank in ranks]
        if len(self._packed) < sum(words):
            self._packed = torch.empty(sum(words), dtype=torch.int32)
        floats = self._library.low_rank_scratch(_Long(max(ranks)))
        if len(self._scratch) < threads * floats:
            self._scratch = torch.empty(threads * floats)
        call = _LowRank(tokens, threads, len(jobs), self._scratch.data_ptr(), floats)
        packed = self._packed.data_ptr()
        for place, job, count in zip(call.jobs, jobs, words, strict=False):
            for tensor in (job.into, job.left, job.right):
                assert tensor.dtype == torch.float32, "the kernels read float32"
                assert tensor.stride(1) == 1, "rows must be dense"
            place.left, place.left_stride = job.left.data_ptr(), job.left.stride(0)
            place.right, place.right_stride = job.right.data_ptr(), job.right.stride(0)
            place.rank, place.outs = job.left.shape[1], job.right.shape[1]
            place.y, place.y_stride = job.into.data_ptr(), job.into.stride(0)
            place.turned, place.packed = job.turned, packed
            packed += 4 * count
        self._library.low_rank_gradients(ctypes.byref(call))
