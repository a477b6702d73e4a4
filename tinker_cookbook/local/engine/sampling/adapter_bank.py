"""Adapters of several runs stacked in fixed memory, so that one product serves a mixed batch.

Each stacked projection has one A and one B with S places side by side, one for each adapter:

    low [N, S, modules * rank] = x A',   set to 0 where a row does not use the place
    y   [N, out]               = x W' + low B'

The memory stays where it is when an adapter is replaced, so a recorded step (`cuda_graphs`) remains
valid. It moves when a batch needs more places, a higher rank or another projection.

Axes: N rows of the batch, S places, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tinker_cookbook.local.engine.model.lora import HEAD_PATH, Adapter, LoraTarget, layer_group
from tinker_cookbook.local.engine.sampling.adapters import StackedLora

__all__ = ["MAX_PLACES", "NO_ADAPTER", "AdapterBank", "BankRouter"]

MAX_PLACES = 8
"""Maximum adapters in one batch."""
NO_ADAPTER = -1
"""The place of a row that uses the base model alone."""
_IDLE_BATCHES = 64
"""An adapter that so many batches did not use may be replaced, so that the bank need not grow."""


@dataclass
class _Place:
    key: int = 0
    """`StackedLora.key` of the adapter; 0: free."""
    last_used: int = -_IDLE_BATCHES
    """Number of the last batch that used it."""


class AdapterBank:
    """The stacked adapters of one base model."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.moves = 0
        """How often the memory has moved."""
        self._dtype, self._device = dtype, device
        self._places: list[_Place] = []
        self._rank = 0
        self._modules: dict[str, list[LoraTarget]] = {}
        self._stacks: dict[str, tuple[Tensor, Tensor]] = {}
        self._num_batches = 0

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(a.nbytes + b.nbytes for a, b in self._stacks.values())

    def place(self, adapters: Sequence[StackedLora | None]) -> np.ndarray | None:
        """Return the place of each adapter, int64; copy those that are new.

        None if they are too many, or if weights are not finite: those would reach other rows.
        """
        wanted = {adapter.key: adapter for adapter in adapters if adapter is not None}
        if len(wanted) > MAX_PLACES:
            return None
        self._num_batches += 1
        held = {place.key for place in self._places}
        new = [adapter for key, adapter in wanted.items() if key not in held]
        if not all(torch.isfinite(a.adapter.parameters).all() for a in new):
            return None
        if not all(self._fits(adapter.adapter) for adapter in new):
            self._widen([adapter.adapter for adapter in new])
            new = list(wanted.values())
        for adapter in new:
            self._copy(adapter.adapter, self._choose(adapter.key, wanted))
        place_of = {place.key: number for number, place in enumerate(self._places)}
        for key in wanted:
            self._places[place_of[key]].last_used = self._num_batches
        keys = [NO_ADAPTER if adapter is None else place_of[adapter.key] for adapter in adapters]
        return np.array(keys, np.int64)

    def stacks(self, group: str, num_places: int) -> tuple[Tensor, Tensor] | None:
        """Return A [S modules rank, in] and B [out, S modules rank] of the first `num_places`."""
        if group not in self._stacks or not num_places:
            return None
        a, b = self._stacks[group]
        width = num_places * len(self._modules[group]) * self._rank
        return a[:width], b[:, :width]

    def _fits(self, adapter: Adapter) -> bool:
        return adapter.rank <= self._rank and adapter.layout.groups.keys() <= self._stacks.keys()

    def _widen(self, adapters: list[Adapter]) -> None:
        """Make room for ranks and projections, and forget the adapters held."""
        self._rank = max(self._rank, *(adapter.rank for adapter in adapters))
        for adapter in adapters:
            self._modules.update(adapter.layout.groups)
        self._allocate(max(len(self._places), 1))

    def _allocate(self, num_places: int) -> None:
        """Allocate empty places."""
        self.moves += 1
        self._stacks.clear()  # before the larger ones exist
        for group, modules in self._modules.items():
            width = num_places * len(modules) * self._rank
            height = sum(module.out_features for module in modules)
            options = {"dtype": self._dtype, "device": self._device}
            a = torch.zeros(width, modules[0].in_features, **options)
            self._stacks[group] = a, torch.zeros(height, width, **options)
        self._places = [_Place() for _ in range(num_places)]

    def _choose(self, key: int, wanted: dict[int, StackedLora]) -> int:
        """Give a place to an adapter: the first idle one, a new one, or the longest unused."""
        oldest = self._num_batches - _IDLE_BATCHES
        idle = [n for n, place in enumerate(self._places) if place.last_used <= oldest]
        free = [n for n in idle if self._places[n].key not in wanted]
        if not free and len(self._places) < MAX_PLACES:
            free = [len(self._places)]
            self._grow()
        if not free:
            others = [n for n, place in enumerate(self._places) if place.key not in wanted]
            free = [min(others, key=lambda n: self._places[n].last_used)]
        self._places[free[0]].key = key
        return free[0]

    def _grow(self) -> None:
        """Double the number of places; the adapters keep theirs."""
        stacks, places = dict(self._stacks), self._places
        self._allocate(2 * len(places))
        self._places[: len(places)] = places
        for group, (a, b) in stacks.items():
            wide_a, wide_b = self._stacks[group]
            wide_a[: len(a)] = a
            wide_b[:, : b.shape[1]] = b

    def _copy(self, adapter: Adapter, place: int) -> None:
        """Write an adapter into a place. Each module has its own rows of B and its own ranks."""
        for group, modules in self._modules.items():
            a, b = self._stacks[group]
            width = len(modules) * self._rank
            a, b = a[place * width : (place + 1) * width], b[:, place * width : (place + 1) * width]
            a.zero_()
            b.zero_()
            top = 0
            for number, module in enumerate(adapter.group(group)):
                ranks = slice(number * self._rank, number * self._rank + adapter.rank)
                a[ranks] = adapter.a(module.path)
                b[top : top + module.out_features, ranks] = adapter.b(module.path) * adapter.scale
                top += module.out_features


class BankRouter:
    """The `torch_layers.Projector` of a batch whose adapters are in a bank."""

    def __init__(self, bank: AdapterBank, places_N: Tensor, num_places: int) -> None:
        """`places_N` are int64, below `num_places`, or `NO_ADAPTER`."""
        self._bank, self._num_places = bank, num_places
        numbers = torch.arange(num_places, device=places_N.device)
        self._other_NS1 = (places_N[:, None] != numbers)[:, :, None]

    def project(self, x: Tensor, weight: Tensor, index: int, name: str) -> Tensor:
        return self._product(x, weight, layer_group(index, name))

    def project_head(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._product(x, weight, HEAD_PATH)

    def _product(self, x: Tensor, weight: Tensor, group: str) -> Tensor:
        stacks = self._bank.stacks(group, self._num_places)
        if stacks is None:
            return functional.linear(x, weight)
        a, b = stacks
        low = functional.linear(x, a).unflatten(1, (self._num_places, -1))
        low = low.masked_fill(self._other_NS1, 0.0).flatten(1)
        # the base product is accumulated onto the low-rank one: the sum is rounded once
        return torch.addmm(functional.linear(low, b), x, weight.t())
