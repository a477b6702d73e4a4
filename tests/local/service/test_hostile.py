"""Small hostile requests: each is refused by name, and the service keeps working for others.

The service is this module's own, as some of these could end it.
"""

from __future__ import annotations

import functools
import itertools
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import tinker
import zstandard
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

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


def answers(http: httpx.Client) -> None:
    """Others are served: the service's health, what is listed, what a program asks at its start."""
    paths = ["healthz", "training_runs?limit=100", "checkpoints", "sessions", "local/status"]
    for path in [*paths, "get_server_capabilities", "../../oai/api/v1/models"]:
        assert http.get(f"/{path}", timeout=10).status_code == 200, path


LARGE = {
    "lists": b'{"session_id": [' + b"[]," * 2**20 + b"[]]}",
    "objects": b'{"session_id": [' + b'{"a":{}},' * 2**19 + b"1]}",
    "numbers": b'{"session_id": [' + b"0," * 2**22 + b"1]}",
    "texts": b'{"session_id": [' + b'"",' * 2**22 + b"1]}",
}


@pytest.mark.parametrize("kind", LARGE)
def test_bodies_of_many_values_are_not_read(http, kind: str) -> None:
    """A list of two bytes takes 56 in memory, and building it holds up everything else."""
    refused = http.post("/session_heartbeat", content=LARGE[kind])
    assert refused.status_code == 400
    assert "the request body has up to" in refused.json()["detail"]
    answers(http)


def test_a_few_compressed_bytes_do_not_become_many(http) -> None:
    body = zstandard.ZstdCompressor().compress(b"\0" * 2**28)
    assert len(body) < 2**16
    refused = http.post(
        "/forward_backward",
        content=body,
        headers={"content-encoding": "zstd", "content-type": "application/x-protobuf"},
    )
    assert refused.status_code == 413
    assert "decompressed" in refused.json()["detail"]
    answers(http)


def test_batches_that_compress_well_are_still_read(http, run) -> None:
    data = [datum([5] * 200)] * 64
    body = forward_backward_request_to_proto(
        ForwardBackwardRequest(
            forward_backward_input=ForwardBackwardInput(data=data, loss_fn="cross_entropy"),
            model_id=run.model_id,
            seq_id=900,
        )
    )
    packed = zstandard.ZstdCompressor().compress(body.SerializeToString())
    headers = {"content-encoding": "zstd", "content-type": "application/x-protobuf"}
    accepted = http.post("/forward_backward", content=packed, headers=headers)
    assert accepted.status_code == 200, accepted.text


def test_another_program_that_writes_to_the_index_holds_up_no_reading(service, http) -> None:
    """The service answers even if more changes wait for the lock than it has threads."""
    other = sqlite3.connect(service.state_dir / "index.sqlite3", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        with ThreadPoolExecutor(12) as pool:
            create = functools.partial(http.post, "/create_session", json={"tags": []})
            waiting = [pool.submit(create) for _ in range(12)]
            time.sleep(0.5)
            for _ in range(3):
                answers(http)
            assert not any(created.done() for created in waiting)
            other.execute("ROLLBACK")
            assert [created.result().status_code for created in waiting] == [200] * 12
    finally:
        other.close()


@pytest.mark.parametrize("optimizer", ["x", 3, [1], {"type": ["adamw"]}, {"type": "dimuon"}])
def test_an_optimizer_that_is_none(run, ask, optimizer) -> None:
    seq_id = 2_000 + len(str(optimizer))
    answer = ask("/optim_step", model_id=run.model_id, seq_id=seq_id, optimizer_params=optimizer)
    assert answer["category"] == "user", answer
    assert "optimizer_params" in answer["error"]


DEEP = {"a": 1}
for _ in range(400):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template_kwargs": DEEP},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": DEEP}}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": DEEP}]}]},
    ],
)
def test_values_in_each_other_are_refused_before_they_are_walked(service, http, fields) -> None:
    body = {"model": service.model, "messages": [{"role": "user", "content": "Hi"}]} | fields
    refused = http.post("../../oai/api/v1/chat/completions", json=body)
    assert refused.status_code == 400, refused.text
    assert "nests lists and objects too deep" in refused.json()["error"]["message"]


def test_refusals_stay_short_whatever_they_quote(run, http, service, sampler, ask) -> None:
    large = "x" * 10**6
    wrong = datum(tokens(5))
    wrong.loss_fn_inputs[large] = wrong.loss_fn_inputs.pop("weights")
    with pytest.raises(tinker.RequestFailedError) as caught:
        run.forward([wrong], "cross_entropy").result()
    assert len(str(caught.value)) < 10_000
    chunks = {"chunks": [[large]]}
    answer = ask("/asample", sampling_session_id=sampling_session(sampler, service), prompt=chunks)
    assert "is not a chunk" in answer["error"]
    assert len(answer["error"]) < 1000
    body = {"model": service.model, "messages": [{"role": "user", "content": "Hi"}], large: 1}
    refused = http.post("../../oai/api/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert len(refused.content) < 10_000
