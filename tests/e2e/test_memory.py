"""A service with little patience: idle runs and samplers wait on disk, models load when needed."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import start_service
from tests.e2e.sdk import batch, fails_promptly, forward, is_alive, sample, tokens, train_step
from tests.tiny_models import tiny_model
from tinker_cookbook.utils.sdk_sessions import close_session

SPILL_SECONDS = 0.5


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("memory")
    allowed = folder / "models"
    shutil.copytree(tiny_model("qwen2"), allowed / "team" / "tiny-qwen2")
    (allowed / "outside").symlink_to(tiny_model("qwen3"))
    service = start_service(
        *(tiny_model(tied=False), folder / "state"),
        *("--spill-after", str(SPILL_SECONDS), "--models-dir", str(allowed), "--memory-gib", "4"),
    )
    yield service
    service.stop()


@pytest.fixture(scope="module")
def client(service):
    client = service.connect()
    yield client
    close_session(client, "success")  # the SDK's own call has been seen to wait for minutes


def files(service) -> list[Path]:
    return list(Path(service.state_dir).glob("staging/*/spill/*.safetensors"))


def wait_for_files(service, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(files(service)) != count:
        assert time.monotonic() < deadline, files(service)
        time.sleep(0.05)


def test_idle_runs_go_on_exactly_where_they_were(service, client) -> None:
    options = {"base_model": service.model, "rank": 4, "seed": 0}
    straight, patient = (client.create_lora_training_client(**options).result() for _ in range(2))
    for step in range(3):
        train_step(straight, batch(seed=step))
    for step in range(3):
        wait_for_files(service, 2)
        train_step(patient, batch(seed=step))
    sampler = patient.save_weights_and_get_sampling_client().result()
    before = sample(sampler, tokens(5), max_tokens=6, seed=1).sequences[0]
    wait_for_files(service, 3)
    after = sample(sampler, tokens(5), max_tokens=6, seed=1).sequences[0]
    assert (after.tokens, after.logprobs) == (before.tokens, before.logprobs)
    for one, other in zip(forward(straight, batch()), forward(patient, batch()), strict=True):
        np.testing.assert_array_equal(one, other)


def test_closing_a_session_removes_its_files(service_factory) -> None:
    service = service_factory(tiny_model(tied=False), "--spill-after", str(SPILL_SECONDS))
    client = service.connect()
    run = client.create_lora_training_client(base_model=service.model, rank=4).result()
    run.save_weights_and_get_sampling_client().result()
    wait_for_files(service, 2)
    close_session(client, "success")
    wait_for_files(service, 0)


def test_any_model_of_an_allowed_folder(service, client) -> None:
    run = client.create_lora_training_client(base_model="team/tiny-qwen2", rank=4).result()
    assert run.get_info().model_data.arch == "qwen2"
    assert is_alive(run)
    sampler = run.save_weights_and_get_sampling_client().result()
    assert sample(sampler, tokens(5)).sequences


@pytest.mark.parametrize("name", ["outside", "../models/outside", "/etc", "team", "", "team/none"])
def test_no_model_outside_of_it(service, client, name: str) -> None:
    fails_promptly(
        lambda: client.create_lora_training_client(base_model=name, rank=4).result(), "base_model"
    )


def test_a_service_with_too_little_memory_says_how_much_is_missing(tmp_path) -> None:
    service = start_service(tiny_model(tied=False), tmp_path / "state", "--memory-gib", "0.05")
    try:
        client = service.connect()
        fails_promptly(
            lambda: client.create_lora_training_client(base_model=service.model).result(),
            r"needs about .* of memory and 0\.0 MiB are free",
        )
    finally:
        service.stop()
