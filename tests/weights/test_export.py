"""What a run made, outside the service: downloaded, as a PEFT adapter, and merged."""

# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import json
import re
import shutil
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
from tinker_cookbook.exceptions import (
    ConfigurationError,
    WeightsAdapterError,
    WeightsDownloadError,
    WeightsMergeError,
)
from tinker_cookbook.weights import (
    ModelCardConfig,
    build_hf_model,
    build_lora_adapter,
    download,
    generate_model_card,
    publish_to_hf_hub,
)
from tinker_cookbook.weights.adapter_files import open_adapter

TOLERANCE = by_format(float32=1e-4, bfloat16=5e-2)
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`:UserWarning"),
]


@pytest.fixture(autouse=True)
def _service(monkeypatch, local_service: ServiceProcess):
    monkeypatch.setenv("TINKER_BASE_URL", local_service.base_url)
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)


class Trained:
    """A run that has moved far from its base model, and its log probabilities."""

    def __init__(self, service: ServiceProcess, *, train_unembed: bool) -> None:
        client = service.connect().create_lora_training_client(
            service.model, rank=4, train_unembed=train_unembed
        )
        run = client.result()
        for number in range(3):
            train_step(run, batch(seed=number), tinker.AdamParams(learning_rate=3e-2))
        self.datum = batch(seed=9)[0]
        result = run.forward([self.datum], "cross_entropy").result()
        self.logprobs = result.loss_fn_outputs[0]["logprobs"].to_numpy()
        self.state_path = run.save_state("done").result().path
        self.sampler_path = run.save_weights_for_sampler("done").result().path

    def difference(self, model: torch.nn.Module) -> float:
        """Return the largest difference from a transformers model, in nats."""
        tokens = torch.tensor(self.datum.model_input.to_ints())
        targets = self.datum.loss_fn_inputs["target_tokens"].to_numpy()
        with torch.no_grad():
            logits = model(tokens[None]).logits[0].float()
        found = torch.log_softmax(logits, -1).numpy()[np.arange(len(targets)), targets]
        return float(np.abs(found - self.logprobs).max())


@pytest.fixture(scope="module")
def trained(local_service: ServiceProcess) -> Trained:
    return Trained(local_service, train_unembed=False)


@pytest.fixture
def adapter(trained: Trained, tmp_path: Path) -> str:
    return download(tinker_path=trained.sampler_path, output_dir=str(tmp_path / "adapter"))


def load_model(folder: str | Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["state_path", "sampler_path"])
def test_a_checkpoint_of_either_kind_is_downloaded(trained: Trained, tmp_path: Path, kind: str):
    folder = download(tinker_path=getattr(trained, kind), output_dir=str(tmp_path / "out"))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in Path(folder).iterdir()
    }
    assert not (Path(folder) / "checkpoint_complete").exists()


def test_the_adapter_in_peft_gives_the_services_logprobs(
    trained: Trained, adapter: str, local_service: ServiceProcess, tmp_path: Path
):
    from peft import PeftModel

    output = tmp_path / "peft"
    build_lora_adapter(
        base_model=local_service.model, adapter_path=adapter, output_path=str(output)
    )
    base = load_model(local_service.model)
    assert trained.difference(base) > 0.3, "training has moved the model"
    assert trained.difference(PeftModel.from_pretrained(base, str(output))) < TOLERANCE


def test_the_adapter_obeys_the_rules_of_vllm_and_sglang(
    adapter: str, local_service: ServiceProcess, tmp_path: Path
):
    """Both read names of this form, one rank, no bias and no trained copies of modules.

    They stack the matrices of q, k, v and of gate, up themselves, and refuse other module names.
    """
    output = tmp_path / "peft"
    build_lora_adapter(
        base_model=local_service.model, adapter_path=adapter, output_path=str(output)
    )
    config = json.loads((output / "adapter_config.json").read_text())
    known = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(config["target_modules"]) <= known
    assert config["peft_type"] == "LORA"
    assert config["bias"] == "none"
    assert not config.keys() & {"modules_to_save", "use_dora", "rank_pattern", "alpha_pattern"}
    form = re.compile(
        r"base_model\.model\.model\.layers\.\d+\.(self_attn|mlp)\.(\w+)\.lora_[AB]\.weight"
    )
    for name, tensor in load_file(output / "adapter_model.safetensors").items():
        found = form.fullmatch(name)
        assert found, name
        assert found[2] in known
        assert tensor.shape[0 if "lora_A" in name else 1] == config["r"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gemma3", "gpt2"])
def test_models_that_run_through_transformers_are_exported(
    kind: str, service_factory, tmp_path: Path, monkeypatch
):
    from peft import PeftModel

    folder = foreign_model(kind)
    service = service_factory(folder)
    monkeypatch.setenv("TINKER_BASE_URL", service.base_url)
    monkeypatch.setenv("TINKER_API_KEY", service.api_key)
    for train_unembed in (False, True):
        trained = Trained(service, train_unembed=train_unembed)
        work = tmp_path / str(train_unembed)
        adapter = download(tinker_path=trained.sampler_path, output_dir=str(work / "adapter"))
        paths: dict[str, Any] = {"base_model": str(folder), "adapter_path": adapter}
        build_hf_model(**paths, output_path=str(work / "merged"), dtype="float32")
        assert trained.difference(load_model(work / "merged")) < TOLERANCE
        if not train_unembed:
            build_lora_adapter(**paths, output_path=str(work / "peft"))
            model = PeftModel.from_pretrained(load_model(folder), str(work / "peft"))
            assert trained.difference(model) < TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merged_model_gives_the_services_logprobs(
    trained: Trained, adapter: str, local_service: ServiceProcess, tmp_path: Path, dtype: str
):
    output = tmp_path / "merged"
    build_hf_model(
        base_model=local_service.model,
        adapter_path=adapter,
        output_path=str(output),
        dtype=dtype,
    )
    # A weight that is rounded to 8 bits is off by 0.4 % at most.
    tolerance = TOLERANCE if dtype == "float32" else 0.3
    assert trained.difference(load_model(output)) < tolerance
    config = json.loads((output / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == dtype
    assert (output / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_tied_output_embedding_is_untied_where_the_adapter_changes_it(
    service_factory, tmp_path: Path, monkeypatch
):
    folder = tiny_model(tied=True)
    service = service_factory(folder)
    monkeypatch.setenv("TINKER_BASE_URL", service.base_url)
    monkeypatch.setenv("TINKER_API_KEY", service.api_key)
    trained = Trained(service, train_unembed=True)
    adapter = download(tinker_path=trained.sampler_path, output_dir=str(tmp_path / "adapter"))
    output = tmp_path / "merged"
    build_hf_model(
        base_model=str(folder), adapter_path=adapter, output_path=str(output), dtype="float32"
    )
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    assert trained.difference(load_model(output)) < TOLERANCE
    with pytest.raises(WeightsAdapterError, match=r"adapts lm_head, which vLLM.*build_hf_model"):
        build_lora_adapter(
            base_model=str(folder), adapter_path=adapter, output_path=str(tmp_path / "peft")
        )
    assert not (tmp_path / "peft").exists()


def test_an_adapter_without_effect_gives_the_base_model_bit_for_bit(
    adapter: str, local_service: ServiceProcess, tmp_path: Path
):
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    zeroed = {name: t * 0 if "lora_B" in name else t for name, t in tensors.items()}
    save_file(zeroed, Path(adapter) / "adapter_model.safetensors")
    output = tmp_path / "merged"
    build_hf_model(
        base_model=local_service.model,
        adapter_path=adapter,
        output_path=str(output),
        dtype="float32",
    )
    base = load_file(Path(local_service.model) / "model.safetensors")
    merged = load_file(output / "model.safetensors")
    assert base.keys() == merged.keys()
    assert all(torch.equal(base[name].float(), merged[name]) for name in base)


def test_names_of_the_hosted_service_are_understood(tmp_path: Path):
    """Stacks of experts, a matrix that all experts share, and its name of the output embedding."""
    prefix = "base_model.model.model.layers.0.mlp.experts"
    rng = torch.Generator().manual_seed(0)
    tensors = {
        f"{prefix}.w1.lora_A.weight": torch.randn(1, 2, 6, generator=rng),
        f"{prefix}.w1.lora_B.weight": torch.randn(3, 5, 2, generator=rng),
        "base_model.model.model.unembed_tokens.lora_A.weight": torch.randn(2, 6, generator=rng),
        "base_model.model.model.unembed_tokens.lora_B.weight": torch.randn(9, 2, generator=rng),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    with open_adapter(tmp_path) as adapter:
        assert adapter.scale == 4
        assert set(adapter.matrices) == {
            "lm_head",
            *(f"model.layers.0.mlp.experts.{number}.gate_proj" for number in range(3)),
        }
        for number in range(3):
            matrices = adapter.matrices[f"model.layers.0.mlp.experts.{number}.gate_proj"]
            assert torch.equal(matrices.a, tensors[f"{prefix}.w1.lora_A.weight"][0])
            assert torch.equal(matrices.b, tensors[f"{prefix}.w1.lora_B.weight"][number])


def test_what_cannot_be_exported_is_named_and_leaves_nothing(
    adapter: str, local_service: ServiceProcess, tmp_path: Path
):
    output = str(tmp_path / "out")

    def merge(**changes: object) -> None:
        options: dict[str, object] = {
            "base_model": local_service.model,
            "adapter_path": adapter,
            "output_path": output,
        }
        build_hf_model(**options | changes)  # pyright: ignore[reportArgumentType]

    with pytest.raises(ConfigurationError, match="dtype='int8' is unknown; use one of bfloat16"):
        merge(dtype="int8")
    with pytest.raises(ConfigurationError, match="quantize='fp8' is not supported"):
        merge(quantize="fp8")
    with pytest.raises(WeightsAdapterError, match=r"adapter_config\.json cannot be read"):
        merge(adapter_path=str(tmp_path))
    other = tiny_model("llama", tied=False, num_layers=1)
    with pytest.raises(WeightsMergeError, match=r"layers\.1\..*does not have as a separate weight"):
        merge(base_model=str(other))
    (Path(adapter) / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(WeightsAdapterError, match=r"adapter_model\.safetensors cannot be read"):
        merge()
    assert not Path(output).exists()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(ConfigurationError, match="exists and is not an empty folder"):
        merge()
    assert (tmp_path / "out" / "mine").exists()


def test_a_full_disk_leaves_nothing(
    adapter: str, local_service: ServiceProcess, tmp_path: Path, monkeypatch
):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(OSError, match="No space left"):
        build_hf_model(
            base_model=local_service.model,
            adapter_path=adapter,
            output_path=str(tmp_path / "out"),
        )
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_downloads_that_cannot_be_had_are_named(trained: Trained, tmp_path: Path):
    with pytest.raises(WeightsDownloadError, match="must begin with tinker://"):
        download(tinker_path="nothing", output_dir=str(tmp_path / "a"))
    missing = trained.sampler_path.replace("/done", "/missing")
    with pytest.raises(WeightsDownloadError, match=r"missing cannot be downloaded: HTTP 404"):
        download(tinker_path=missing, output_dir=str(tmp_path / "a"))
    missing = trained.state_path.replace("/done", "/missing")
    with pytest.raises(WeightsDownloadError, match="missing cannot be downloaded"):
        download(tinker_path=missing, output_dir=str(tmp_path / "a"))
    assert list(tmp_path.iterdir()) == []


def test_a_model_card_states_base_data_settings_and_results(adapter: str):
    config = ModelCardConfig(
        base_model="Qwen/Qwen3-8B",
        datasets=["me/data"],
        license="apache-2.0",
        language=["en"],
        settings={"learning_rate": "0.0003"},
        results={"test/nll": 1.23456},
    )
    card = generate_model_card(config=config, repo_id="me/mine", model_path=adapter)
    assert card.data.base_model == "Qwen/Qwen3-8B"
    assert card.data.library_name == "peft"
    assert "# mine" in card.text
    assert "| learning_rate | 0.0003 |" in card.text
    assert "| test/nll | 1.235 |" in card.text


def test_only_models_are_published(tmp_path: Path):
    with pytest.raises(ConfigurationError, match=r"has neither config\.json nor adapter_config"):
        publish_to_hf_hub(model_path=str(tmp_path), repo_id="me/mine")
