"""The export command: forms, the comparison with the service, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import tinker

from tests.conftest import ServiceProcess
from tests.e2e.sdk import batch, train_step
from tinker_cookbook import cli

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def checkpoint(local_service: ServiceProcess) -> str:
    client = local_service.connect()
    run = client.create_lora_training_client(
        local_service.model, rank=4, train_unembed=False
    ).result()
    for number in range(3):
        train_step(run, batch(seed=number), tinker.AdamParams(learning_rate=3e-2))
    return run.save_weights_for_sampler("done").result().path


@pytest.fixture(autouse=True)
def _service(monkeypatch, local_service: ServiceProcess):
    monkeypatch.setenv("TINKER_BASE_URL", local_service.base_url)
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_the_export_is_the_services_model(checkpoint: str, tmp_path: Path, capsys, form: str):
    folder = tmp_path / "out"
    words = ["export", checkpoint, str(folder), "--as", form, "--dtype", "float32", "--check"]
    assert cli.main([*words, "--max-kl", "1e-4"]) == 0, capsys.readouterr()
    out = capsys.readouterr().out
    assert f"{form:<8} {folder}" in out
    assert "nats per token, ok" in out


def test_another_model_does_not_pass_the_check(
    checkpoint: str, local_service: ServiceProcess, tmp_path: Path, capsys, monkeypatch
):
    """The untrained base model, in place of what was exported."""
    from tinker_cookbook import weights

    def write_base(*, base_model: str, adapter_path: str, output_path: str, dtype: str) -> None:
        import shutil

        shutil.copytree(base_model, output_path)

    monkeypatch.setattr(weights, "build_hf_model", write_base)
    assert cli.main(["export", checkpoint, str(tmp_path / "out"), "--check"]) == 1
    assert "above 0.01" in capsys.readouterr().out


def test_mistakes_are_named(checkpoint: str, tmp_path: Path, capsys):
    assert cli.main(["export", "nothing", str(tmp_path / "out")]) == 2
    assert "PATH=nothing must begin with tinker://" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    assert cli.main(["export", checkpoint, str(tmp_path / "full")]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert cli.main(["export", f"{checkpoint}x", str(tmp_path / "out")]) == 2
    assert "cannot be found" in capsys.readouterr().err
