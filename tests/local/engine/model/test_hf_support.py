"""Models that are not causal language models are refused in one line, by the plan too."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.foreign_models import RUN_THROUGH_TRANSFORMERS, foreign_model
from tests.local.engine.training_data import FORMATS
from tests.tiny_models import tiny_model
from tests.vision_models import tiny_vision_model
from tinker_cookbook.exceptions import WeightsError
from tinker_cookbook.local.engine.model.architecture import read_arch
from tinker_cookbook.local.engine.model.base_model import load_base_model
from tinker_cookbook.local.engine.model.hf_model import HfModel
from tinker_cookbook.local.engine.model.lora import Adapter
from tinker_cookbook.local.engine.types import LoraSpec
from tinker_cookbook.local.plan import GIB, MachineRates, ModelPlan, build_plan, describe_plan

RATES = MachineRates(flops=150e9, bandwidth=20e9)
REFUSED = {
    "bert": "both sides",
    "t5": "has an encoder",
    "mamba": "keeps a state instead of keys and values",
}


def refusal(folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        load_base_model(folder, dtype=torch.float32)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_run_is_refused_by_the_engine_and_the_plan_alike(kind: str) -> None:
    folder = foreign_model(kind)
    text = refusal(folder)
    assert REFUSED[kind] in text
    assert repr(kind) in text
    with pytest.raises(WeightsError) as planned:
        build_plan("m", folder, rates=RATES)
    assert str(planned.value) == text


def test_a_model_that_reads_what_comes_after_is_found_out_by_what_it_predicts() -> None:
    assert "changes with the text after it" in refusal(foreign_model("gemma3_both_sides"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "no_such_model", "architectures": ["X"]}, "cannot be read by transformers"),
        ({"model_type": "clip"}, "is not a causal language model"),
    ],
)
def test_unknown_types_are_refused_in_one_line(tmp_path: Path, change: dict, problem: str) -> None:
    config = {"model_type": "bert", "vocab_size": 320, "hidden_size": 48}
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert problem in refusal(tmp_path)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("kind", [*RUN_THROUGH_TRANSFORMERS, "qwen2_5_vl", "llava"])
def test_the_plan_of_a_model_for_transformers_counts_what_is_then_loaded(
    kind: str, dtype: torch.dtype
) -> None:
    is_text = kind in RUN_THROUGH_TRANSFORMERS
    folder = foreign_model(kind) if is_text else tiny_vision_model(kind)
    assert read_arch(folder) is None
    plan = planned(folder, dtype)
    model = load_base_model(folder, dtype=dtype)
    assert isinstance(model, HfModel)
    parameters = list(model.transformers_model.parameters())
    assert plan.num_parameters == sum(p.numel() for p in parameters)
    assert plan.memory["weights"] == sum(p.nbytes for p in parameters)
    adapter = Adapter(LoraSpec(rank=4), model.lora_targets(LoraSpec(rank=4)))
    assert plan.adapter_parameters == 4 * sum(
        target.in_features + target.out_features for target in adapter.targets
    )
    assert set(plan.sizes.adapter_parts) == {target.part for target in adapter.targets}
    assert plan.sizes.max_positions == model.max_positions
    taken = model.batch_bytes(1024, 1, 4, backward=True)
    assert plan.memory["activations of a pack"] == taken
    text = describe_plan(plan)
    assert "runs through transformers" in text
    assert "tokens per second" not in text
    assert plan.fits


def planned(folder: Path, dtype: torch.dtype) -> ModelPlan:
    name = str(dtype).removeprefix("torch.")
    return build_plan("tiny", folder, rank=4, rates=RATES, free_bytes=8 * GIB, dtype=name)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("kind", RUN_THROUGH_TRANSFORMERS)
def test_a_planned_cached_token_is_what_a_sequence_holds(kind: str, dtype: torch.dtype) -> None:
    folder = foreign_model(kind)
    plan = planned(folder, dtype)
    model = load_base_model(folder, dtype=dtype)
    assert isinstance(model, HfModel)
    sequence = model.start(None)
    sequence.extend(torch.arange(3, 13))
    layers: list[Any] = sequence._cache.layers
    held = sum(
        tensor.numel() * tensor.element_size()
        for layer in layers
        for tensor in (layer.keys, layer.values)
    )
    assert held == 10 * plan.bytes_per_cached_token


def test_every_matrix_of_a_block_of_gpt2_takes_an_adapter() -> None:
    model = load_base_model(foreign_model("gpt2"), dtype=torch.float32)
    names = {target.path.rpartition(".")[2] for target in model.lora_targets(LoraSpec())}
    assert names == {"c_attn", "c_proj", "c_fc", "lm_head"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--device", "no_such_device"], "device='no_such_device'"),
        (["--model", "BERT"], "both sides"),
    ],
)
def test_serve_says_what_is_wrong_before_anything_else(
    tmp_path: Path, arguments: list[str], problem: str
) -> None:
    words = [str(foreign_model("bert")) if name == "BERT" else name for name in arguments]
    command = [sys.executable, "-m", "tinker_cookbook.cli", "serve", "--port", "0", *words]
    command += ["--state-dir", str(tmp_path / "state")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert problem in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
    assert not (tmp_path / "state").exists()


def with_config(folder: Path, target: Path, **change: Any) -> Path:
    """A copy of a model folder whose config.json says something else."""
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return target


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForQuestionAnswering"])
def test_another_output_than_logits_is_refused_alike(tmp_path: Path, kind: str, head: str) -> None:
    source = tiny_model() if kind == "llama" else foreign_model(kind)
    folder = with_config(source, tmp_path / "model", architectures=[f"X{head}"])
    text = refusal(folder)
    assert f"X{head} computes other numbers than the next token's logits" in text
    with pytest.raises(WeightsError) as planned:
        build_plan("m", folder, rates=RATES)
    assert str(planned.value) == text


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_an_output_layer_that_is_missing_is_not_made_up(tmp_path: Path, kind: str) -> None:
    source = tiny_model(tied=False) if kind == "llama" else foreign_model(kind)
    folder = with_config(source, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight" in refusal(folder)
