"""The active adapter of a base model in training: one at a time."""

from __future__ import annotations

import weakref

from tinker_cookbook.local.engine.model.lora import Adapter, layer_group
from tinker_cookbook.local.engine.model.weights import FUSED, ModelWeights
from tinker_cookbook.local.engine.native.operands import LoraPair

__all__ = ["AdapterFold"]


class AdapterFold:
    """Gives the matrices of a model the adapter that they compute with."""

    def __init__(self, weights: ModelWeights) -> None:
        self._weights = weights
        self._adapter: weakref.ref[Adapter] | None = None
        self._version = -1
        self._pairs: dict[str, LoraPair] = {}

    def load(self, adapter: Adapter) -> None:
        """Make this the active adapter, unless it is already and has not changed."""
        loaded = self._adapter() if self._adapter is not None else None
        if adapter is loaded and adapter.version == self._version:
            return
        self._adapter, self._version = weakref.ref(adapter), adapter.version
        parameters = adapter.parameters.to(self._weights.dtype)
        self._pairs = {}
        for index, layer in enumerate(self._weights.layers):
            for name in FUSED:
                group = layer_group(index, name)
                targets = adapter.group(group)
                if targets:
                    a = adapter.layout.stacked_a(parameters, group)
                    b = tuple(adapter.b(target.path) for target in targets)
                    self._pairs[group] = LoraPair(a, b, adapter.scale)
                layer.matrices[name].hold(self._pairs.get(group))

    def pair(self, group: str) -> LoraPair | None:
        """Return the A and B of a group; None where it is not trained."""
        return self._pairs.get(group)
