"""Saved adapters in other tools: PEFT loads and merges them, and knows which weights they fit."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.local.engine.training_data import FORMATS, make_run, random_datum
from tests.tiny_models import build_tiny_model, tiny_model
from tinker_cookbook.local.engine.model.adapter_origin import WeightsOrigin, find_origin
from tinker_cookbook.local.engine.model.lora import read_base_model_name
from tinker_cookbook.local.engine.settings import EngineSettings
from tinker_cookbook.local.engine.types import LoraSpec, LossSpec, TrainDatum
from tinker_cookbook.local.engine.worker import EngineWorker
from tinker_cookbook.unembedding import choose_train_unembed

SECONDS = 60
CROSS_ENTROPY = LossSpec("cross_entropy")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def _merged_logprobs(base: Path, adapter: Path, datum: TrainDatum) -> np.ndarray:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    targets = np.asarray(datum.loss_inputs["target_tokens"])
    with torch.no_grad():
        logits = merged(torch.from_numpy(datum.tokens).long()[None]).logits[0]
    return torch.log_softmax(logits, -1).numpy()[np.arange(len(targets)), targets]


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_a_default_run_makes_is_the_same_merged(
    tmp_path: Path, architecture: str, tied: bool
) -> None:
    folder = tiny_model(architecture, tied=tied)
    run = make_run(
        folder, LoraSpec(rank=4, seed=1, train_unembed=choose_train_unembed(str(folder)))
    )
    run.save(tmp_path, base_model_name=str(folder), with_optimizer=False)
    assert not (tmp_path / "README.md").exists(), "there is nothing to warn of"
    datum = random_datum(np.random.default_rng(0), 30, run.model.vocab_size)
    ours = run.forward_backward([datum], CROSS_ENTROPY, backward=False).logprobs[0]
    np.testing.assert_allclose(_merged_logprobs(folder, tmp_path, datum), ours, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_tied_head_that_was_asked_for_leaves_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The reason for the warning holds too: merged, the adapter gives another model."""
    folder, saved = str(tiny_model("llama", tied=True)), tmp_path / "adapter"
    saved.mkdir()
    worker = EngineWorker(EngineSettings(dtype="float32", num_threads=1))
    with caplog.at_level(logging.WARNING, logger="tinker_cookbook.local.engine.host"):
        worker.create_run("with", folder, LoraSpec(rank=2, seed=0)).result(SECONDS)
        worker.create_run("without", folder, LoraSpec(rank=2, train_unembed=False)).result(SECONDS)
    worker.save_run("with", saved, with_optimizer=False).result(SECONDS)
    worker.close()
    (message,) = caplog.messages
    assert "run with" in message
    assert "merge_and_unload" in message
    assert "train_unembed=False" in (saved / "README.md").read_text()

    run = make_run(Path(folder), LoraSpec(rank=2, seed=0))
    run.save(saved, base_model_name=folder, with_optimizer=False)
    datum = random_datum(np.random.default_rng(0), 30, run.model.vocab_size)
    ours = run.forward_backward([datum], CROSS_ENTROPY, backward=False).logprobs[0]
    assert np.abs(_merged_logprobs(Path(folder), saved, datum) - ours).max() > 0.1


def test_origin_of_weights(tmp_path: Path) -> None:
    folder = tiny_model("llama")
    assert find_origin(str(folder), folder) == WeightsOrigin(str(folder))
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abc"
    assert find_origin("org/name", snapshot) == WeightsOrigin("org/name", "0123abc")
    assert find_origin("org/name", tmp_path / "made") == WeightsOrigin(str(tmp_path / "made"))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_an_adapter_on_converted_weights_names_them(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default model made out of the package index's file is not the hub's model."""
    from tinker_cookbook.model_files import DEFAULT_MODEL

    monkeypatch.setenv("TINKER_COOKBOOK_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    from tinker_cookbook import model_files

    converted = model_files._converted_folder()
    build_tiny_model(converted, "llama")
    saved = tmp_path / "adapter"
    saved.mkdir()
    worker = EngineWorker(EngineSettings(dtype=str(dtype).removeprefix("torch."), num_threads=1))
    worker.create_run("run", DEFAULT_MODEL, LoraSpec(rank=2, train_unembed=False)).result(SECONDS)
    worker.save_run("run", saved, with_optimizer=True).result(SECONDS)
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(converted)
    assert "not the hub's weights" in (saved / "README.md").read_text()
    # The service still knows the model by its name.
    assert read_base_model_name(saved) == DEFAULT_MODEL
    worker.create_run_from("again", saved, with_optimizer=True).result(SECONDS)
    assert worker.stats()["models"] == 1
    worker.close()
    shutil.rmtree(converted)
