"""Disks that fail under a running service: errors name the file, and the rest keeps working."""

from __future__ import annotations

import contextlib
import resource
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import tinker

from tests.conftest import ServiceProcess, start_service
from tests.e2e.sdk import batch, fails_promptly, forward, is_alive, sample, tokens, train_step
from tests.local.service.disks import without_special_rights
from tinker_cookbook.utils.sdk_sessions import close_session


@pytest.fixture(scope="module")
def service(tiny_model_folder, tmp_path_factory) -> Iterator[ServiceProcess]:
    service = start_service(tiny_model_folder, tmp_path_factory.mktemp("damage") / "state")
    yield service
    service.stop()


@pytest.fixture
def client(service) -> Iterator[tinker.ServiceClient]:
    client = service.connect()
    yield client
    close_session(client, "success")


def new_run(service: ServiceProcess, client: tinker.ServiceClient) -> tinker.TrainingClient:
    return client.create_lora_training_client(base_model=service.model, rank=64).result()


@contextmanager
def no_space(service: ServiceProcess, num_bytes: int) -> Iterator[None]:
    """No file of the service can grow beyond so many bytes; 0 is a disk without any room."""
    _, hard = resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.parametrize("num_bytes", [0, 100_000])
def test_a_full_disk(service, client, num_bytes: int) -> None:
    """Saving fails with the file's name, training and sampling continue, later saving works."""
    run = new_run(service, client)
    kept = run.save_state(f"before-{num_bytes}").result().path
    sampler = client.create_sampling_client(base_model=service.model).result()
    with no_space(service, num_bytes):
        for save in (run.save_state, run.save_weights_for_sampler):
            fails_promptly(lambda save=save: save("full").result(), r"state/(staging|index)\S+")
        train_step(run, batch())
        assert sample(sampler, tokens(4)).sequences
        assert run.get_info().model_id == run.model_id
    if num_bytes == 0:
        # nothing half-written is listed
        rest = tinker.RestClient(base_url=service.base_url, api_key=service.api_key)
        listed = rest.list_checkpoints(run.model_id).result().checkpoints
        assert [checkpoint.tinker_path for checkpoint in listed] == [kept]
    path = run.save_state("later").result().path
    again = client.create_training_client_from_state_with_optimizer(path).result()
    assert [a.tolist() for a in forward(again, batch())] == [
        a.tolist() for a in forward(run, batch())
    ]
    assert is_alive(again)


def test_no_session_on_a_full_disk_is_a_prompt_error(service) -> None:
    with no_space(service, 0):
        fails_promptly(
            lambda: service.connect().create_sampling_client(base_model=service.model).result(),
            r"index\.sqlite3",
        )
    client = service.connect()
    assert client.create_sampling_client(base_model=service.model).result()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody without special rights can make or remove a file below a folder."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o500)
    try:
        yield
    finally:
        for path in folders:
            path.chmod(0o700)


def test_a_folder_that_turns_read_only(tiny_model_folder, tmp_path) -> None:
    """Saving names the folder, the rest continues; once it is writable, saving works."""
    wrapper = without_special_rights()
    service = start_service(tiny_model_folder, tmp_path / "state", wrapper=wrapper)
    client = service.connect()
    run = new_run(service, client)
    kept = run.save_state("kept").result().path
    with read_only(service.state_dir):
        for save in (run.save_state, run.save_weights_for_sampler):
            fails_promptly(lambda save=save: save("no").result(), r"(Permission|read-only).*state/")
        train_step(run, batch())
        sampler = client.create_sampling_client(base_model=service.model).result()
        assert sample(sampler, tokens(4)).sequences
        assert is_alive(new_run(service, client))
        again = client.create_training_client_from_state_with_optimizer(kept).result()
        assert is_alive(again)
    assert is_alive(run)
    path = run.save_state("later").result().path
    assert is_alive(client.create_training_client_from_state_with_optimizer(path).result())
    close_session(client, "success")
    service.stop()


def checkpoint_folder(service: ServiceProcess, path: str) -> Path:
    with contextlib.closing(sqlite3.connect(service.state_dir / "index.sqlite3")) as index:
        found = index.execute(
            "SELECT folder FROM checkpoints WHERE run_id=? AND segment=? AND name=?",
            path.removeprefix("tinker://").split("/"),
        ).fetchone()
    return Path(service.state_dir) / "checkpoints" / found[0]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = [
    ("adapter_model.safetensors", cut),
    ("adapter_model.safetensors", change),
    ("adapter_model.safetensors", Path.unlink),
    ("optimizer.safetensors", change),
    ("adapter_config.json", cut),
    ("checkpoint.json", cut),
    ("checkpoint.json", Path.unlink),
    ("", shutil.rmtree),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_others_load(service, client, name, damage) -> None:
    run = new_run(service, client)
    train_step(run, batch())
    good = run.save_state("good")
    bad = run.save_state("bad").result().path
    sampler_path = run.save_weights_for_sampler("bad").result().path
    damage(checkpoint_folder(service, bad) / name)
    fails_promptly(
        lambda: client.create_training_client_from_state_with_optimizer(bad).result(),
        name or "checkpoint.json",
    )
    again = client.create_training_client_from_state_with_optimizer(good.result().path).result()
    assert is_alive(again)
    assert is_alive(run)
    other = client.create_sampling_client(model_path=sampler_path).result()
    assert sample(other, tokens(4)).sequences


def test_a_damaged_index_is_built_again_at_the_next_start(tiny_model_folder, tmp_path) -> None:
    service = start_service(tiny_model_folder, tmp_path / "state")
    client = service.connect()
    run = new_run(service, client)
    path = run.save_state("kept").result().path
    shared = run.save_weights_for_sampler("shared", ttl_seconds=7200).result().path
    rest = tinker.RestClient(base_url=service.base_url, api_key=service.api_key)
    rest.set_checkpoint_ttl_from_tinker_path(path, 3600).result()
    rest.set_checkpoint_ttl_from_tinker_path(shared, None).result()
    rest.publish_checkpoint_from_tinker_path(shared).result()
    listed = rest.list_checkpoints(run.model_id).result()
    service.process.kill()
    service.process.wait()
    for file in service.state_dir.glob("index.sqlite3-*"):
        file.unlink()
    (service.state_dir / "index.sqlite3").write_bytes(b"\xff" * 9999)
    after = start_service(tiny_model_folder, tmp_path / "state")
    try:
        assert "index.sqlite3 is damaged" in after.log()
        again = after.connect().create_training_client_from_state_with_optimizer(path).result()
        assert is_alive(again)
        rest = tinker.RestClient(base_url=after.base_url, api_key=after.api_key)
        assert rest.list_checkpoints(run.model_id).result() == listed
    finally:
        after.stop()


@pytest.mark.parametrize("fault", ["full", "damaged"])
def test_an_archive_that_cannot_be_written_leaves_nothing(service, client, fault: str) -> None:
    """SDKs up to 0.35 download a checkpoint as one file, which the service writes first."""
    run = new_run(service, client)
    run.save_weights_for_sampler(fault).result()
    headers = {"X-API-Key": service.api_key}
    url = f"{service.base_url}/api/v1/training_runs/{run.model_id}"
    link = httpx.get(f"{url}/checkpoints/sampler_weights/{fault}/archive", headers=headers)
    assert link.status_code == 302
    if fault == "full":
        with no_space(service, 4096):
            answer = httpx.get(link.headers["location"])
    else:
        folders = (service.state_dir / "checkpoints").iterdir()
        newest = max(folders, key=lambda folder: folder.stat().st_mtime_ns)
        (newest / "adapter_model.safetensors").unlink()
        answer = httpx.get(link.headers["location"])
    assert answer.status_code == 400, answer.text
    assert str(service.state_dir) in answer.json()["detail"]
    assert not list((service.state_dir / "staging").glob("*/*"))
    assert is_alive(run)


def test_a_link_to_a_file_that_is_gone_is_refused(service, client) -> None:
    path = new_run(service, client).save_weights_external("gone").result().path
    rest = tinker.RestClient(base_url=service.base_url, api_key=service.api_key)
    urls = rest.get_external_weights_urls(path).result().urls
    for folder in (service.state_dir / "checkpoints").glob("*"):
        (folder / "adapter_model.safetensors").unlink(missing_ok=True)
    answer = httpx.get(urls["adapter_model.safetensors"])
    assert answer.status_code == 400, answer.text
    assert "is missing; the checkpoint is damaged" in answer.json()["detail"]
