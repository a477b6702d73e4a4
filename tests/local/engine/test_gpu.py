"""A GPU computes what the CPU does. Run on a machine with one: `pytest -m gpu`."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest
import torch

from tests.local.engine.training_data import random_datum, set_random_b
from tests.tiny_models import tiny_model
from tinker_cookbook.local.engine.model.base_model import NativeModel, load_base_model
from tinker_cookbook.local.engine.sampling.kv_cache import KvCache
from tinker_cookbook.local.engine.sampling.scheduler import Scheduler
from tinker_cookbook.local.engine.sampling.sequence import Request
from tinker_cookbook.local.engine.sampling.stops import StopRule
from tinker_cookbook.local.engine.sampling.torch_decoder import TorchDecoder
from tinker_cookbook.local.engine.training.run import TrainingRun
from tinker_cookbook.local.engine.types import (
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


def train(architecture: str, device: str) -> tuple[TrainResult, torch.Tensor]:
    """Return the result and the gradient of one pass over sequences of different lengths."""
    model = load_base_model(tiny_model(architecture), device=device, dtype=torch.float32)
    run = TrainingRun(model, LoraSpec(rank=4, seed=1))
    set_random_b(run.adapter)
    rng = np.random.default_rng(0)
    data = [random_datum(rng, length, model.vocab_size) for length in (7, 150, 40)]
    result = run.forward_backward(data, LossSpec("cross_entropy"))
    assert run.gradient is not None
    return result, run.gradient.cpu()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_logprobs_and_gradients_equal_those_of_the_cpu(architecture: str) -> None:
    (expected, gradient), (result, on_gpu) = train(architecture, "cpu"), train(architecture, "cuda")
    for ours, theirs in zip(result.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-3)
    assert float((on_gpu - gradient).norm() / gradient.norm()) < 1e-2


def sample(architecture: str, device: str) -> list[SampledSequence]:
    """Return greedy completions of three prompts that decode together."""
    base = load_base_model(
        tiny_model(architecture), device=device, dtype=torch.float32, compiled=False
    )
    assert isinstance(base, NativeModel)
    decoder = TorchDecoder(base.arch, base.weights)
    scheduler = Scheduler(decoder, KvCache(decoder.cache_shape, 2**24))
    rng = np.random.default_rng(0)
    requests = []
    for length in (5, 70, 33):
        spec = SampleSpec(rng.integers(3, 100, length), max_tokens=12, temperature=0.0, stop=[])
        requests.append(Request(spec, None, Future(), StopRule(frozenset()), 12))
        scheduler.add(requests[-1])
    while scheduler.has_work:
        scheduler.step()
    return [request.future.result(timeout=0).sequences[0] for request in requests]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_completions_equal_those_of_the_cpu(architecture: str) -> None:
    pairs = zip(sample(architecture, "cuda"), sample(architecture, "cpu"), strict=True)
    for ours, theirs in pairs:
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-3)
