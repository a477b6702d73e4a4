"""Products that are summed in AMX's order: by their twin in C, and by AMX where there is any."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.local.engine.sampling_models import random_adapter
from tests.local.engine.test_native import (
    assert_chunks_have_the_bits_of_the_whole,
    compiled,
    load,
    prefill,
)
from tinker_cookbook.local.engine.model import attention, base_model
from tinker_cookbook.local.engine.model.compact import CompactMatrix
from tinker_cookbook.local.engine.native import low_rank
from tinker_cookbook.local.engine.native.build import load_kernels_for
from tinker_cookbook.local.engine.native.instructions import compared_sets
from tinker_cookbook.local.engine.sampling import native_decoder
from tinker_cookbook.local.engine.sampling.batch import Batch, Chunk
from tinker_cookbook.local.engine.sampling.kv_cache import KvCache

_CACHED = (attention._kernels, low_rank.low_rank_gradients)
_SETS = [entry for entry in compared_sets() if entry.sums_blocks and entry.name != "avx512_blocks"]
"""Generic C, and AMX if there is any."""


@pytest.fixture(params=_SETS, ids=lambda entry: entry.name, autouse=True)
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the engine use these kernels."""
    library = load_kernels_for(request.param)
    if library is None:
        pytest.skip("no C compiler here")
    for module in (attention, base_model, low_rank, native_decoder):
        monkeypatch.setattr(module, "load_kernels", lambda: library)
    for function in _CACHED:
        function.cache_clear()
    yield
    for function in _CACHED:
        function.cache_clear()


@pytest.mark.parametrize("compact", [False, True], ids=["16-bit", "12-bit"])
def test_few_tokens_have_the_bits_that_they_have_among_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compact: bool
) -> None:
    monkeypatch.setattr(base_model, "expands_fast", lambda: compact)
    base = load(tmp_path, rounded=False, dtype=torch.bfloat16)
    assert isinstance(base.weights.head, CompactMatrix) == compact
    decoder, adapter = compiled(base), random_adapter(base, 1, rank=35, train_unembed=True)
    prompt = np.random.default_rng(1).integers(0, base.vocab_size, 160).astype(np.int32)
    sizes = (1, 2, 15, 16, 17, 32, 33, 44)
    assert_chunks_have_the_bits_of_the_whole(decoder, prompt, adapter, sizes)


def test_an_adapter_that_is_not_finite_leaves_others_as_they_are(tmp_path: Path) -> None:
    """Tokens of all adapters are in one tile."""
    base = load(tmp_path, rounded=True, dtype=torch.bfloat16)
    decoder = compiled(base)
    broken = random_adapter(base, 2, rank=17)
    for target in broken.adapter.targets:
        broken.adapter.b(target.path).fill_(torch.nan)
    broken = type(broken)(broken.adapter, torch.bfloat16)
    adapters = [None, broken, random_adapter(base, 3, rank=64), random_adapter(base, 4, rank=3)]
    rng = np.random.default_rng(1)
    lengths = (3, 1, 2, 5)
    prompts = [rng.integers(0, base.vocab_size, n).astype(np.int32) for n in lengths]
    together = prefill(decoder, prompts, adapters).split(lengths)
    for prompt, adapter, logits in zip(prompts, adapters, together, strict=True):
        assert bool(logits.isfinite().all()) == (adapter is not broken)
        assert torch.equal(prefill(decoder, [prompt], [adapter]).isnan(), logits.isnan())
        if adapter is not broken:
            assert torch.equal(prefill(decoder, [prompt], [adapter]), logits)


@pytest.mark.parametrize("length", [1, 6, 70])
def test_trainer_and_decoder_compute_the_same_bits(tmp_path: Path, length: int) -> None:
    base = load(tmp_path, rounded=False, dtype=torch.bfloat16)
    decoder = compiled(base)
    stacked = random_adapter(base, 1, rank=5)
    prompt = np.random.default_rng(length).integers(0, base.vocab_size, length).astype(np.int32)
    row = KvCache(decoder.cache_shape, 2**22).allocate(length)
    hidden = decoder.forward(Batch(chunks=[Chunk(prompt, 0, row, stacked)]))
    with torch.no_grad():
        _, tape = base.transformer.forward(
            stacked.adapter, torch.from_numpy(prompt).long(), [length], keep_blocks=0
        )
    assert torch.equal(tape.inputs[-1], hidden)
