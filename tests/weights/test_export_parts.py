"""Parts of the merge that programs import."""

from pathlib import Path

import pytest

from tinker_cookbook.weights import _export


def test_configuration_and_small_files(tiny_model_folder: Path, tmp_path: Path):
    config = _export.load_config_dict(tiny_model_folder)
    assert config["model_type"] == "llama"
    assert not _export.is_multimodal_from_dict(config)
    assert _export.is_multimodal_from_dict({"vision_config": {"depth": 1}})
    output = tmp_path / "out"
    output.mkdir()
    _export.save_tokenizer_and_processor(str(tiny_model_folder), output, multimodal=False)
    assert (output / "tokenizer.json").exists()
    assert not list(output.glob("*.safetensors"))
    _export.cleanup_on_failure(output)
    assert not output.exists()


def test_code_of_a_model_runs_only_if_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TRUST_REMOTE_CODE", raising=False)
    assert not _export.resolve_trust_remote_code(None)
    monkeypatch.setenv("HF_TRUST_REMOTE_CODE", "1")
    assert _export.resolve_trust_remote_code(None)
    assert not _export.resolve_trust_remote_code(False)
