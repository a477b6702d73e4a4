"""Claims of SECURITY.md that no other test holds."""

from __future__ import annotations

import ast
import asyncio
import hmac
import os
from pathlib import Path

import httpx
import pytest

from tests.conftest import ServiceProcess
from tests.e2e.sdk import batch, train_step
from tinker_cookbook.local.app import build_app
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.service.protocol import http as service_http
from tinker_cookbook.local.service.protocol.auth import Authenticator, DownloadLink
from tinker_cookbook.local.service.settings import ServiceSettings
from tinker_cookbook.local.service.state.core import Service
from tinker_cookbook.local.service.storage.loss_curves import ProgressLog
from tinker_cookbook.local.service.storage.store import NewCheckpoint

ROOT = Path(__file__).parents[3]
KEY = "tml-0123456789abcdef0123"
FORBIDDEN_MODULES = ("pickle", "marshal", "shelve", "dill", "cloudpickle")
FORBIDDEN_CALLS = ("eval", "exec", "compile", "__import__")


def test_no_code_of_the_service_unpickles_or_evaluates() -> None:
    for path in sorted((ROOT / "tinker_cookbook" / "local").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            if isinstance(node, ast.Import | ast.ImportFrom):
                names.append(getattr(node, "module", None) or "")
                assert not {name.split(".")[0] for name in names} & set(FORBIDDEN_MODULES), path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in FORBIDDEN_CALLS, f"{path}:{node.lineno}"
                assert called not in ("torch.load", "np.load", "numpy.load", "yaml.load"), path


def test_secrets_are_compared_in_constant_time(monkeypatch) -> None:
    compared = []
    real = hmac.compare_digest

    def watched(a, b):
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    auth = Authenticator(KEY)
    for check in (auth.accepts, auth.accepts_status):
        compared.clear()
        assert not check("tml-wrong")
        assert compared, check
    compared.clear()
    link = auth.sign_link(DownloadLink("folder", "file", 2e9))
    assert auth.read_link(link[:-2] + "xx") is None
    assert compared


@pytest.fixture
def store_with_checkpoint(tmp_path):
    service = Service(ServiceSettings(tmp_path / "state", ("some/model",), KEY))
    store = service.store
    staged = store.stage()
    (staged / "adapter_model.safetensors").write_bytes(b"weights")
    new = NewCheckpoint("s:train:0", "weights", "x", has_optimizer=False)
    yield store, store.commit(staged, new)
    store.close()


def test_links_inside_a_checkpoint_are_refused(store_with_checkpoint, tmp_path) -> None:
    store, row = store_with_checkpoint
    assert store.verify(row)
    outside = tmp_path / "secret"
    outside.write_bytes(b"weights")  # the same bytes, so the hash alone would not tell
    file = store.folder(row) / "adapter_model.safetensors"
    file.unlink()
    file.symlink_to(outside)
    with pytest.raises(UserError, match="link"):
        store.verify(row)
    with pytest.raises(UserError, match="link"):
        store.weight_files(row)


def test_a_manifest_cannot_point_outside(store_with_checkpoint, tmp_path) -> None:
    store, row = store_with_checkpoint
    (tmp_path / "secret").write_bytes(b"x")
    manifest = store.folder(row) / "checkpoint.json"
    text = manifest.read_text().replace(
        "adapter_model.safetensors", os.path.relpath(tmp_path / "secret", store.folder(row))
    )
    manifest.write_text(text)
    for read in (store.verify, store.weight_files):
        with pytest.raises(UserError, match="damaged"):
            read(row)


def test_run_ids_do_not_become_paths(tmp_path) -> None:
    log = ProgressLog(tmp_path / "state")
    for run_id in ("../../x", "/etc/passwd", "a" * 5000, "a\0b"):
        assert log._path(run_id).parent == tmp_path / "state" / "curves"
        assert log.curve(run_id) == []


def test_paths_of_requests_stay_inside(local_service: ServiceProcess, service_client) -> None:
    run = service_client.create_lora_training_client(base_model=local_service.model, rank=2)
    run = run.result()
    train_step(run, batch())
    headers = {"X-API-Key": local_service.api_key}
    url = f"{local_service.base_url}/api/v1"
    for name in ("../../key", "..%2f..%2fkey", "%2e%2e/key", "a/../../key", "key%00"):
        for path in (
            f"training_runs/{run.model_id}/checkpoints/weights/{name}/archive",
            f"training_runs/{name}/checkpoints",
            f"download/{name}/{name}",
            f"local/curves/{name}",
        ):
            answer = httpx.get(f"{url}/{path}", headers=headers)
            assert 400 <= answer.status_code < 500, (path, answer.status_code)
            assert local_service.api_key not in answer.text


@pytest.mark.anyio
async def test_a_body_must_arrive_in_time(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(service_http, "BODY_SECONDS", 0.1)
    service = Service(ServiceSettings(tmp_path / "state", ("some/model",), KEY))

    async def trickle():
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    transport = httpx.ASGITransport(build_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.post(
            "/api/v1/create_session", content=trickle(), headers={"X-API-Key": KEY}
        )
    assert answer.status_code == 408
    assert "body" in answer.json()["detail"]
    service.store.close()
