"""The SDK's own command line against the service (CLI)."""

# pyright: reportOptionalMemberAccess=false

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.sdk import batch, train_step


@pytest.fixture(scope="module")
def cli(local_service):
    import os

    settings = {"TINKER_BASE_URL": local_service.base_url, "TINKER_API_KEY": local_service.api_key}

    def run(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        program = "from tinker.cli.__main__ import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env=os.environ | settings,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def run(new_run):
    client = new_run(rank=8)
    train_step(client, batch())
    return client


@pytest.mark.slow
def test_cli_01_models_and_runs(cli, run, local_service) -> None:
    assert local_service.model in cli("--format", "json", "model", "list").stdout
    assert run.model_id in cli("--format", "json", "run", "list").stdout
    assert run.model_id in cli("run", "info", run.model_id).stdout


@pytest.mark.slow
def test_cli_02_and_03_checkpoints(cli, run, rest) -> None:
    path = run.save_state("cli-02").result().path
    assert path in cli("--format", "json", "checkpoint", "list", "--run-id", run.model_id).stdout
    assert "cli-02" in cli("--format", "json", "checkpoint", "list").stdout
    assert "cli-02" in cli("checkpoint", "info", path).stdout
    cli("checkpoint", "publish", path)
    assert find(rest, path).public
    cli("checkpoint", "unpublish", path)
    cli("checkpoint", "set-ttl", path, "--ttl", "7200")
    assert find(rest, path).expires_at is not None
    cli("checkpoint", "delete", "--yes", path)
    assert find(rest, path) is None


def find(rest, path: str):
    checkpoints = rest.list_checkpoints(path.split("/")[2]).result().checkpoints
    return next((item for item in checkpoints if item.tinker_path == path), None)


@pytest.mark.slow
def test_cli_04_download_leaves_nothing_behind(cli, run, rest, tmp_path: Path) -> None:
    path = run.save_state("cli-04").result().path
    before = rest.list_user_checkpoints(limit=1000).result().checkpoints
    cli("checkpoint", "download", path, "--output", str(tmp_path))
    (config,) = tmp_path.rglob("adapter_config.json")
    assert json.loads(config.read_text())["r"] == 8
    assert (config.parent / "adapter_model.safetensors").stat().st_size > 1000
    after = rest.list_user_checkpoints(limit=1000).result().checkpoints
    assert [item.tinker_path for item in after] == [item.tinker_path for item in before]


@pytest.mark.slow
def test_cli_05_whoami(cli) -> None:
    assert "tml:user:local" in cli("auth", "whoami").stdout


@pytest.mark.slow
def test_cli_06_clean_errors(cli) -> None:
    done = cli("run", "info", "nobody:train:0", check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "nobody" in done.stdout + done.stderr


@pytest.mark.slow
def test_cli_07_trace_and_billing(cli, run, tmp_path: Path) -> None:
    target = tmp_path / "trace.pftrace"
    session = run.model_id.partition(":")[0]
    cli("session", "export-trace", session, "--output", str(target))
    assert json.loads(target.read_text())["traceEvents"]
    cli("billing", "usage", check=False)
