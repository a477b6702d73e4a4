"""The compiled kernels alone, on every shape of tile, format and mix of adapters."""

# pyright: reportArgumentType=false

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.local.engine.sampling_models import random_adapter
from tests.local.engine.training_data import FORMATS
from tinker_cookbook.local.engine.model.architecture import read_arch
from tinker_cookbook.local.engine.model.base_model import NativeModel, load_base_model
from tinker_cookbook.local.engine.model.weights import BLOCKS, FUSED, module_shapes
from tinker_cookbook.local.engine.sampling.adapters import StackedLora
from tinker_cookbook.local.engine.sampling.batch import Batch, Chunk
from tinker_cookbook.local.engine.sampling.kv_cache import KvCache
from tinker_cookbook.local.engine.sampling.native_decoder import NativeDecoder, native_decoder
from tinker_cookbook.local.engine.sampling.torch_decoder import TorchDecoder

TOLERANCE = 2e-4


CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 101,
    "hidden_size": 44,
    "intermediate_size": 75,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
"""No size is a multiple of a vector or of a panel, and 5 heads share a key head."""


def load(
    folder: Path, *, rounded: bool, dtype: torch.dtype = torch.float32, **changes: int
) -> NativeModel:
    """A model whose weights are bfloat16 numbers, or are not; `changes` are to its shape."""
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    arch = read_arch(folder)
    assert arch is not None
    generator = torch.Generator().manual_seed(7)

    def draw(*size: int) -> torch.Tensor:
        values = torch.randn(size, generator=generator) * size[-1] ** -0.5
        return values.bfloat16() if rounded else values

    shapes = {"embed_tokens": (101, 44), "norm": (44,)}
    for index in range(arch.num_layers):
        for key, modules in FUSED.items():
            for module in modules:
                name = f"layers.{index}.{BLOCKS[key]}.{module}"
                shapes[name] = module_shapes(arch)[module]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"layers.{index}.{norm}"] = (44,)
        for norm in ("q_norm", "k_norm"):
            shapes[f"layers.{index}.self_attn.{norm}"] = (arch.head_dim,)
    tensors = {f"model.{name}.weight": draw(*size) for name, size in shapes.items()}
    tensors["lm_head.weight"] = draw(101, 44)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return native_model(folder, dtype=dtype)


def native_model(
    folder: Path, *, compiled: bool = True, dtype: torch.dtype = torch.float32
) -> NativeModel:
    base = load_base_model(folder, dtype=dtype, compiled=compiled)
    assert isinstance(base, NativeModel)
    return base


def compiled(base: NativeModel) -> NativeDecoder:
    decoder = native_decoder(base.arch, base.weights)
    if decoder is None:
        pytest.skip("no C compiler here")
    return decoder


def prefill(decoder, prompts: list[np.ndarray], adapters: list[StackedLora | None]) -> torch.Tensor:
    """Logits [N, V] of whole prompts in one batch."""
    cache = KvCache(decoder.cache_shape, 64 * 2**20)
    chunks = [
        Chunk(prompt, 0, cache.allocate(len(prompt)), adapter)
        for prompt, adapter in zip(prompts, adapters, strict=True)
    ]
    hidden = decoder.forward(Batch(chunks=chunks))
    spans = [(adapter, len(prompt)) for adapter, prompt in zip(adapters, prompts, strict=True)]
    return decoder.logits(hidden, spans)


def assert_chunks_have_the_bits_of_the_whole(
    decoder: NativeDecoder, prompt: np.ndarray, adapter: StackedLora | None, sizes: tuple[int, ...]
) -> None:
    """Compute a prompt in chunks of these sizes, and at once."""
    whole = prefill(decoder, [prompt], [adapter])
    cache = KvCache(decoder.cache_shape, 2**22)
    row, start = cache.allocate(len(prompt)), 0
    for size in sizes:
        chunk = Chunk(prompt[start : start + size], start, row, adapter)
        hidden = decoder.forward(Batch(chunks=[chunk]))
        logits = decoder.logits(hidden, [(adapter, size)])
        assert torch.equal(logits, whole[start : start + size])
        start += size
    assert start == len(prompt)


@pytest.mark.parametrize("rounded", [True, False])
def test_every_number_of_tokens_gives_the_logits_of_torch(tmp_path: Path, rounded: bool) -> None:
    base = load(tmp_path, rounded=rounded)
    decoder, dense = compiled(base), native_model(tmp_path, compiled=False)
    reference = TorchDecoder(dense.arch, dense.weights)
    adapter = random_adapter(base, 1, rank=5, train_unembed=True)
    rng = np.random.default_rng(0)
    for length in (*range(1, 15), 40):
        prompt = rng.integers(0, base.vocab_size, length).astype(np.int32)
        logits = prefill(decoder, [prompt], [adapter])
        expected = prefill(reference, [prompt], [adapter])
        assert (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_prompts_in_chunks_of_any_size_attend_alike(
    tmp_path: Path, head_dim: int, kv_heads: int, dtype: torch.dtype
) -> None:
    base = load(
        tmp_path,
        rounded=True,
        dtype=dtype,
        head_dim=head_dim,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
    )
    decoder, dense = compiled(base), native_model(tmp_path, compiled=False)
    prompt = np.random.default_rng(2).integers(0, base.vocab_size, 150).astype(np.int32)
    expected = prefill(TorchDecoder(dense.arch, dense.weights), [prompt], [None])
    whole = prefill(decoder, [prompt], [None])
    tolerance = TOLERANCE if dtype == torch.float32 else 0.2  # of 8 bits, on logits of up to 4
    assert (whole - expected).abs().max() < tolerance
    cache = KvCache(decoder.cache_shape, 64 * 2**20)
    row, start, states = cache.allocate(len(prompt)), 0, []
    for size in (1, 2, 3, 5, 7, 66, 1, 65):
        chunk = Chunk(prompt[start : start + size], start, row, None)
        states.append(decoder.forward(Batch(chunks=[chunk])))
        start += size
    assert start == len(prompt)
    assert torch.equal(decoder.logits(torch.cat(states), [(None, len(prompt))]), whole)


@pytest.mark.parametrize(
    ("rounded", "dtype"),
    [(True, torch.float32), (False, torch.float32), (True, torch.bfloat16)],
    ids=str,
)
def test_tokens_of_different_adapters_in_a_tile_are_bit_for_bit_those_alone(
    tmp_path: Path, rounded: bool, dtype: torch.dtype
) -> None:
    base = load(tmp_path, rounded=rounded, dtype=dtype)
    decoder = compiled(base)
    adapters = [
        None,
        random_adapter(base, 1, rank=3),
        random_adapter(base, 2, rank=17),
        random_adapter(base, 3, rank=8, train_mlp=False, train_unembed=True),
        random_adapter(base, 4, rank=8, train_attn=False),
        None,
    ]
    rng = np.random.default_rng(1)
    lengths = (3, 1, 2, 5, 1, 9)
    prompts = [rng.integers(0, base.vocab_size, n).astype(np.int32) for n in lengths]
    together = prefill(decoder, prompts, adapters).split(lengths)
    for prompt, adapter, logits in zip(prompts, adapters, together, strict=True):
        assert torch.equal(prefill(decoder, [prompt], [adapter]), logits)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_prompt_that_is_not_kept_has_the_bits_of_one_that_is(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Its keys and values are in temporary memory, those of its prefix in a row."""
    base = load(tmp_path, rounded=True, dtype=dtype)
    decoder = compiled(base)
    cache = KvCache(decoder.cache_shape, 64 * 2**20)
    prompt = np.arange(3, 34, dtype=np.int32)
    kept = cache.allocate(len(prompt))
    expected = decoder.forward(Batch(chunks=[Chunk(prompt, 0, kept, None)]))
    apart = [Chunk(prompt, 0, None, None), Chunk(prompt[20:], 20, None, None, prefix=kept)]
    whole, ending = decoder.forward(Batch(chunks=apart)).split([len(prompt), 11])
    assert torch.equal(whole, expected)
    assert torch.equal(ending, expected[20:])


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_sequences_that_begin_the_same_read_it_from_one_place(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    base = load(tmp_path, rounded=True, dtype=dtype)
    decoder = compiled(base)
    cache = KvCache(decoder.cache_shape, 64 * 2**20)
    prompt = np.arange(3, 14, dtype=np.int32)
    rows = [cache.allocate(length) for length in (20, 20, 200)]
    decoder.forward(Batch(chunks=[Chunk(prompt, 0, row, None) for row in rows]))
    for row in rows:
        assert row is not None
        row.pool.activate(row)
    batch = Batch(
        decode_tokens=[5, 6, 7],
        decode_positions=[len(prompt)] * 3,
        decode_adapters=[None] * 3,
        decode_rows=rows,
    )
    apart = decoder.forward(batch)
    for row in rows[1:]:
        assert row is not None
        row.pool.kv[:, row.index, ..., : len(prompt) // 4 * 4, :] = torch.nan
    batch.decode_same = [(0, 0), (0, len(prompt)), (0, len(prompt))]
    assert torch.equal(decoder.forward(batch), apart)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_steps_whose_call_is_kept_have_the_bits_of_separate_calls(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """The call is made again when rows move, adapters change or scratch memory is replaced."""
    base = load(tmp_path, rounded=True, dtype=dtype)
    decoder = compiled(base)
    caches = [KvCache(decoder.cache_shape, 64 * 2**20) for _ in range(2)]
    rows = [[cache.allocate(length) for length in (40, 40, 200)] for cache in caches]
    prompt = np.arange(3, 14, dtype=np.int32)
    for own in rows:
        decoder.forward(Batch(chunks=[Chunk(prompt, 0, row, None) for row in own]))
    adapters = [random_adapter(base, 1, rank=3), None, random_adapter(base, 2, rank=9)]

    def step(position: int) -> None:
        tokens = [position + number for number in range(len(adapters))]
        positions = [position] * len(adapters)
        once, kept = (Batch(tokens, positions, adapters, decode_rows=own) for own in rows)
        expected = decoder.logits(decoder.forward(once), once.adapters())
        assert torch.equal(decoder.next_logits(kept), expected)

    for position in (11, 12, 13):
        step(position)
    adapters[1] = adapters[2]
    step(14)
    long = np.arange(90, dtype=np.int32)
    decoder.logits(decoder.forward(Batch(chunks=[Chunk(long, 0, None, adapters[0])])), [(None, 90)])
    for position in (15, 16):
        step(position)
    for cache, own in zip(caches, rows, strict=True):
        cache.free(own.pop(0))  # the other row of this pool moves
    adapters.pop(0)
    for position in (17, 18):
        step(position)


def test_keys_and_values_take_half_the_memory_in_bfloat16(tmp_path: Path) -> None:
    sizes = []
    for dtype in FORMATS:
        decoder = compiled(load(tmp_path, rounded=True, dtype=dtype))
        row = KvCache(decoder.cache_shape, 64 * 2**20).allocate(100)
        assert row is not None
        sizes.append(row.pool.kv.nbytes)
    assert sizes[0] == 2 * sizes[1]


def test_weights_that_are_bfloat16_numbers_are_kept_in_half_the_memory(tmp_path: Path) -> None:
    sizes = []
    for rounded in (True, False):
        folder = tmp_path / str(rounded)
        folder.mkdir()
        base = load(folder, rounded=rounded)
        compiled(base)
        sizes.append(base.weights.matrix_bytes())
    assert 2 * sizes[0] == sizes[1]


@pytest.mark.parametrize("length", [1, 6, 70])
def test_trainer_and_decoder_compute_the_same_bits_in_bfloat16(tmp_path: Path, length: int) -> None:
    base = load(tmp_path, rounded=False, dtype=torch.bfloat16)
    decoder = compiled(base)
    stacked = random_adapter(base, 1, rank=5)
    prompts = [
        np.random.default_rng(seed).integers(0, base.vocab_size, size).astype(np.int32)
        for seed, size in enumerate((length, 9))
    ]
    cache = KvCache(decoder.cache_shape, 64 * 2**20)
    chunks = [Chunk(prompt, 0, cache.allocate(len(prompt)), stacked) for prompt in prompts]
    hidden = decoder.forward(Batch(chunks=chunks))
    tokens = torch.from_numpy(np.concatenate(prompts)).long()
    with torch.no_grad():
        _, tape = base.transformer.forward(
            stacked.adapter, tokens, [len(prompt) for prompt in prompts], keep_blocks=0
        )
    assert torch.equal(tape.inputs[-1], hidden)
