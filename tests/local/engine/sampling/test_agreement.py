"""Trainer and sampler give the same weights' tokens the same logprobs, in every format.

The tolerances hold on every processor. On the compiled kernels, trainer and sampler multiply the
same rounded numbers in bfloat16, in the same order.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.local.engine.sampling_models import sampled
from tests.local.engine.training_data import FORMATS, set_random_b
from tests.tiny_models import TINY_ARCHITECTURES
from tinker_cookbook.local.engine.model.base_model import NativeModel
from tinker_cookbook.local.engine.sampling.adapters import StackedLora
from tinker_cookbook.local.engine.training.run import TrainingRun
from tinker_cookbook.local.engine.types import LoraSpec, LossSpec, SampleSpec, TrainDatum

# Mean and largest difference in nats per token. With kernels: two float32 sums in different orders;
# in bfloat16 only those over the vocabulary.
# On torch alone, bfloat16 rounds at every product of both sides, by half a percent each time.
TOLERANCE = {
    ("compiled", torch.float32): (1e-5, 2e-4),
    ("compiled", torch.bfloat16): (1e-5, 2e-4),
    ("torch", torch.float32): (1e-5, 2e-4),
    ("torch", torch.bfloat16): (3e-2, 0.5),
}
PROMPT = np.arange(5, 25, dtype=np.int32)


def _sample(architecture: str, decoder: str, dtype: torch.dtype) -> tuple[TrainingRun, list]:
    """Return a run, and data made of its samples with the sampler's logprobs."""
    tiny = sampled(architecture, decoder, dtype=dtype)
    run = TrainingRun(tiny.base, LoraSpec(rank=4, seed=1))
    set_random_b(run.adapter)
    adapter = StackedLora(run.adapter.snapshot(), dtype)
    (result,) = tiny.sample(SampleSpec(PROMPT, 6, 40, seed=2, stop=[]), adapter=adapter)
    return run, [_datum(s.tokens, s.logprobs) for s in result.sequences]


def _datum(tokens: np.ndarray, logprobs: np.ndarray) -> TrainDatum:
    whole, before = np.concatenate([PROMPT, tokens]), np.zeros(len(PROMPT) - 1, np.float32)
    advantages = np.concatenate([before, np.where(logprobs < logprobs.mean(), 1.0, -0.5)])
    return TrainDatum(
        whole[:-1].astype(np.int32),
        {
            "target_tokens": whole[1:].astype(np.int64),
            "logprobs": np.concatenate([before, logprobs]).astype(np.float32),
            "advantages": advantages.astype(np.float32),
        },
    )


def _differences(data: list[TrainDatum], logprobs: list[np.ndarray]) -> np.ndarray:
    parts = [
        ours - np.asarray(datum.loss_inputs["logprobs"])
        for datum, ours in zip(data, logprobs, strict=True)
    ]
    return np.abs(np.concatenate([part[len(PROMPT) - 1 :] for part in parts]))


def _forward_only(data: list[TrainDatum]) -> list[TrainDatum]:
    return [
        TrainDatum(
            datum.tokens,
            {
                "target_tokens": datum.loss_inputs["target_tokens"],
                "weights": np.ones(len(datum.tokens), np.float32),
            },
        )
        for datum in data
    ]


@pytest.mark.parametrize(("decoder", "dtype"), TOLERANCE, ids=str)
@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_logprobs_agree(architecture: str, decoder: str, dtype: torch.dtype) -> None:
    run, data = _sample(architecture, decoder, dtype)
    mean, largest = TOLERANCE[decoder, dtype]
    results = [
        run.forward_backward(_forward_only(data), LossSpec("cross_entropy"), backward=False),
        *(
            run.forward_backward(data, LossSpec(name), backward=backward)
            for name in ("importance_sampling", "ppo")
            for backward in (True, False)
        ),
    ]
    for result in results:
        difference = _differences(data, result.logprobs)
        assert difference.mean() < mean
        assert difference.max() < largest


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_the_gradient_in_bfloat16_follows_float32(architecture: str) -> None:
    gradients = []
    for dtype in FORMATS:
        run, data = _sample(architecture, "compiled", dtype)
        _, data = (run, data) if dtype == torch.float32 else (run, gradients[0][1])
        run.forward_backward(data, LossSpec("importance_sampling"))
        assert run.gradient is not None
        gradients.append((run.gradient, data))
    exact, rounded = gradients[0][0], gradients[1][0]
    # Rounded to 8 bits at every product, gradients still point the same way.
    assert float(torch.nn.functional.cosine_similarity(exact, rounded, dim=0)) > 0.999
    assert float(rounded.norm() / exact.norm()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_blocks_computed_again_give_the_same_bits(architecture: str) -> None:
    run, data = _sample(architecture, "compiled", torch.bfloat16)
    assert isinstance(run.model, NativeModel)
    gradients = []
    for activation_bytes in (2**30, 60_000, 0):
        run.model.activation_bytes = activation_bytes
        run.forward_backward(data, LossSpec("ppo"))
        gradients.append(run.gradient)
        run.gradient = None
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
