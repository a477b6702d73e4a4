"""Dropout of an adapter's inputs: the gradient is that of the dropped forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.local.engine.training_data import FORMATS, random_datum, set_random_b
from tests.tiny_models import tiny_model
from tinker_cookbook.local.engine.model.base_model import NativeModel, load_base_model
from tinker_cookbook.local.engine.training.run import TrainingRun
from tinker_cookbook.local.engine.types import LoraSpec, LossSpec, TrainDatum

CROSS_ENTROPY = LossSpec("cross_entropy")


def _run(dtype: torch.dtype, *, compiled: bool = True, dropout: float = 0.3) -> TrainingRun:
    model = load_base_model(tiny_model("llama"), dtype=dtype, compiled=compiled)
    run = TrainingRun(model, LoraSpec(rank=4, seed=1, train_unembed=False, dropout=dropout))
    set_random_b(run.adapter)
    return run


def _data(run: TrainingRun) -> list[TrainDatum]:
    rng = np.random.default_rng(0)
    return [random_datum(rng, length, run.model.vocab_size) for length in (30, 17)]


def _pass(run: TrainingRun) -> tuple[float, torch.Tensor]:
    """Return loss and gradient of the first pass, whose masks are always the same."""
    run.num_passes, run.gradient = 0, None
    result = run.forward_backward(_data(run), CROSS_ENTROPY)
    gradient, run.gradient = run.gradient, None
    assert gradient is not None
    return result.metrics["loss:sum"], gradient


@pytest.mark.parametrize("compiled", [True, False])
def test_the_gradient_is_the_slope_of_the_dropped_loss(compiled: bool) -> None:
    run = _run(torch.float32, compiled=compiled)
    _, gradient = _pass(run)
    direction = gradient / gradient.norm()
    losses = []
    for step in (1e-2, -1e-2):
        run.adapter.parameters.add_(direction, alpha=step)
        run.adapter.version += 1
        losses.append(_pass(run)[0])
        run.adapter.parameters.sub_(direction, alpha=step)
    slope = (losses[0] - losses[1]) / 2e-2
    assert slope == pytest.approx(float(gradient.norm()), rel=5e-3)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_passes_differ_and_scores_drop_nothing(dtype: torch.dtype) -> None:
    run, plain = _run(dtype), _run(dtype, dropout=0.0)
    first, second = (run.forward_backward(_data(run), CROSS_ENTROPY) for _ in range(2))
    assert first.metrics["loss:sum"] != second.metrics["loss:sum"]
    scores = run.forward_backward(_data(run), CROSS_ENTROPY, backward=False)
    expected = plain.forward_backward(_data(run), CROSS_ENTROPY, backward=False)
    for ours, theirs in zip(scores.logprobs, expected.logprobs, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_blocks_computed_again_drop_the_same() -> None:
    run = _run(torch.bfloat16)
    _, kept = _pass(run)
    assert isinstance(run.model, NativeModel)
    run.model.activation_bytes = 0
    _, again = _pass(run)
    assert torch.equal(kept, again)


def test_formats_agree_on_the_gradient() -> None:
    exact, rounded = (_pass(_run(dtype))[1] for dtype in FORMATS)
    assert float(torch.nn.functional.cosine_similarity(exact, rounded, dim=0)) > 0.999
