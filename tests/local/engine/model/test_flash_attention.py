"""Attention on torch's flash kernels against the formulas, on the CPU's kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import bias
from torch.nn.attention.bias import causal_upper_left

from tests.local.engine.training_data import FORMATS, random_datum, set_random_b
from tests.tiny_models import tiny_model
from tinker_cookbook.local.engine.model import attention
from tinker_cookbook.local.engine.model import flash_attention as flash_module
from tinker_cookbook.local.engine.model.architecture import read_arch
from tinker_cookbook.local.engine.model.attention import attention_backward, attention_forward
from tinker_cookbook.local.engine.model.base_model import NativeModel, load_base_model
from tinker_cookbook.local.engine.model.flash_attention import (
    flash_attention,
    flash_attention_backward,
    runs_flash,
    segment_bounds,
)
from tinker_cookbook.local.engine.model.gradients import GradientSink
from tinker_cookbook.local.engine.model.lora import Adapter
from tinker_cookbook.local.engine.model.transformer import PackedTransformer
from tinker_cookbook.local.engine.model.weights import describe_weights
from tinker_cookbook.local.engine.training.run import TrainingRun
from tinker_cookbook.local.engine.types import LoraSpec, LossSpec, TrainResult

CPU = torch.device("cpu")
SHAPES = [
    # key heads, query heads of each, head size, lengths
    (1, 1, 8, (1,)),
    (2, 3, 64, (5, 33, 1)),
    (1, 8, 16, (40, 257)),
    (2, 2, 128, (300, 7)),
]


def by_heads(values: torch.Tensor, group: int) -> torch.Tensor:
    """From [T, K G, D] to [K, T G, D], the layout of the formulas."""
    return values.unflatten(1, (-1, group)).transpose(0, 1).flatten(1, 2).contiguous()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("kv_heads", "group", "dim", "lengths"), SHAPES)
def test_values_and_gradients(
    kv_heads: int,
    group: int,
    dim: int,
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_kernels", lambda: None)  # the formulas, in torch
    torch.manual_seed(0)
    heads = (kv_heads * group, kv_heads, kv_heads, kv_heads * group)
    drawn = [torch.randn(sum(lengths), count, dim).to(dtype) for count in heads]
    q, k, v, grad = drawn[0] * dim**-0.5, *drawn[1:]
    groups = (group, 1, 1)
    wide_q, wide_k, wide_v = (
        by_heads(t.float(), g) for t, g in zip((q, k, v), groups, strict=True)
    )
    expected, lse = attention_forward(wide_q, wide_k, wide_v, lengths)
    wide_grad = by_heads(grad.float(), group)
    expected_grads = attention_backward(
        *(wide_grad, wide_q, wide_k, wide_v, expected, lse), lengths=lengths
    )

    with torch.no_grad():  # as in training
        out, q, k, v = flash_attention(q, k, v, segment_bounds(lengths, q.device))
        found = flash_attention_backward(grad, q, k, v, out)
    pairs = [(out, expected, group), *zip(found, expected_grads, groups, strict=True)]
    for ours, theirs, count in pairs:
        assert ours.dtype == dtype
        error = (by_heads(ours.detach().float(), count) - theirs).norm()
        assert error < tolerance * theirs.norm().clamp(min=1)


def train(
    architecture: str, dtype: torch.dtype, *, flash: bool
) -> tuple[TrainResult, torch.Tensor]:
    """Return the result and the gradient of a pass, half of whose blocks are computed again."""
    model = load_base_model(tiny_model(architecture), dtype=dtype, compiled=False)
    assert isinstance(model, NativeModel)
    model.transformer = PackedTransformer(model.arch, model.weights, flash=flash)
    rng = np.random.default_rng(0)
    data = [random_datum(rng, length, model.vocab_size) for length in (7, 150, 40)]
    size, num_blocks = model.transformer.activation_bytes(197, 4), model.arch.num_layers
    model.activation_bytes = num_blocks * size.least + (size.full - size.least)
    run = TrainingRun(model, LoraSpec(rank=4, seed=1))
    set_random_b(run.adapter)
    result = run.forward_backward(data, LossSpec("cross_entropy"))
    assert run.gradient is not None
    return result, run.gradient


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_model_trains_alike_on_both(architecture: str, dtype: torch.dtype) -> None:
    expected, gradient = train(architecture, dtype, flash=False)
    found, flash_gradient = train(architecture, dtype, flash=True)
    # in bfloat16, logits around 16 are multiples of 1 / 16
    difference = np.concatenate(found.logprobs) - np.concatenate(expected.logprobs)
    error = float((flash_gradient - gradient).norm() / gradient.norm())
    wide = dtype == torch.float32
    assert np.abs(difference).mean() < (1e-5 if wide else 0.05)
    assert error < (1e-4 if wide else 0.05)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (4, 2)])
def test_the_trial_before_first_use_passes(num_heads: int, num_kv_heads: int) -> None:
    sizes = num_heads, num_kv_heads, 16
    assert flash_module._computes_a_shared_prefix(CPU, torch.float32, *sizes)


def test_the_trial_finds_kernels_that_count_from_the_first_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bias, "causal_lower_right", causal_upper_left)
    assert not flash_module._computes_a_shared_prefix(CPU, torch.float32, 2, 1, 16)


def test_a_processor_keeps_its_own_attention() -> None:
    assert not runs_flash(torch.device("cpu"), torch.bfloat16, 4, 2, 64)


@pytest.mark.parametrize("flash", [False, True])
def test_a_pass_waits_for_no_number(flash: bool) -> None:
    """Tensors without memory: reading one on the processor, as `item` does, is an error."""
    arch = read_arch(tiny_model("qwen3"))
    assert arch is not None
    weights = describe_weights(arch, stored_dtype=torch.bfloat16, dtype=torch.bfloat16)
    model, spec = NativeModel(arch, weights), LoraSpec(rank=4, seed=0)
    transformer = PackedTransformer(arch, weights, flash=flash)
    adapter = Adapter(spec, model.lora_targets(spec), device="meta")
    sink = GradientSink(adapter.layout, torch.zeros_like(adapter.parameters))
    tokens = torch.zeros(20, 1, dtype=torch.int64, device="meta")
    with torch.no_grad():
        hidden, tape = transformer.forward(adapter, tokens[:, 0], [12, 8], keep_blocks=1)
        _, grad = model.head.logprobs_and_gradient(
            adapter, hidden, tokens, lambda _, logprobs: logprobs, sink
        )
        transformer.backward(adapter, tape, grad, sink)
    assert not tape.kept
