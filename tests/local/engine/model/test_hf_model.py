"""Architectures the engine does not know go through transformers, with the same results."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.local.engine.training_data import (
    make_run,
    peft_model,
    random_datum,
    reference_logprobs,
)
from tests.tiny_models import tiny_model
from tinker_cookbook.local.engine.model.base_model import NativeModel
from tinker_cookbook.local.engine.model.hf_model import HfModel
from tinker_cookbook.local.engine.training.run import TrainingRun
from tinker_cookbook.local.engine.types import AdamSpec, LoraSpec, LossSpec

CROSS_ENTROPY = LossSpec("cross_entropy")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@functools.cache
def _session_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tiny-hf-", ignore_cleanup_errors=True)


@functools.cache
def _foreign_model(architecture: str) -> Path:
    """A tiny random GPT-NeoX (other block, rotary share, biases), Gemma 2 (logit caps) or GPT-2
    (matrices the other way round)."""
    from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GPTNeoXConfig

    size = {
        "vocab_size": 200,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    if architecture == "gpt_neox":
        config = GPTNeoXConfig(**size)
    elif architecture == "gpt2":
        config = GPT2Config(
            vocab_size=200,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            tie_word_embeddings=False,
        )
    else:
        config = Gemma2Config(**size, num_key_value_heads=2, head_dim=8)
    folder = Path(_session_folder().name) / architecture
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    model.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize("architecture", ["gpt_neox", "gemma2", "gpt2"])
def test_training_equals_peft(architecture: str) -> None:
    folder = _foreign_model(architecture)
    run = make_run(folder, LoraSpec(rank=3, seed=1))
    assert isinstance(run.model, HfModel)
    model, parameters = peft_model(folder, run.adapter)
    rng = np.random.default_rng(0)
    data = [random_datum(rng, n, 200) for n in (20, 9)]
    result = run.forward_backward(data, CROSS_ENTROPY)
    loss = torch.zeros(())
    for datum, logprobs in zip(data, result.logprobs, strict=True):
        expected = reference_logprobs(model, datum)
        np.testing.assert_allclose(logprobs, expected.detach().numpy(), atol=5e-5)
        loss = loss - (expected * torch.from_numpy(np.asarray(datum.loss_inputs["weights"]))).sum()
    loss.backward()
    assert run.gradient is not None
    for key, parameter in parameters.items():
        assert parameter.grad is not None
        ours = run.adapter.layout.matrix(run.gradient, key)
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-4)


def test_parts_of_a_foreign_model() -> None:
    folder = _foreign_model("gpt_neox")
    run = make_run(folder, LoraSpec(rank=2, train_mlp=False, train_unembed=False))
    assert {target.path.split(".")[-1] for target in run.adapter.targets} == {
        "query_key_value",
        "dense",
    }
    run = make_run(folder, LoraSpec(rank=2, train_attn=False, train_mlp=False))
    assert [target.part for target in run.adapter.targets] == ["unembed"]


def test_a_native_model_through_transformers_gives_the_native_results(tmp_path: Path) -> None:
    """The same folder on both paths, and a checkpoint of one in the other."""
    folder = tiny_model("llama", tied=False)
    native = make_run(folder, LoraSpec(rank=4, seed=2))
    assert isinstance(native.model, NativeModel)
    native.save(tmp_path, base_model_name="tiny", with_optimizer=True)
    model = HfModel(folder, dtype=torch.float32)
    foreign = TrainingRun.from_folder(model, tmp_path, with_optimizer=True)
    data = [random_datum(np.random.default_rng(0), 30, model.vocab_size)]
    for _ in range(2):
        results = [run.forward_backward(data, CROSS_ENTROPY) for run in (native, foreign)]
        np.testing.assert_allclose(results[0].logprobs[0], results[1].logprobs[0], atol=5e-5)
        assert native.gradient is not None
        assert foreign.gradient is not None
        for key in native.adapter.layout.slices:
            torch.testing.assert_close(
                native.adapter.layout.matrix(native.gradient, key),
                foreign.adapter.layout.matrix(foreign.gradient, key),
                rtol=1e-3,
                atol=1e-3,
            )
        for run in (native, foreign):
            run.optim_step(AdamSpec(learning_rate=1e-3, eps=1e-6))


def test_decoding_with_a_cache_equals_a_whole_forward_pass() -> None:
    run = make_run(_foreign_model("gpt_neox"))
    assert isinstance(run.model, HfModel)
    datum = random_datum(np.random.default_rng(0), 12, 200)
    expected = run.forward_backward([datum], CROSS_ENTROPY, backward=False).logprobs[0]
    tokens = torch.from_numpy(datum.tokens).long()
    sequence = run.model.start(run.adapter)
    logits = torch.cat(
        [sequence.extend(tokens[:7])] + [sequence.extend(t[None]) for t in tokens[7:]]
    )
    targets = torch.from_numpy(np.asarray(datum.loss_inputs["target_tokens"]))
    found = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    np.testing.assert_allclose(found.numpy(), expected, atol=5e-5)


def test_unknown_rope_scaling_is_left_to_transformers(tmp_path: Path) -> None:
    from tests.tiny_models import build_tiny_model
    from tinker_cookbook.local.engine.model.architecture import read_arch

    build_tiny_model(tmp_path)
    assert read_arch(tmp_path) is not None
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change in (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"hidden_act": "gelu"},
        {"model_type": "gemma"},
        {"attention_bias": True},
        {"sliding_window": 16},
    ):
        path.write_text(json.dumps(config | change))
        assert read_arch(tmp_path) is None, change
