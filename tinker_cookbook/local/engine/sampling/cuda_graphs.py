"""CUDA graphs: the work of a step is recorded once, then started as a whole.

A step of a small model consists of hundreds of short kernels, and starting them one by one from
Python takes longer than they run.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["StepGraphs"]

logger = logging.getLogger(__name__)

_MAX_GRAPHS = 48
"""Maximum number of records; the one that was not used for longest is dropped."""
_PLAIN_STEPS = 2
"""A step is computed so often without a record first: most shapes of a growing sequence pass."""


class StepGraphs:
    """Records of steps on one GPU. All share one memory pool, since they run one after another."""

    def __init__(self, device: torch.device, *, enabled: bool = True) -> None:
        self._device = device
        self._enabled = enabled and device.type == "cuda"
        self._graphs: OrderedDict[
            tuple[int, ...], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]
        ] = OrderedDict()
        self._num_seen: OrderedDict[tuple[int, ...], int] = OrderedDict()
        self._stream = torch.cuda.Stream(device) if self._enabled else None
        self._memory = torch.cuda.graph_pool_handle() if self._enabled else None

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Drop all records, because memory that they read has moved."""
        self._graphs.clear()
        self._num_seen.clear()

    def run(
        self, key: tuple[int, ...], compute: Callable[[], None], kept: tuple[Tensor, ...]
    ) -> None:
        """Do what `compute` does.

        Args:
            key: equal for calls that use the same memory in the same shapes.
            compute: may be called several times for one step.
            kept: tensors that a record reads and that nothing else may keep alive.
        """
        if key not in self._graphs and not self._record(key, compute, kept):
            compute()
            return
        self._graphs.move_to_end(key)
        self._graphs[key][0].replay()

    def _record(
        self, key: tuple[int, ...], compute: Callable[[], None], kept: tuple[Tensor, ...]
    ) -> bool:
        """Record a step that has come often enough; return whether there is a record now."""
        if not self._enabled:
            return False
        self._num_seen[key] = self._num_seen.pop(key, 0) + 1
        if len(self._num_seen) > 8 * _MAX_GRAPHS:
            self._num_seen.popitem(last=False)
        if self._num_seen[key] <= _PLAIN_STEPS:
            return False
        if len(self._graphs) >= _MAX_GRAPHS:
            self._graphs.popitem(last=False)
        try:
            self._graphs[key] = self._capture(compute), kept
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            logger.warning("decoding runs without CUDA graphs, which is slower: %s", reason)
            self._enabled = False
            self.clear()
            return False
        return True

    def _capture(self, compute: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Record `compute`, after it has run once where it is recorded: libraries start there."""
        stream, current = self._stream, torch.cuda.current_stream(self._device)
        assert stream is not None, "records are for GPUs"
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            compute()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph,
            pool=self._memory,
            stream=stream,
            # other threads of the service may use the GPU meanwhile
            capture_error_mode="thread_local",
        ):
            compute()
        return graph
