"""Thousands of wrong requests: never a 5xx, never a hang, and the service still works."""

import os
import random
import string
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types.forward_backward_input import ForwardBackwardInput
from tinker.types.forward_backward_request import ForwardBackwardRequest

from tests.conftest import ServiceProcess
from tests.e2e.sdk import batch, forward, sample, tokens, train_step
from tinker_cookbook.utils.sdk_sessions import close_session

NUM_REQUESTS = int(os.environ.get("TINKER_COOKBOOK_TEST_FUZZ", "250"))

JUNK: list[Any] = [None, True, 0, -1, 1.5, 2**31, 2**63, -(2**63), 1e308, 10**400, "", "x", "a/b"]
JUNK += ["../../etc/passwd", "tinker://a/weights/b", "\0", "☃" * 50, [], [[]], {}, {"type": "x"}]
JUNK += [[1, "a"], {"chunks": [{"tokens": [1]}]}, "x" * 5000]


LOSS_NODE: dict[str, Any] = {"op": "call_function", "name": "x", "target": "torch.exp"}
LOSS_NODE |= {"args": [{"ref": "logprobs"}], "kwargs": {"dim": 0}}


class Fuzzer:
    """Bodies like the SDK's with some values replaced."""

    def __init__(self, seed: int, session: str, run: str, sampler: str) -> None:
        self.random = random.Random(seed)
        self.next_seq = 1
        model = {"model_id": run, "seq_id": 0}
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}
        self.templates: list[tuple[str, str, dict[str, Any]]] = [
            ("POST", "/create_session", {"tags": ["a"], "sdk_version": "1"}
             | {"user_metadata": {"a": "b"}, "project_id": "p"}),
            ("POST", "/session_heartbeat", {"session_id": session}),
            ("POST", "/telemetry", {"events": [], "session_id": session}),
            ("POST", "/get_info", {"model_id": run}),
            ("POST", "/create_model", {"session_id": session, "model_seq_id": 0, "base_model": "x"}
             | {"lora_config": {"rank": 4, "seed": 1}}),
            ("POST", "/optim_step", model | {"adam_params": {"learning_rate": 0.0, "beta1": 0.9}}),
            ("POST", "/save_weights", model | {"path": "fuzz", "ttl_seconds": 5}),
            ("POST", "/save_weights_for_sampler", model | {"path": "fuzz", "kind": "snapshot"}),
            ("POST", "/save_weights_external", model | {"path": "fuzz"}),
            ("POST", "/load_weights", {"session_id": session, "model_seq_id": 0}
             | {"path": "tinker://a/weights/b", "optimizer": True}),
            ("POST", "/create_sampling_session", {"session_id": session}
             | {"sampling_session_seq_id": 0, "model_path": "tinker://a/weights/b"}),
            ("POST", "/create_custom_loss", {"session_id": session, "custom_loss_seq_id": 0}
             | {"name": "x", "inputs": [{"name": "logprobs", "rank": 1}]}
             | {"graph": {"format": 1, "nodes": [LOSS_NODE | {"op": "placeholder"}, LOSS_NODE]}}),
            ("POST", "/asample", {"sampling_session_id": sampler, "seq_id": 0, "num_samples": 1}
             | {"prompt": prompt, "sampling_params": {"max_tokens": 1, "top_p": 1, "stop": [1]}}
             | {"prompt_logprobs": False, "topk_prompt_logprobs": 0}),
            ("POST", "/retrieve_futures", {"target": {"type": "sampling_session"}
             | {"sampling_session_id": sampler}, "prev_cursor": 0, "timeout": 0}),
            ("POST", "/cancel_future", {"request_id": "req-x"}),
            ("POST", "/weights_info", {"tinker_path": "tinker://a/weights/b"}),
            ("POST", "/copy_weights", {"source_path": "tinker://a/weights/b"}),
            ("POST", "/sessions/search", {"limit": 1, "owner": {"type": "own"}, "statuses": []}),
            ("PUT", f"/training_runs/{run}/checkpoints/weights/x/ttl", {"ttl_seconds": 1}),
            ("DELETE", f"/training_runs/{run}/checkpoints/weights/x", {}),
            ("GET", f"/training_runs/{run}/checkpoints/external_weights/x/archive", {}),
            ("GET", "/checkpoints", {}),
        ]  # fmt: skip

    def request(self) -> tuple[str, str, dict[str, Any]]:
        method, path, body = self.random.choice(self.templates)
        body = self.mutate(body)
        if body.get("seq_id") == 0:
            body["seq_id"] = self.next_seq  # stays the next one until it has been accepted
        if method == "GET" and self.random.random() < 0.5:
            path += f"?limit={self.text()}&offset={self.text()}"
        if "/" in path[1:] and self.random.random() < 0.5:
            path = path.replace("x", self.random.choice(["..", "%2e%2e", "%00", "x" * 300, "☃"]), 1)
        return method, path, body

    def text(self) -> str:
        return "".join(self.random.choices(string.printable.strip().replace("#", ""), k=5))

    def mutate(self, value: dict[str, Any]) -> dict[str, Any]:
        changed = {
            key: self.mutate(item)
            if isinstance(item, dict) and self.random.random() < 0.5
            else item
            for key, item in value.items()
        }
        for key in list(changed):
            roll = self.random.random()
            if roll < 0.15:
                changed[key] = self.random.choice(JUNK)
            elif roll < 0.2:
                del changed[key]
        if self.random.random() < 0.1:
            changed[self.text()] = self.random.choice(JUNK)
        return changed


@pytest.fixture
def target(local_service: ServiceProcess, service_client: tinker.ServiceClient):
    run = service_client.create_lora_training_client(
        base_model=local_service.model, rank=4
    ).result()
    sampler = service_client.create_sampling_client(base_model=local_service.model).result()
    return run, sampler


def resident_mib(service: ServiceProcess) -> float:
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def http_client(service: ServiceProcess) -> httpx.Client:
    headers = {"X-API-Key": service.api_key}
    return httpx.Client(base_url=f"{service.base_url}/api/v1", headers=headers, timeout=30)


def send(http: httpx.Client, method: str, path: str, **options: Any) -> bool:
    """The request is answered without a 5xx, and so is the operation that it may have begun.

    Returns:
        Whether it was accepted as an operation.
    """
    try:
        response = http.request(method, path, **options)
    except httpx.InvalidURL:
        return False
    assert response.status_code < 500, (method, path, options, response.text)
    if response.status_code >= 400:
        assert response.json()["detail"]
    request_id = response.json().get("request_id") if response.content else None
    if request_id is None or response.status_code != 200:
        return False
    result = http.post("/retrieve_future", json={"request_id": request_id})
    assert result.status_code == 200, result.text
    if result.headers["content-type"] == "application/json":
        assert result.json().get("category") != "server", (path, options, result.json())
    return True


def test_json_requests(local_service: ServiceProcess, target) -> None:
    run, sampler = target
    session = run.model_id.partition(":train:")[0]
    fuzzer = Fuzzer(0, session, run.model_id, sampler._sampling_session_id)
    before = resident_mib(local_service)
    with http_client(local_service) as http:
        for _ in range(NUM_REQUESTS):
            method, path, body = fuzzer.request()
            accepted = send(http, method, path, json=body)  # 10**400 is JSON, too
            fuzzer.next_seq += accepted and "model_id" in body
    assert sample(sampler, tokens(5)).sequences
    # answers are kept for a while: a few KB each
    assert resident_mib(local_service) < before + 40 + NUM_REQUESTS / 50
    fresh = local_service.connect()
    other = fresh.create_lora_training_client(base_model=local_service.model, rank=4).result()
    train_step(other, batch())
    close_session(fresh, "success")


def test_mutated_batches(local_service: ServiceProcess, service_client, target) -> None:
    run, _ = target
    rng = np.random.default_rng(0)
    request = ForwardBackwardRequest(
        forward_backward_input=ForwardBackwardInput(data=batch(2), loss_fn="cross_entropy"),
        model_id=run.model_id,
        seq_id=1,
    )
    with http_client(local_service) as http:
        seq_id = 1
        for _ in range(NUM_REQUESTS // 2):
            message = forward_backward_request_to_proto(request)
            message.seq_id = seq_id
            body = bytearray(message.SerializeToString())
            # the first bytes hold the run and the number
            start = 80
            for position in rng.integers(start, len(body), rng.integers(1, 5)):
                body[position] = rng.integers(256)
            headers = {"content-type": "application/x-protobuf"}
            seq_id += send(http, "POST", "/forward_backward", content=bytes(body), headers=headers)
        for size in (0, 1, 10, 1000):
            for _ in range(20):
                send(http, "POST", "/forward_backward", content=rng.bytes(size))
    other = service_client.create_lora_training_client(base_model=local_service.model, rank=4)
    assert forward(other.result(), batch())[0].shape


def test_random_bytes_on_the_socket(local_service: ServiceProcess) -> None:
    import socket

    host, port = local_service.base_url.removeprefix("http://").split(":")
    rng = np.random.default_rng(1)
    for size in (1, 100, 10_000, 200_000):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            try:
                connection.sendall(rng.bytes(size))
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass
            except OSError as error:
                # the service may hang up at any moment of it, but must not leave us waiting
                if isinstance(error, TimeoutError):
                    raise
    with http_client(local_service) as http:
        assert http.get("/healthz").json() == {"status": "ok"}
