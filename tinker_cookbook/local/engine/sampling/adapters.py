"""Adapters in the form that sampling uses, and their application to batches that mix them.

The low-rank part is computed first and the base product is accumulated onto it, so the sum is
rounded once. Adding two rounded products would lose small updates in bfloat16.

Axes: N rows of the batch, H hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tinker_cookbook.local.engine.model.devices import to_device
from tinker_cookbook.local.engine.model.lora import HEAD_PATH, Adapter, layer_group

__all__ = ["LoraRouter", "StackedLora"]

_keys = itertools.count(1)


class StackedLora:
    """An adapter frozen for sampling: one A and one B per stacked projection, e.g. of q, k, v."""

    def __init__(self, adapter: Adapter, dtype: torch.dtype) -> None:
        """`adapter` must not change afterwards: a snapshot, or an adapter that was just loaded."""
        self.key = next(_keys)
        """Identifies these weights, for example in the prefix store; 1 or greater."""
        self.adapter = adapter
        self.native_table: object = None
        """Addresses for the compiled kernels, which `native_decoder` fills in."""
        self._dtype = dtype
        self._stacks: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        stacks = sum(t.numel() * t.element_size() for pair in self._stacks.values() for t in pair)
        return self.adapter.parameters.numel() * 4 + stacks

    def delta(self, x: Tensor, group: str) -> Tensor | None:
        """Return scale * x A' B' for a stacked projection; None if it has no adapter."""
        if not self.adapter.group(group):
            return None
        if group not in self._stacks:
            self._stacks[group] = self._stack(group)
        a, b = self._stacks[group]
        return functional.linear(functional.linear(x, a), b)

    def _stack(self, group: str) -> tuple[Tensor, Tensor]:
        """Return A [modules * rank, in] and B [out, modules * rank], block diagonal and scaled."""
        adapter = self.adapter
        members = adapter.group(group)
        scaled = [adapter.b(target.path) * adapter.scale for target in members]
        a = adapter.stacked_a(group).to(self._dtype)
        return a, torch.block_diag(*scaled).to(self._dtype)


@dataclass(frozen=True)
class _Group:
    """All rows of a batch that use one adapter."""

    adapter: StackedLora | None
    rows: slice | Tensor


class LoraRouter:
    """The `torch_layers.Projector` of any batch: one product per adapter."""

    def __init__(self, spans: list[tuple[StackedLora | None, int]], device: torch.device) -> None:
        """`spans` lists (adapter, number of consecutive rows) over the whole batch."""
        rows_of: dict[StackedLora | None, list[np.ndarray]] = {}
        first = 0
        for adapter, count in spans:
            rows_of.setdefault(adapter, []).append(np.arange(first, first + count))
            first += count
        self._groups = [
            _Group(adapter, _as_slice(np.concatenate(parts), device))
            for adapter, parts in rows_of.items()
        ]

    def project(self, x: Tensor, weight: Tensor, index: int, name: str) -> Tensor:
        return self._product(x, weight, layer_group(index, name))

    def project_head(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._product(x, weight, HEAD_PATH)

    def _product(self, x: Tensor, weight: Tensor, group: str) -> Tensor:
        delta = self._delta(x, weight.shape[0], group)
        if delta is None:
            return functional.linear(x, weight)
        return torch.addmm(delta, x, weight.t())

    def _delta(self, x: Tensor, out_features: int, group: str) -> Tensor | None:
        if len(self._groups) == 1:
            adapter = self._groups[0].adapter
            return None if adapter is None else adapter.delta(x, group)
        total = None
        for part in self._groups:
            delta = None if part.adapter is None else part.adapter.delta(x[part.rows], group)
            if delta is None:
                continue
            if total is None:
                total = x.new_zeros(len(x), out_features)
            total[part.rows] = delta
        return total


def _as_slice(rows: np.ndarray, device: torch.device) -> slice | Tensor:
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows):
        return slice(first, last + 1)
    return to_device(rows, device)
