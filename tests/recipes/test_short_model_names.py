"""Recipes with a model of `--models-dir` that is named by the end of its path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from recipes import rl_basic, sl_basic, sl_loop
from tests.conftest import ServiceProcess
from tests.recipes.recipe_process import run_in_this_process
from tests.recipes.rl_runs import SMALL
from tests.tiny_models import tiny_model
from tinker_cookbook import service
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.tokenizer_utils import get_tokenizer

SUPERVISED = {"max_steps": 2, "lora_rank": 2, "batch_size": 2, "max_length": 64, "test_size": 2}


@pytest.fixture
def folder_service(service_factory, tmp_path: Path, monkeypatch) -> ServiceProcess:
    """Serves one model, and those of a folder: `other` is one of them."""
    models = tmp_path / "of a team"
    shutil.copytree(tiny_model("qwen2"), models / "other")
    served = service_factory(tiny_model(tied=False), "--models-dir", str(models))
    monkeypatch.setenv("TINKER_BASE_URL", served.base_url)
    monkeypatch.setenv("TINKER_API_KEY", served.api_key)
    return served


def test_a_short_name_is_resolved_once(folder_service, tmp_path: Path, capsys) -> None:
    full = str(tmp_path / "of a team" / "other")
    assert service.resolve_model(None, "other") == full
    assert service.resolve_model(None, full) == full
    with pytest.raises(ConfigurationError, match="model_name=another is not offered"):
        service.resolve_model(None, "another")
    with service.connect(None, "other"):
        assert len(get_tokenizer("other")) == len(get_tokenizer(full))
    for module, settings in ((sl_basic, SUPERVISED), (sl_loop, SUPERVISED), (rl_basic, SMALL)):
        log_path = tmp_path / module.__name__
        given = {"model_name": "other", "renderer_name": "chatml", "log_path": log_path} | settings
        run_in_this_process(module, [f"{key}={value}" for key, value in given.items()])
        assert f"model    {full}\n" in capsys.readouterr().out
        rows = (log_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(row)["step"] for row in rows] == [0, 1, 2]
