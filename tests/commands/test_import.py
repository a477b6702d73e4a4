"""An adapter that PEFT trained, in the local service: sampled, trained further, or refused."""

# pyright: reportArgumentType=false

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ServiceProcess
from tests.e2e.sdk import batch, train_step
from tests.foreign_models import foreign_model
from tests.number_format import by_format
from tests.tiny_models import tiny_model
from tinker_cookbook.cli import main
from tinker_cookbook.weights import download

TOLERANCE = by_format(float32=1e-4, bfloat16=5e-2)


def train_with_peft(
    base: Path, output: Path, modules: list[str], **options: Any
) -> torch.nn.Module:
    """Train a PEFT adapter for a few steps, save it, and return the model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=modules, task_type="CAUSAL_LM", **options)
    peft = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=3e-2)
    tokens = torch.tensor(batch(seed=1)[0].model_input.to_ints())[None]
    for _ in range(3):
        peft(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peft.save_pretrained(output)
    return peft.eval()


def peft_logprobs(model: torch.nn.Module, datum: tinker.Datum) -> np.ndarray:
    tokens = torch.tensor(datum.model_input.to_ints())
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
    with torch.no_grad():
        logits = model(input_ids=tokens[None]).logits[0]
    return torch.log_softmax(logits, -1).numpy()[np.arange(len(targets)), targets]


def import_paths(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str]:
    assert main(["import", *words]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    return lines["state"].split()[0], lines["weights"].split()[0]


CASES = {
    "some modules": ("llama", ["q_proj", "v_proj", "down_proj", "lm_head"], {}),
    "rank-stabilized": ("qwen2", ["o_proj"], {"use_rslora": True, "layers_to_transform": [1]}),
    "generic": ("mixtral", ["q_proj", "v_proj"], {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_the_service_gives_pefts_logprobs(
    case: str, service_factory: Callable[..., ServiceProcess], tmp_path: Path, capsys
):
    architecture, modules, options = CASES[case]
    base = foreign_model("mixtral") if case == "generic" else tiny_model(architecture, tied=False)
    model = train_with_peft(base, tmp_path / "peft", modules, **options)
    service = service_factory(base)
    state, sampler = import_paths(
        capsys, str(tmp_path / "peft"), "--state-dir", str(service.state_dir)
    )
    client = service.connect()
    datum = batch(seed=9)[0]
    wanted = peft_logprobs(model, datum)
    run = client.create_training_client_from_state(state)
    result = run.forward([datum], "cross_entropy").result().loss_fn_outputs[0]
    assert np.abs(result["logprobs"].to_numpy() - wanted).max() < TOLERANCE
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy().tolist()
    tokens = [*datum.model_input.to_ints(), targets[-1]]
    sampling = client.create_sampling_client(model_path=sampler)
    found = sampling.compute_logprobs(tinker.ModelInput.from_ints(tokens)).result()
    assert np.abs(np.array(found[1:], np.float32) - wanted).max() < TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_training_goes_on_with_the_same_modules(
    service_factory: Callable[..., ServiceProcess], tmp_path: Path, capsys, monkeypatch
):
    base = tiny_model("llama", tied=False)
    train_with_peft(base, tmp_path / "peft", ["q_proj"])
    service = service_factory(base)
    state, _ = import_paths(capsys, str(tmp_path / "peft"), "--state-dir", str(service.state_dir))
    run = service.connect().create_training_client_from_state(state)
    train_step(run, batch(), tinker.AdamParams(learning_rate=1e-2))
    path = run.save_weights_for_sampler("after").result().path
    monkeypatch.setenv("TINKER_BASE_URL", service.base_url)
    monkeypatch.setenv("TINKER_API_KEY", service.api_key)
    after = load_file(
        Path(download(tinker_path=path, output_dir=str(tmp_path / "out")))
        / "adapter_model.safetensors"
    )
    before = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for name, tensor in after.items():
        if name in before:
            assert not torch.equal(tensor, before[name]), f"{name} is trained"
        else:
            assert not tensor.any(), f"{name} is not adapted and stays zero"


def refuse(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["import", *words]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, r"use_dora=True is not supported"),
        ({"bias": "all"}, r"bias='all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, r"rank_pattern=.* is not supported"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' is not supported"),
        ({"peft_type": "LOHA"}, r"peft_type='LOHA' is not supported"),
        ({"r": 0}, r"must be positive"),
        ({"r": 3}, r"lora_A has the shape \(4, 48\), this model and rank need \(3, 48\)"),
    ],
)
def test_other_adapters_are_refused_by_name(changes, message, tmp_path: Path, capsys):
    folder = write_adapter(tmp_path, "model.layers.0.self_attn.q_proj", 48, **changes)
    error = refuse(capsys, str(folder), "--state-dir", str(tmp_path / "state"))
    assert_match(message, error)
    assert not (tmp_path / "state" / "checkpoints").exists() or not any(
        (tmp_path / "state" / "checkpoints").iterdir()
    )


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("model.layers.0.self_attn.qkv_proj", r"adapts .*qkv_proj, which the service cannot"),
        ("model.embed_tokens", r"adapts model\.embed_tokens, which the service cannot adapt"),
        (
            "model.layers.7.self_attn.q_proj",
            r"adapts model\.layers\.7.*nearest one is model",
        ),
    ],
)
def test_modules_that_the_service_cannot_adapt_are_named(module, message, tmp_path: Path, capsys):
    folder = write_adapter(tmp_path, module, 48)
    assert_match(message, refuse(capsys, str(folder), "--state-dir", str(tmp_path / "state")))


def write_adapter(folder: Path, module: str, size: int, **changes: Any) -> Path:
    name = f"base_model.model.{module}"
    tensors = {
        f"{name}.lora_A.weight": torch.ones(4, size),
        f"{name}.lora_B.weight": torch.ones(size, 4),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    config |= {"base_model_name_or_path": str(tiny_model("llama", tied=False))}
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


def assert_match(pattern: str, text: str) -> None:
    import re

    assert re.search(pattern, text), text
