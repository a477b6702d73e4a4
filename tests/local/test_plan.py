"""The plan of a model: from config.json alone, and true to what the engine then holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_models import TINY_ARCHITECTURES, tiny_model
from tinker_cookbook.local.engine.model.architecture import read_arch
from tinker_cookbook.local.engine.model.base_model import NativeModel, load_base_model
from tinker_cookbook.local.engine.model.lora import lora_targets
from tinker_cookbook.local.engine.types import LoraSpec
from tinker_cookbook.local.plan import GIB, MachineRates, build_plan, describe_plan
from tinker_cookbook.unembedding import choose_train_unembed

RATES = MachineRates(flops=150e9, bandwidth=20e9)
QWEN3_600M = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def write_config(folder: Path, **changes: object) -> Path:
    (folder / "config.json").write_text(json.dumps(QWEN3_600M | changes))
    return folder


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_sizes_are_those_of_the_loaded_model(architecture: str) -> None:
    folder = tiny_model(architecture, tied=False)
    plan = build_plan("tiny", folder, rank=4, rates=RATES, free_bytes=8 * GIB, dtype="float32")
    model = load_base_model(folder, dtype=torch.float32)
    assert isinstance(model, NativeModel)
    held = model.weights.num_bytes()
    planned = next(iter(plan.memory.values()))
    # num_bytes leaves out norms and biases; matrices are filled up to whole panels, which counts
    # in a model as small as this
    assert 0.8 * held < planned < 1.03 * held
    targets = model.lora_targets(LoraSpec(rank=4))  # what runs have if nothing is said
    adapter = 4 * sum(target.in_features + target.out_features for target in targets)
    assert plan.adapter_parameters == adapter


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_activations_are_what_the_engine_counts(architecture: str, dtype: str) -> None:
    folder = tiny_model(architecture, tied=False)
    plan = build_plan("tiny", folder, rank=4, rates=RATES, free_bytes=8 * GIB, dtype=dtype)
    model = load_base_model(folder, dtype=getattr(torch, dtype))
    assert isinstance(model, NativeModel)
    model._exact_parts()  # the copy for sampling is made: the plan has it among the weights
    counted = model.batch_bytes(1024, 1, 4, backward=True)
    assert plan.memory["activations of a pack"] == counted


def test_a_model_of_0_6b_has_the_published_size(tmp_path: Path) -> None:
    folder = write_config(tmp_path)
    plan = build_plan("m", folder, rates=RATES, free_bytes=16 * GIB, dtype="float32")
    assert plan.num_parameters == 596_049_920
    assert plan.bytes_per_cached_token == 28 * 2 * 8 * 128 * 4
    assert plan.memory["weights, packed for training and sampling"] / 2**20 == pytest.approx(
        1137, rel=0.01
    )
    assert plan.speeds["sampling, 32 at once"] > plan.speeds["sampling, 1 sequence"]


def test_less_memory_means_a_shorter_context_and_then_no_fit(tmp_path: Path) -> None:
    folder = write_config(tmp_path)
    plans = [
        build_plan("m", folder, rates=RATES, free_bytes=size * GIB, dtype="float32")
        for size in (2, 5, 7, 200)
    ]
    lengths = [plan.max_train_tokens for plan in plans]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[1] < lengths[2] < lengths[3] == 40_960
    assert [plan.fits for plan in plans] == [False, True, True, True]
    assert "MORE THAN IS FREE" in describe_plan(plans[0])
    assert "MORE THAN IS FREE" not in describe_plan(plans[1])


def test_without_a_compiler_the_format_halves_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_COOKBOOK_NATIVE", "0")
    folder = write_config(tmp_path)
    full = build_plan("m", folder, rates=RATES, free_bytes=16 * GIB, dtype="float32")
    half = build_plan("m", folder, rates=RATES, free_bytes=16 * GIB, dtype="bfloat16")
    assert full.memory["weights"] == 2 * half.memory["weights"]
    assert full.dtype_reason == "as asked for"


@pytest.mark.parametrize("tied", [True, False])
def test_the_command_plans_the_adapter_that_recipes_train(tmp_path: Path, tied: bool) -> None:
    folder = write_config(tmp_path, tie_word_embeddings=tied)
    command = [sys.executable, "-m", "tinker_cookbook.cli", "serve", "--plan", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spec = LoraSpec(train_unembed=choose_train_unembed(str(folder)))
    assert spec.train_unembed is not tied
    arch = read_arch(folder)
    assert arch is not None
    parameters = 32 * sum(t.in_features + t.out_features for t in lora_targets(arch, spec))
    parts = "attention, MLP" + ("" if tied else ", output embedding")
    assert f"rank 32 on {parts}: {parameters / 1e6:.1f} million parameters" in done.stdout


def test_the_command_prints_a_plan_without_loading_anything(tmp_path: Path) -> None:
    """No weights are there."""
    command = [sys.executable, "-m", "tinker_cookbook.cli", "serve", "--plan"]
    command.append(str(write_config(tmp_path)))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "596.0 million parameters" in done.stdout
    assert "tokens in training" in done.stdout
