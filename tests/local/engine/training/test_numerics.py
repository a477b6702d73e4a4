"""The native training path against transformers + PEFT, and against itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.local.engine.training_data import (
    make_run,
    peft_model,
    random_datum,
    reference_logprobs,
)
from tests.tiny_models import TINY_ARCHITECTURES, tiny_model
from tinker_cookbook.local.engine.model.base_model import NativeModel
from tinker_cookbook.local.engine.training.run import TrainingRun
from tinker_cookbook.local.engine.types import AdamSpec, LoraSpec, LossSpec, TrainDatum

CROSS_ENTROPY = LossSpec("cross_entropy")

# PEFT asks transformers 5 for an attribute that has a new name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # PEFT's caution about merging an adapter on tied embeddings; nothing is merged here.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


def _data(run: TrainingRun, lengths: tuple[int, ...] = (300, 7, 150, 1)) -> list[TrainDatum]:
    rng = np.random.default_rng(5)
    return [random_datum(rng, n, run.model.vocab_size) for n in lengths]


def _native(run: TrainingRun) -> NativeModel:
    assert isinstance(run.model, NativeModel)
    return run.model


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("train_unembed", [False, True])
@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_logprobs_loss_gradient_and_adam_step_equal_peft(
    architecture: str, train_unembed: bool, compiled: bool
) -> None:
    folder = tiny_model(architecture, tied=False)
    spec = LoraSpec(rank=4, seed=1, train_unembed=train_unembed)
    run = make_run(folder, spec, compiled=compiled)
    model, parameters = peft_model(folder, run.adapter)
    data = _data(run)
    result = run.forward_backward(data, CROSS_ENTROPY)

    loss = torch.zeros(())
    for datum, logprobs in zip(data, result.logprobs, strict=True):
        expected = reference_logprobs(model, datum)
        weights = datum.loss_inputs["weights"]
        assert isinstance(weights, np.ndarray)
        loss = loss - (expected * torch.from_numpy(weights)).sum()
        # Two float32 implementations; logprobs reach -15.
        np.testing.assert_allclose(logprobs, expected.detach().numpy(), atol=5e-5)
    assert result.metrics["loss:sum"] == pytest.approx(float(loss.detach()), abs=2e-3)

    loss.backward()
    assert run.gradient is not None
    for key, parameter in parameters.items():
        assert parameter.grad is not None
        ours = run.adapter.layout.matrix(run.gradient, key)
        error = (ours - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-5, f"gradient of {key} differs by {error:.1e}"

    adam = AdamSpec(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=0.5, eps=1e-8)
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), adam.grad_clip_norm)
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=adam.learning_rate,
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        weight_decay=adam.weight_decay,
    )
    optimizer.step()
    metrics = run.optim_step(adam)
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    for key, parameter in parameters.items():
        ours = run.adapter.layout.matrix(run.adapter.parameters, key)
        # Adam divides by the gradient's own size: where that is near 0, signs may differ.
        assert (ours - parameter).abs().median() < 1e-6
        assert (ours - parameter).abs().mean() < 1e-4
    assert run.gradient is None


def test_tied_embeddings_train_the_output_side_only() -> None:
    folder = tiny_model("llama", tied=True)
    run = make_run(folder, LoraSpec(rank=4, seed=1, train_unembed=True))
    model, _ = peft_model(folder, run.adapter)
    data = _data(run, (20,))
    result = run.forward_backward(data, CROSS_ENTROPY, backward=False)
    with torch.no_grad():
        expected = reference_logprobs(model, data[0]).numpy()
    np.testing.assert_allclose(result.logprobs[0], expected, atol=5e-5)


@pytest.mark.parametrize("part", ["train_attn", "train_mlp", "train_unembed"])
def test_each_part_trains_alone(part: str) -> None:
    flags = dict.fromkeys(("train_attn", "train_mlp", "train_unembed"), False) | {part: True}
    folder = tiny_model("qwen2", tied=False)
    run = make_run(folder, LoraSpec(rank=2, seed=3, **flags))
    model, parameters = peft_model(folder, run.adapter)
    data = _data(run, (40,))
    run.forward_backward(data, CROSS_ENTROPY)
    weights = data[0].loss_inputs["weights"]
    assert isinstance(weights, np.ndarray)
    (-(reference_logprobs(model, data[0]) * torch.from_numpy(weights)).sum()).backward()
    assert run.gradient is not None
    for key, parameter in parameters.items():
        assert parameter.grad is not None
        ours = run.adapter.layout.matrix(run.gradient, key)
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-3)


def test_new_adapter_leaves_the_base_model_as_it_is() -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model("qwen3")
    run = make_run(folder, random_b=False)
    data = _data(run, (30,))
    result = run.forward_backward(data, CROSS_ENTROPY, backward=False)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = reference_logprobs(base, data[0]).numpy()
    np.testing.assert_allclose(result.logprobs[0], expected, atol=5e-5)


def test_computing_blocks_again_gives_the_same_bits() -> None:
    run = make_run(tiny_model("qwen3", num_layers=3))
    data = _data(run)
    gradients = []
    for activation_bytes in (2**30, 300_000, 0):
        _native(run).activation_bytes = activation_bytes
        run.forward_backward(data, CROSS_ENTROPY)
        gradients.append(run.gradient)
        run.gradient = None
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_a_request_split_into_packs_gives_the_same_gradient() -> None:
    run = make_run(tiny_model("llama"))
    data = _data(run, (60, 20, 90, 33, 1, 128))
    results, gradients = [], []
    for pack_tokens in (1000, 100, 1):
        _native(run).pack_tokens = pack_tokens
        results.append(run.forward_backward(data, CROSS_ENTROPY))
        gradients.append(run.gradient)
        run.gradient = None
    for result, gradient in zip(results[1:], gradients[1:], strict=True):
        # Sums over other groupings of tokens: equal up to float32 rounding.
        assert (gradient - gradients[0]).norm() / gradients[0].norm() < 1e-5
        for one, other in zip(results[0].logprobs, result.logprobs, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)


def test_forward_equals_forward_backward_and_repeats_exactly() -> None:
    run = make_run(tiny_model("llama"))
    data = _data(run)
    forward = run.forward_backward(data, CROSS_ENTROPY, backward=False)
    assert run.gradient is None
    results = [run.forward_backward(data, CROSS_ENTROPY)]
    gradient, run.gradient = run.gradient, None
    results.append(run.forward_backward(data, CROSS_ENTROPY))
    assert gradient is not None
    assert run.gradient is not None
    assert torch.equal(gradient, run.gradient)
    assert forward.metrics["loss:sum"] == pytest.approx(results[0].metrics["loss:sum"], abs=1e-3)
    for index in range(len(data)):
        np.testing.assert_array_equal(results[0].logprobs[index], results[1].logprobs[index])
        np.testing.assert_allclose(forward.logprobs[index], results[0].logprobs[index], atol=2e-5)


def test_several_targets_per_position() -> None:
    run = make_run(tiny_model("llama"))
    rng = np.random.default_rng(0)
    single = [random_datum(rng, 12, run.model.vocab_size) for _ in range(3)]
    tokens = single[0].tokens
    several = TrainDatum(
        tokens,
        {
            key: np.stack([np.asarray(datum.loss_inputs[key]) for datum in single], axis=1)
            for key in ("target_tokens", "weights")
        },
    )
    one_by_one = [TrainDatum(tokens, datum.loss_inputs) for datum in single]
    expected = run.forward_backward(one_by_one, CROSS_ENTROPY)
    expected_gradient, run.gradient = run.gradient, None
    # Mixed widths in one request.
    result = run.forward_backward([several, one_by_one[0]], CROSS_ENTROPY, backward=False)
    assert result.logprobs[0].shape == (12, 3)
    assert result.logprobs[1].shape == (12,)
    np.testing.assert_allclose(result.logprobs[0], np.stack(expected.logprobs, axis=1), atol=2e-5)
    run.forward_backward([several], CROSS_ENTROPY)
    assert expected_gradient is not None
    assert run.gradient is not None
    assert (run.gradient - expected_gradient).norm() / expected_gradient.norm() < 1e-5


def test_seed_decides_the_run_and_the_global_generator_does_not() -> None:
    folder = tiny_model("llama")
    adapters = []
    for seed, global_seed in ((7, 1), (7, 2), (8, 1)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        run = make_run(folder, LoraSpec(rank=4, seed=seed), random_b=False)
        assert torch.equal(before, torch.get_rng_state())
        adapters.append(run.adapter.parameters)
    assert torch.equal(adapters[0], adapters[1])
    assert not torch.equal(adapters[0], adapters[2])
    a = run.adapter.a("model.layers.0.mlp.down_proj")
    bound = a.shape[1] ** -0.5
    assert a.abs().max() <= bound
    assert float(a.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_llama3_rope_scaling_equals_transformers(tmp_path) -> None:
    import json

    from tests.tiny_models import build_tiny_model

    build_tiny_model(tmp_path, "llama")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["rope_scaling"] = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    path.write_text(json.dumps(config))
    run = make_run(tmp_path)
    model, _ = peft_model(tmp_path, run.adapter)
    data = _data(run, (200,))
    result = run.forward_backward(data, CROSS_ENTROPY, backward=False)
    with torch.no_grad():
        expected = reference_logprobs(model, data[0]).numpy()
    np.testing.assert_allclose(result.logprobs[0], expected, atol=5e-5)
