"""A kept forward pass gives the same bits as a pass that is computed again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tiny_models import tiny_model
from tinker_cookbook.local.engine.model.base_model import NativeModel, load_base_model
from tinker_cookbook.local.engine.training import kept_forwards
from tinker_cookbook.local.engine.training import run as run_module
from tinker_cookbook.local.engine.training.run import TrainingRun
from tinker_cookbook.local.engine.types import AdamSpec, LoraSpec, LossSpec, TrainDatum

LOSS = LossSpec("cross_entropy")
STEPS = 3


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> NativeModel:
    found = load_base_model(tiny_model(request.param), dtype=torch.float32)
    assert isinstance(found, NativeModel)
    found.pack_tokens = 40  # several packs in a request
    return found


@pytest.fixture
def calls(model: NativeModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of every forward pass through the blocks."""
    seen: list[int] = []
    forward = model.transformer.forward

    def counted(adapter, tokens, lengths, **options):
        seen.append(len(tokens))
        return forward(adapter, tokens, lengths, **options)

    monkeypatch.setattr(model.transformer, "forward", counted)
    return seen


def make_data(seed: int, weight: float = 1.0) -> list[TrainDatum]:
    rng = np.random.default_rng(seed)
    data = []
    for length in (9, 14, 30, 21):
        tokens = rng.integers(5, 200, length + 1)
        weights = np.full(length, weight, np.float32)
        weights[: length // 2] = 0
        inputs = {"target_tokens": tokens[1:], "weights": weights}
        data.append(TrainDatum(tokens[:-1].astype(np.int32), inputs))
    return data


def train(model: NativeModel) -> tuple[list[torch.Tensor], TrainingRun]:
    """Return the gradients of steps whose weights come from the log probabilities."""
    run = TrainingRun(model, LoraSpec(rank=4, seed=1))
    other = TrainingRun(model, LoraSpec(rank=2, seed=5))
    gradients = []
    for step in range(STEPS):
        data = make_data(step)
        found = run.forward_backward(data, LOSS, backward=False).logprobs
        # Another run's pass in between must not disturb what is kept.
        other.forward_backward(make_data(99), LOSS)
        for datum, logprobs in zip(data, found, strict=True):
            datum.loss_inputs["weights"] = datum.loss_inputs["weights"] * np.exp(logprobs)
        run.forward_backward(data, LOSS)
        assert run.gradient is not None
        gradients.append(run.gradient.clone())
        run.optim_step(AdamSpec(learning_rate=1e-2))
    return gradients, run


def test_the_gradients_have_the_same_bits_and_half_the_forward_passes(
    model: NativeModel, calls: list[int], monkeypatch: pytest.MonkeyPatch
):
    kept, run = train(model)
    assert run.forwards.is_worthwhile
    num_kept = len(calls)
    calls.clear()
    monkeypatch.setattr(run_module, "KEPT_FORWARD_BYTES", 0)
    again, _ = train(model)
    num_packs = 2
    assert len(calls) == STEPS * 3 * num_packs
    # The first step shows that keeping is worthwhile; the others save the second pass.
    assert num_kept == len(calls) - (STEPS - 1) * num_packs
    for one, other in zip(kept, again, strict=True):
        assert torch.equal(one, other)


def test_changed_weights_and_other_data_do_not_use_a_kept_pass(
    model: NativeModel, calls: list[int]
):
    _, run = train(model)
    run.forward_backward(make_data(7), LOSS, backward=False)
    run.optim_step(AdamSpec(learning_rate=1e-2))
    calls.clear()
    run.forward_backward(make_data(7), LOSS)
    assert len(calls) == 2, "the weights are not those of the kept pass"
    assert not run.forwards.is_worthwhile, "the last step did not repeat its data"


def test_nothing_is_kept_where_memory_is_short(
    model: NativeModel, calls: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kept_forwards, "available_bytes", lambda: 1000)
    train(model)
    assert len(calls) == STEPS * 6
