"""The plan of a model: made from config.json alone, and equal to what the engine then holds."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.local.engine.training_data import FORMATS, random_datum
from tests.tiny_models import TINY_ARCHITECTURES, build_tiny_model
from tinker_cookbook.local.engine.model.architecture import read_arch
from tinker_cookbook.local.engine.model.base_model import NativeModel, load_base_model
from tinker_cookbook.local.engine.model.lora import lora_targets
from tinker_cookbook.local.engine.model.packed_matrix import WIDEST_PANEL, PackedMatrix
from tinker_cookbook.local.engine.residency import ResidentRun
from tinker_cookbook.local.engine.sampling.kv_cache import KvCache
from tinker_cookbook.local.engine.sampling.native_decoder import native_decoder
from tinker_cookbook.local.engine.sampling.torch_decoder import TorchDecoder
from tinker_cookbook.local.engine.training.run import TrainingRun
from tinker_cookbook.local.engine.types import AdamSpec, LoraSpec, LossSpec
from tinker_cookbook.local.plan import (
    GIB,
    MachineRates,
    ModelPlan,
    StepWork,
    build_plan,
    describe_plan,
)
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


@functools.cache
def _folder_of(root: Path, architecture: str, *, tied: bool) -> Path:
    """A tiny model whose matrices fill whole panels on every processor (multiples of 32 rows)."""
    folder = root / f"{architecture}-{tied}"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    build_tiny_model(folder, architecture, tied=tied, sizes=sizes | heads)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planned")


def plan_and_model(folder: Path, dtype: torch.dtype) -> tuple[ModelPlan, NativeModel]:
    name = str(dtype).removeprefix("torch.")
    plan = build_plan("tiny", folder, rank=4, rates=RATES, free_bytes=8 * GIB, dtype=name)
    model = load_base_model(folder, dtype=dtype)
    assert isinstance(model, NativeModel)
    return plan, model


every_model = pytest.mark.parametrize(
    ("architecture", "tied"),
    [(name, tied) for name in TINY_ARCHITECTURES for tied in (True, False)],
)
both_formats = pytest.mark.parametrize("dtype", FORMATS, ids=str)


@every_model
@both_formats
def test_planned_weights_are_those_of_the_loaded_model(
    root: Path, architecture: str, tied: bool, dtype: torch.dtype
) -> None:
    plan, model = plan_and_model(_folder_of(root, architecture, tied=tied), dtype)
    assert list(plan.sizes.weights.values()) == [model.weights.num_bytes()]
    assert plan.num_parameters == model.weights.num_parameters


@both_formats
def test_padding_of_odd_sizes_is_the_only_difference(dtype: torch.dtype, tmp_path: Path) -> None:
    build_tiny_model(tmp_path, "llama", tied=False)
    plan, model = plan_and_model(tmp_path, dtype)
    held, planned = model.weights.num_bytes(), next(iter(plan.memory.values()))
    # Panels narrower than the plan's (without AVX-512) are filled up with fewer zeros.
    head = model.weights.head
    widest = not isinstance(head, PackedMatrix) or head.panel == WIDEST_PANEL
    assert held <= planned < (1.1 if widest else 1.2) * held


@every_model
@both_formats
def test_planned_adapters_are_those_of_a_run(
    root: Path, architecture: str, tied: bool, dtype: torch.dtype
) -> None:
    plan, model = plan_and_model(_folder_of(root, architecture, tied=tied), dtype)
    run = TrainingRun(model, LoraSpec(rank=4))
    adapter = run.adapter
    counted = sum(adapter.a(t.path).numel() + adapter.b(t.path).numel() for t in adapter.targets)
    assert plan.adapter_parameters == counted
    datum = random_datum(np.random.default_rng(0), 20, model.vocab_size)
    run.forward_backward([datum], LossSpec("cross_entropy"))
    assert run.gradient is not None
    assert plan.memory["gradient, shared by the runs"] == run.gradient.nbytes
    run.optim_step(AdamSpec())
    assert run.adam_state is not None
    resident = ResidentRun("tiny", run)
    assert plan.bytes_per_run == resident.num_bytes
    bits_per_moment = 32 if dtype == torch.float32 else 24
    parameters = run.adapter.parameters.numel()
    assert resident.num_bytes == parameters * (4 + 2 * bits_per_moment // 8)


@every_model
@both_formats
def test_planned_activations_are_what_a_forward_pass_keeps(
    root: Path, architecture: str, tied: bool, dtype: torch.dtype
) -> None:
    num_tokens = 320
    plan, model = plan_and_model(_folder_of(root, architecture, tied=tied), dtype)
    assert plan.sizes.pass_bytes(num_tokens) == model.batch_bytes(num_tokens, 1, 4, backward=True)
    adapter = TrainingRun(model, LoraSpec(rank=4)).adapter
    tokens = torch.arange(num_tokens) % model.vocab_size
    with torch.no_grad():
        _, tape = model.transformer.forward(adapter, tokens, [num_tokens], keep_blocks=2)
    per_token = 4 * model.arch.num_heads  # of the logsumexp, which only the compiled kernels keep
    kept = 0
    for hidden, block in zip(tape.inputs, tape.kept, strict=False):
        assert block is not None
        kept += hidden.nbytes + sum(v.nbytes for v in vars(block).values() if v is not None)
        kept += per_token * num_tokens if block.attended_lse is None else 0
    assert kept == 2 * model.transformer.activation_bytes(num_tokens, 4).full


@every_model
@both_formats
def test_planned_cached_tokens_are_those_of_the_decoder(
    root: Path, architecture: str, tied: bool, dtype: torch.dtype
) -> None:
    plan, model = plan_and_model(_folder_of(root, architecture, tied=tied), dtype)
    decoder = native_decoder(model.arch, model.weights) or TorchDecoder(model.arch, model.weights)
    cache = KvCache(decoder.cache_shape, 2**24)
    row = cache.allocate(100)
    assert row is not None
    rows = row.pool.kv.shape[1]
    assert row.pool.kv.nbytes == rows * row.pool.capacity * plan.bytes_per_cached_token


def test_a_model_of_0_6b_has_the_published_size(tmp_path: Path) -> None:
    folder = write_config(tmp_path)
    plan = build_plan("m", folder, rates=RATES, free_bytes=16 * GIB, dtype="float32")
    assert plan.num_parameters == 596_049_920
    assert plan.bytes_per_cached_token == 28 * 2 * 8 * 128 * 4
    half = build_plan("m", folder, rates=RATES, free_bytes=16 * GIB, dtype="bfloat16")
    assert half.bytes_per_cached_token == plan.bytes_per_cached_token // 2
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


def test_what_a_step_samples_is_planned() -> None:
    work = StepWork(sequences=8, held_out_sequences=20, reply_tokens=100)
    assert work.running_tokens() == 256 * 20, "one row for each sequence of the evaluation"
    assert work.stored_tokens() == 128 * (2 * 8 + 20), "half of a row for each stored sequence"
    assert StepWork(sequences=1, reply_tokens=24).running_tokens() == 128


@pytest.mark.parametrize(("trained", "pack"), [(None, 100), (60, 60), (100, 100), (250, 83)])
def test_the_packs_of_a_step_have_one_size(trained: int | None, pack: int) -> None:
    assert StepWork(trained).pack_tokens(100) == pack


def test_a_loop_that_samples_needs_more_memory(tmp_path: Path) -> None:
    folder = write_config(tmp_path)

    def plan(step: StepWork) -> ModelPlan:
        return build_plan("a", folder, rates=MachineRates(1.0, 1.0), step=step)

    work = StepWork(trained_tokens=100, sequences=8, reply_tokens=24)
    trains, in_turns = plan(StepWork(trained_tokens=100)), plan(work)
    at_once = plan(dataclasses.replace(work, overlaps=True))
    cached = (work.stored_tokens() + work.running_tokens()) * trains.bytes_per_cached_token
    assert at_once.total_bytes - trains.total_bytes == cached + trains.bytes_per_sampler
    assert trains.total_bytes < in_turns.total_bytes <= at_once.total_bytes
    assert in_turns.base_format == trains.base_format
