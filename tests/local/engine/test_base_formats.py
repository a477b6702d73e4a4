"""Models with base weights in 8 or 4 bits: the same bits as a model of the rounded weights."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.foreign_models import foreign_model
from tests.local.engine.sampling_models import random_adapter
from tests.local.engine.test_native import compiled, load, prefill
from tests.local.engine.training_data import FORMATS, random_datum
from tests.tiny_models import tiny_model
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.local.engine.host import EngineHost
from tinker_cookbook.local.engine.model.architecture import read_arch
from tinker_cookbook.local.engine.model.base_model import (
    NativeModel,
    describe_native_model,
    load_base_model,
)
from tinker_cookbook.local.engine.model.number_formats import base_format_from_environment
from tinker_cookbook.local.engine.model.packed_matrix import MatrixBlocks, PackedMatrix
from tinker_cookbook.local.engine.model.quantised import QuantisedBlocks, round_to_bits
from tinker_cookbook.local.engine.model.weights import load_weights
from tinker_cookbook.local.engine.native.build import load_kernels, load_kernels_for
from tinker_cookbook.local.engine.native.instructions import available_sets
from tinker_cookbook.local.engine.native.products import Products
from tinker_cookbook.local.engine.sampling.batch import Batch, Chunk
from tinker_cookbook.local.engine.sampling.kv_cache import KvCache
from tinker_cookbook.local.engine.sampling.native_decoder import NativeDecoder
from tinker_cookbook.local.engine.settings import EngineSettings
from tinker_cookbook.local.engine.training.run import TrainingRun
from tinker_cookbook.local.engine.types import AdamSpec, LoraSpec, LossSpec
from tinker_cookbook.local.errors import UserError

QUANTISED = {"int8": 8, "int4": 4}
formats = pytest.mark.parametrize("base_format", QUANTISED)


def quantised(folder: Path, base_format: str, dtype: torch.dtype, **options) -> NativeModel:
    base = load_base_model(folder, dtype=dtype, base_format=base_format, **options)
    assert isinstance(base, NativeModel)
    return base


def round_files(folder: Path, bits: int) -> None:
    """Replace the matrices of a model by their rounded weights."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "proj" in name or name == "lm_head.weight":
            tensors[name] = round_to_bits(tensor, 8 if "head" in name else bits)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@formats
def test_logits_have_the_bits_of_the_rounded_weights(
    tmp_path: Path, base_format: str, dtype: torch.dtype
) -> None:
    load(tmp_path, rounded=True)
    base, bits = quantised(tmp_path, base_format, dtype), QUANTISED[base_format]
    adapters = [random_adapter(base, 1, rank=5, train_unembed=True), None]
    prompts = [np.arange(2, 2 + size, dtype=np.int32) for size in (11, 1)]
    found = prefill(compiled(base), prompts, adapters)

    round_files(tmp_path, bits)
    rounded = quantised(tmp_path, "full", dtype)
    assert torch.equal(found, prefill(compiled(rounded), prompts, adapters))


def decoder_with(kernels: ctypes.CDLL, folder: Path, bits: int) -> NativeDecoder:
    """Return a decoder of bfloat16 pairs on given kernels, quantised unless `bits` is 0."""
    arch, products = read_arch(folder), Products(kernels)
    assert arch is not None
    blocks = (
        QuantisedBlocks(products, bits, paired=True)
        if bits
        else MatrixBlocks(products, paired=True)
    )
    weights = load_weights(folder, arch, device="cpu", dtype=torch.float32, blocks=blocks)
    return NativeDecoder(arch, weights, kernels)


@pytest.mark.parametrize("generic", [False, True])
@formats
def test_every_number_of_tokens_multiplies_the_rounded_weights(
    tmp_path: Path, base_format: str, generic: bool
) -> None:
    """Few tokens expand the weights in their tiles, and many read an expanded copy."""
    sources = ("compact.c", "decode_kernels.c", "pair_decode.c", "products.c", "pair_products.c")
    kernels = load_kernels_for(available_sets()[0], sources) if generic else load_kernels()
    if kernels is None:
        pytest.skip("no C compiler here")
    base, bits = load(tmp_path, rounded=True), QUANTISED[base_format]
    adapter = random_adapter(base, 1, rank=5, train_unembed=True)
    quantised_decoder = decoder_with(kernels, tmp_path, bits)
    round_files(tmp_path, bits)
    rounded_decoder = decoder_with(kernels, tmp_path, 0)
    prompt = np.random.default_rng(0).integers(0, base.vocab_size, 14).astype(np.int32)
    for length in range(1, 15):
        adapter.native_table = None  # each decoder packs an adapter for its kernels
        found = prefill(quantised_decoder, [prompt[:length]], [adapter])
        expected = prefill(rounded_decoder, [prompt[:length]], [adapter])
        assert torch.equal(found, expected), length
        assert torch.equal(found[0], prefill(quantised_decoder, [prompt[:1]], [adapter])[0])


@formats
def test_trainer_and_decoder_compute_the_same_bits(tmp_path: Path, base_format: str) -> None:
    load(tmp_path, rounded=True)
    base = quantised(tmp_path, base_format, torch.bfloat16)
    decoder, stacked = compiled(base), random_adapter(base, 1, rank=5)
    prompt = np.random.default_rng(0).integers(0, base.vocab_size, 70).astype(np.int32)
    cache = KvCache(decoder.cache_shape, 64 * 2**20)
    chunks = [Chunk(prompt, 0, cache.allocate(len(prompt)), stacked)]
    hidden = decoder.forward(Batch(chunks=chunks))
    tokens = torch.from_numpy(prompt).long()
    with torch.no_grad():
        _, tape = base.transformer.forward(stacked.adapter, tokens, [len(prompt)], keep_blocks=0)
    assert torch.equal(tape.inputs[-1], hidden)


@formats
def test_without_the_kernels_the_same_weights_are_used(base_format: str) -> None:
    folder = tiny_model("llama")
    losses = []
    for use_kernels in (True, False):
        base = quantised(folder, base_format, torch.float32, compiled=use_kernels)
        run = TrainingRun(base, LoraSpec(rank=4, seed=1))
        data = [random_datum(np.random.default_rng(0), 30, base.vocab_size)]
        losses.append(run.forward_backward(data, LossSpec("cross_entropy")).metrics["loss:sum"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@formats
def test_training_lowers_the_loss(base_format: str) -> None:
    base = quantised(tiny_model("llama"), base_format, torch.bfloat16)
    run = TrainingRun(base, LoraSpec(rank=4, seed=1))
    data = [random_datum(np.random.default_rng(0), 30, base.vocab_size)]
    data[0].loss_inputs["weights"] = np.ones(30, np.float32)
    losses = []
    for _ in range(8):
        losses.append(run.forward_backward(data, LossSpec("cross_entropy")).metrics["loss:sum"])
        run.optim_step(AdamSpec(learning_rate=1e-2))
    assert losses[-1] < 0.9 * losses[0]


@formats
def test_a_plan_counts_the_memory_of_the_loaded_model(tmp_path: Path, base_format: str) -> None:
    load(tmp_path, rounded=True)
    base = quantised(tmp_path, base_format, torch.bfloat16)
    head = base.weights.head
    if not isinstance(head, PackedMatrix) or head.panel != 32:
        pytest.skip("plans assume the widest panel")
    planned = describe_native_model(
        base.arch,
        stored_dtype=torch.bfloat16,
        dtype=torch.bfloat16,
        compiled=True,
        lora_room=32,
        base_format=base_format,
    )
    assert planned.weights.num_bytes() == base.weights.num_bytes()


def test_unknown_formats_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="base_format='int3' is unknown; use one of full"):
        load_base_model(tiny_model(), base_format="int3")
    monkeypatch.setenv("TINKER_COOKBOOK_BASE_FORMAT", "int3")
    with pytest.raises(ConfigurationError, match="TINKER_COOKBOOK_BASE_FORMAT='int3' is unknown"):
        base_format_from_environment()


def test_models_that_run_through_transformers_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"base_format='int4' is not available for .* 'gpt2'"):
        load_base_model(foreign_model("gpt2"), base_format="int4")


def test_training_resumes_only_on_the_same_format(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, spec = str(tiny_model("llama")), LoraSpec(rank=4, seed=1)
    four = EngineHost(EngineSettings(device="cpu", base_format="int4"))
    full = EngineHost(EngineSettings(device="cpu"))
    four.create_run("a", name, spec)
    four.save_run("a", tmp_path, with_optimizer=True)
    assert four.model(name).info.base_format == "int4"
    assert "rounded to int4" in (tmp_path / "README.md").read_text(encoding="utf-8")

    four.create_run_from("b", tmp_path, with_optimizer=True)
    with pytest.raises(UserError, match=r"base_format='int4' and this service uses .*'full'"):
        full.create_run_from("a", tmp_path, with_optimizer=True)
    with caplog.at_level(logging.WARNING):
        full.create_run_from("a", tmp_path, with_optimizer=False)
    assert "base_format=int4 is loaded on base_format=full" in caplog.text
