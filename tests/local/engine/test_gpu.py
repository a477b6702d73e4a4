"""A GPU computes what the CPU does. Run on a machine with one: `pytest -m gpu`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.local.engine.sampling_models import ON_TORCH, Sampled, random_adapter, sampled
from tests.local.engine.training_data import random_datum, set_random_b
from tests.tiny_models import tiny_model
from tinker_cookbook.local.engine.model import attention
from tinker_cookbook.local.engine.model.attention import attention_backward, attention_forward
from tinker_cookbook.local.engine.model.base_model import NativeModel, load_base_model
from tinker_cookbook.local.engine.model.flash_attention import (
    flash_attention,
    flash_attention_backward,
    runs_flash,
    segment_bounds,
)
from tinker_cookbook.local.engine.model.transformer import PackedTransformer
from tinker_cookbook.local.engine.sampling.adapters import StackedLora
from tinker_cookbook.local.engine.sampling.kv_cache import KvCache
from tinker_cookbook.local.engine.sampling.limits import SchedulerLimits
from tinker_cookbook.local.engine.sampling.logits import SamplingParams, draw_tokens
from tinker_cookbook.local.engine.sampling.scheduler import Scheduler
from tinker_cookbook.local.engine.sampling.static_decoder import StaticDecoder
from tinker_cookbook.local.engine.training.run import TrainingRun
from tinker_cookbook.local.engine.types import (
    AdamSpec,
    LoraSpec,
    LossSpec,
    SampledSequence,
    SampleSpec,
    TrainResult,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
ARCHITECTURES = ["llama", "qwen2", "qwen3"]
CUDA = torch.device("cuda")


def train(
    architecture: str,
    device: str,
    dtype: torch.dtype = torch.float32,
    *,
    flash: bool | None = None,
) -> tuple[TrainResult, torch.Tensor]:
    """Return the result and the gradient of one pass over sequences of different lengths."""
    model = load_base_model(tiny_model(architecture), device=device, dtype=dtype, compiled=False)
    assert isinstance(model, NativeModel)
    model.transformer = PackedTransformer(model.arch, model.weights, flash=flash)
    run = TrainingRun(model, LoraSpec(rank=4, seed=1))
    set_random_b(run.adapter)
    rng = np.random.default_rng(0)
    data = [random_datum(rng, length, model.vocab_size) for length in (7, 150, 40)]
    result = run.forward_backward(data, LossSpec("cross_entropy"))
    assert run.gradient is not None
    return result, run.gradient.cpu()


def compare(
    found: tuple[TrainResult, torch.Tensor], expected: tuple[TrainResult, torch.Tensor]
) -> tuple[float, float]:
    """Return the mean difference of logprobs and the relative one of gradients."""
    logprobs = [np.concatenate(result.logprobs) for result, _ in (found, expected)]
    error = (found[1] - expected[1]).norm() / expected[1].norm()
    return float(np.abs(logprobs[0] - logprobs[1]).mean()), float(error)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_and_gradients_equal_those_of_the_cpu(architecture: str) -> None:
    logprobs, gradient = compare(train(architecture, "cuda"), train(architecture, "cpu"))
    assert logprobs < 1e-4
    assert gradient < 1e-3


@pytest.mark.parametrize("flash", [False, None])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_stays_near_float32_with_both_kinds_of_attention(
    architecture: str, flash: bool | None
) -> None:
    found = train(architecture, "cuda", torch.bfloat16, flash=flash)
    logprobs, gradient = compare(found, train(architecture, "cpu"))
    assert logprobs < 0.08
    assert gradient < 0.08


def losses(device: str, dtype: torch.dtype, folder: Path) -> list[float]:
    """Return the losses of five Adam steps; before the last two, the run is saved and loaded."""
    model = load_base_model(tiny_model("qwen3"), device=device, dtype=dtype, compiled=False)
    run = TrainingRun(model, LoraSpec(rank=4, seed=1))
    rng = np.random.default_rng(0)
    data = [random_datum(rng, length, model.vocab_size) for length in (30, 90)]
    found = []
    for step in range(5):
        if step == 3:
            folder.mkdir()
            run.save(folder, base_model_name="tiny", with_optimizer=True)
            run = TrainingRun.from_folder(model, folder, with_optimizer=True)
        found.append(run.forward_backward(data, LossSpec("cross_entropy")).metrics["loss:sum"])
        run.optim_step(AdamSpec(learning_rate=1e-2))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_steps_follow_those_of_the_cpu(dtype: torch.dtype, tmp_path: Path) -> None:
    expected = losses("cpu", torch.float32, tmp_path / "cpu")
    found = losses("cuda", dtype, tmp_path / "gpu")
    drop = abs(expected[-1] - expected[0])
    assert abs(found[-1] - expected[-1]) < (0.01 if dtype == torch.float32 else 0.1) * drop


def by_heads(values: torch.Tensor, group: int) -> torch.Tensor:
    """From [T, K G, D] to [K, T G, D] in float32 on the CPU, for the formulas."""
    return values.float().cpu().unflatten(1, (-1, group)).transpose(0, 1).flatten(1, 2)


@pytest.mark.parametrize(
    ("kv_heads", "group", "dim", "lengths", "shared"),
    [
        (1, 1, 64, (1,), (0,)),
        (2, 3, 64, (5, 133, 1), (0, 0, 0)),
        (8, 2, 128, (300, 7, 1100), (0, 0, 0)),
        (8, 2, 128, (300, 290, 1100), (0, 200, 250)),  # sequences that share a prefix
        (1, 8, 80, (40, 257), (0, 0)),
    ],
)
def test_flash_kernels_compute_the_formulas(
    kv_heads: int,
    group: int,
    dim: int,
    lengths: tuple[int, ...],
    shared: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("flash kernels need an Ampere GPU or a newer one")
    assert runs_flash(CUDA, torch.bfloat16, kv_heads * group, kv_heads, dim)
    monkeypatch.setattr(attention, "_kernels", lambda: None)
    torch.manual_seed(0)
    heads = (kv_heads * group, kv_heads, kv_heads, kv_heads * group)
    keys, queries = sum(lengths), sum(lengths) - sum(shared)
    drawn = [
        torch.randn(size, n, dim, device=CUDA, dtype=torch.bfloat16)
        for n, size in zip(heads, (queries, keys, keys, queries), strict=True)
    ]
    q, k, v, grad = drawn[0] * dim**-0.5, *drawn[1:]
    exact = by_heads(q, group), by_heads(k, 1), by_heads(v, 1)
    expected, lse = attention_forward(*exact, lengths, shared)
    q_grad, k_grad, v_grad = attention_backward(
        by_heads(grad, group), *exact, expected, lse, lengths, shared
    )
    with torch.no_grad():
        out, q, k, v = flash_attention(q, k, v, segment_bounds(lengths, CUDA, shared))
        found = flash_attention_backward(grad, q, k, v, out)
    pairs = [(out, expected, group), (found[0], q_grad, group)]
    pairs += [(found[1], k_grad, 1), (found[2], v_grad, 1)]
    for ours, theirs, count in pairs:
        assert (by_heads(ours.detach(), count) - theirs).norm() < 0.02 * theirs.norm().clamp(min=1)


def spec_of(length: int, max_tokens: int) -> SampleSpec:
    prompt = np.random.default_rng(length).integers(3, 320, size=length).astype(np.int32)
    return SampleSpec(prompt, max_tokens=max_tokens, temperature=1.0, seed=length, stop=[])


def serve(model: Sampled, chosen: list[int], adapters: list[StackedLora]) -> list[SampledSequence]:
    """Serve one request for each number of an adapter (-1: the base), of different lengths."""
    requests = [
        model.start(spec_of(4 + n, 90 + 3 * n), None if number < 0 else adapters[number])
        for n, number in enumerate(chosen)
    ]
    return [result.sequences[0] for result in model.run(*requests)]


def on_gpu(decoder: str, *, graphs: bool = True, dtype: torch.dtype = torch.float32) -> Sampled:
    """A model on the GPU; `decoder` is a key of `ON_TORCH`."""
    model = sampled("qwen3", decoder, device="cuda", dtype=dtype)
    if decoder == "static" and not graphs:
        chosen = StaticDecoder(model.base.arch, model.base.weights, graphs=False)
        model.scheduler = Scheduler(chosen, model.cache, SchedulerLimits())
    return model


def adapters_of(model: Sampled) -> list[StackedLora]:
    return [random_adapter(model.base, seed, rank=2 * seed) for seed in range(1, 5)]


def assert_alike(
    found: list[SampledSequence], expected: list[SampledSequence], tolerance: float
) -> None:
    """Compare sequences. Sums in another order may turn a draw: a tenth of them may differ."""
    pairs = list(zip(found, expected, strict=True))
    same = [(a, b) for a, b in pairs if a.tokens.tolist() == b.tokens.tolist()]
    assert len(same) >= 0.9 * len(pairs)
    for ours, theirs in same:
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=tolerance)


@pytest.mark.parametrize("decoder", ON_TORCH)
def test_thirty_two_sequences_equal_those_of_the_cpu(decoder: str) -> None:
    chosen = [n % 5 - 1 for n in range(32)]  # the base and four adapters
    expected_model, model = sampled("qwen3", "torch"), on_gpu(decoder)
    expected = serve(expected_model, chosen, adapters_of(expected_model))
    assert_alike(serve(model, chosen, adapters_of(model)), expected, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 5, 32])
def test_recorded_steps_give_the_tokens_of_the_others(count: int, dtype: torch.dtype) -> None:
    chosen = [n % 5 - 1 for n in range(count)]
    results = []
    for graphs in (True, False):
        model = on_gpu("static", graphs=graphs, dtype=dtype)
        results.append(serve(model, chosen, adapters_of(model)))
        decoder = model.scheduler._decoder
        assert isinstance(decoder, StaticDecoder)
        assert (decoder.num_graphs > 0) == graphs
    assert_alike(*results, tolerance=1e-6)


def test_records_see_new_weights_and_memory_that_has_moved() -> None:
    model, reference = on_gpu("static"), on_gpu("torch")
    for round_number in range(6):
        # the rank grows: the bank moves; then a run with a high rank moves the base's matrices
        rank, seed = (4, 4, 8, 8, 8, 8)[round_number], round_number + 1
        found, expected = (
            serve(m, [0, -1, 0], [random_adapter(m.base, seed, rank=rank)])
            for m in (model, reference)
        )
        assert_alike(found, expected, 1e-3)
        if round_number == 3:
            run = TrainingRun(model.base, LoraSpec(rank=64, seed=1))
            data = [random_datum(np.random.default_rng(0), 40, model.base.vocab_size)]
            run.forward_backward(data, LossSpec("cross_entropy"))


def test_a_cache_that_is_freed_and_allocated_again_is_read_where_it_is() -> None:
    model = on_gpu("static")
    expected = [serve(on_gpu("torch"), [-1] * count, []) for count in (3, 20, 3)]
    kept = []
    for count, answers in zip((3, 20, 3), expected, strict=True):
        assert_alike(serve(model, [-1] * count, []), answers, 1e-3)
        kept.append(KvCache(model.cache.shape, 2**20).shape.rows(2, 256))  # takes freed memory


def test_draws_equal_those_of_the_cpu() -> None:
    logits = torch.randn(6, 5000) * 3
    params = SamplingParams(
        np.array([1.0, 0.0, 0.7, 1.0, 1.0, 1.3]),
        np.array([-1, -1, -1, 20, -1, -1]),
        np.array([1.0, 1.0, 1.0, 1.0, 0.8, 1.0]),
    )
    uniforms = np.linspace(0.03, 0.97, 6)
    expected = draw_tokens(logits, params, uniforms)
    found = draw_tokens(logits.cuda(), params, uniforms)
    assert found.tokens_N.tolist() == expected.tokens_N.tolist()
    np.testing.assert_allclose(found.logprobs_N, expected.logprobs_N, atol=1e-5)


def test_prompts_in_chunks_and_their_scores_equal_those_of_the_cpu() -> None:
    answers = []
    for device in ("cpu", "cuda"):
        limits = SchedulerLimits(max_batch_tokens=24)
        model = sampled("qwen3", "static", device=device, limits=limits)
        asked = {"prompt_logprobs": True, "topk_prompt_logprobs": 3, "temperature": 0.0}
        specs = [replace(spec_of(length, 8), **asked) for length in (60, 61, 5)]
        answers.append(model.sample(*specs))
    for ours, theirs in zip(*answers, strict=True):
        assert ours.sequences[0].tokens.tolist() == theirs.sequences[0].tokens.tolist()
        assert ours.prompt_logprobs is not None
        assert theirs.prompt_logprobs is not None
        np.testing.assert_allclose(ours.prompt_logprobs, theirs.prompt_logprobs, atol=1e-3)
        assert ours.topk_prompt_logprobs is not None
