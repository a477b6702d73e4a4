"""Requests that are small and mean: each is refused by name, and the service goes on for others.

The service is this module's own, as some of these could end it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import tinker

from tests.conftest import ServiceProcess, start_service
from tests.e2e.sdk import datum, fails_as_user_error, is_alive, sample, tokens

WRAPPING = [0, 2**63 - 1, -(2**63), -1, 5]
"""Row bounds whose differences wrap around to 2**63 - 1, 1, 2**63 - 1 and 6."""


@pytest.fixture(scope="module")
def service(tiny_model_folder, tmp_path_factory) -> Iterator[ServiceProcess]:
    service = start_service(tiny_model_folder, tmp_path_factory.mktemp("hostile") / "state")
    yield service
    service.stop()


@pytest.fixture(scope="module")
def client(service) -> tinker.ServiceClient:
    return service.connect()


@pytest.fixture(scope="module")
def run(service, client) -> tinker.TrainingClient:
    return client.create_lora_training_client(base_model=service.model, rank=2).result()


@pytest.fixture(scope="module")
def sampler(service, client) -> tinker.SamplingClient:
    return client.create_sampling_client(base_model=service.model).result()


@pytest.fixture
def http(service) -> Iterator[httpx.Client]:
    headers = {"X-API-Key": service.api_key}
    url = f"{service.base_url}/api/v1"
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        yield client


@pytest.fixture
def ask(http) -> Any:
    """POST something numbered, and return the failure that it ends with."""
    numbers = itertools.count(1_000)

    def post(path: str, **fields: Any) -> dict[str, Any]:
        accepted = http.post(path, json={"seq_id": next(numbers)} | fields)
        if accepted.status_code == 400:
            return {"error": accepted.json()["detail"], "category": "user"}
        request_id = accepted.raise_for_status().json()["request_id"]
        return http.post("/retrieve_future", json={"request_id": request_id}).json()

    return post


def sampling_session(sampler: tinker.SamplingClient, service: ServiceProcess) -> str:
    session = service.connect()
    made = session.create_sampling_client(base_model=service.model).result()
    return made._sampling_session_id


@pytest.mark.parametrize("name", ["target_tokens", "weights"])
def test_row_bounds_that_wrap_around_in_training(run, name: str) -> None:
    wrong = datum(tokens(5))
    dtype = "int64" if name == "target_tokens" else "float32"
    wrong.loss_fn_inputs[name] = tinker.TensorData(
        data=[1, 2, 3, 4, 5],
        dtype=dtype,
        shape=[4, 3],
        sparse_crow_indices=WRAPPING,
        sparse_col_indices=[0, 1, 2, 0, 1],
    )
    match = rf"data\[0\]\.loss_fn_inputs\['{name}'\]\.crow_indices must begin at 0, never fall"
    for call in (run.forward, run.forward_backward):
        fails_as_user_error(lambda call=call: call([wrong], "cross_entropy").result(), match)
    assert is_alive(run)


def test_row_bounds_that_wrap_around_in_sampling(service, sampler, ask) -> None:
    targets = {
        "dtype": "int64",
        "data": [1, 2, 3, 4, 5],
        "shape": [4, 3],
        "sparse_crow_indices": WRAPPING,
        "sparse_col_indices": [0, 1, 2, 0, 1],
    }
    answer = ask(
        "/asample",
        sampling_session_id=sampling_session(sampler, service),
        prompt={"chunks": [{"type": "encoded_text", "tokens": tokens(5)}]},
        sampling_params={"max_tokens": 1},
        target_prompt_logprobs=targets,
    )
    assert answer["category"] == "user"
    assert "target_prompt_logprobs.crow_indices must begin at 0, never fall" in answer["error"]
    assert sample(sampler, tokens(4)).sequences
