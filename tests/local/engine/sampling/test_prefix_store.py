"""Stored prefixes: their memory is free as soon as nobody may read them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tinker_cookbook.local.engine.sampling.cache_rows import CacheShape
from tinker_cookbook.local.engine.sampling.prefix_store import PrefixStore

TOKENS = np.arange(100, dtype=np.int32)


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def store() -> PrefixStore:
    shape = CacheShape(
        num_layers=2,
        num_kv_heads=1,
        head_dim=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_tokens=128,
        hidden_size=16,
    )
    return PrefixStore(shape, lambda: 2**20)


def fill(store: PrefixStore) -> weakref.ref:
    """Store a prefix of the weights with key 1; return a reference to what holds its memory."""
    prefix = store.begin(1, TOKENS)
    assert prefix is not None
    store.finish(prefix)
    store.release(prefix)
    return weakref.ref(prefix.row.pool)


@pytest.mark.usefixtures("without_collector")
def test_forgotten_prefixes_are_freed_without_the_garbage_collector(store: PrefixStore) -> None:
    memory = fill(store)
    assert memory() is not None
    store.forget(1)
    assert memory() is None
    assert store.num_bytes == 0


@pytest.mark.usefixtures("without_collector")
def test_evicted_prefixes_are_freed_without_the_garbage_collector(store: PrefixStore) -> None:
    memory = fill(store)
    store.shrink(0)
    assert memory() is None
    assert store.num_bytes == 0
