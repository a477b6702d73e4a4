"""Clients side by side: each gets its share, and what nobody waits for any more is dropped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import tinker

from tests.conftest import ServiceProcess, start_service
from tests.e2e.conftest import rest_client
from tests.e2e.sdk import batch, text, tokens

MUCH = tinker.SamplingParams(max_tokens=900, stop=[])
SHORT = tinker.SamplingParams(max_tokens=20, stop=[], seed=1)
PATIENCE = 100
"""Seconds: more than a client may be silent that was killed before it held a request, as can be on
a busy machine, and far fewer than what is dropped would take."""


@pytest.fixture(scope="module")
def service(tiny_model_folder, tmp_path_factory) -> Iterator[ServiceProcess]:
    """A service of the module's own: what it is given to do would hold up the tests of others."""
    service = start_service(tiny_model_folder, tmp_path_factory.mktemp("sharing") / "state")
    yield service
    service.process.kill()
    service.process.wait()


def queue_of(service: ServiceProcess) -> dict[str, float]:
    headers = {"X-API-Key": service.api_key}
    url = f"{service.base_url}/api/v1/local/status"
    return httpx.get(url, headers=headers, timeout=30).json()["queue"]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def is_idle(service: ServiceProcess) -> bool:
    return not queue_of(service)["sampling_running"]


CLIENT = textwrap.dedent("""
    import sys, time
    import tinker
    from tinker_cookbook.utils.sdk_compat import wait_for_client
    client = tinker.ServiceClient(base_url=sys.argv[1], api_key=sys.argv[2])
    sampler = wait_for_client(client.create_sampling_client(base_model=sys.argv[3]))
    params = tinker.SamplingParams(max_tokens=1000, stop=[])
    prompt = tinker.ModelInput.from_ints([5, 6, 7])
    futures = [sampler.sample(prompt, 32, params) for _ in range(128)]
    print("asked", flush=True)
    if sys.argv[4] == "closes":
        time.sleep(3)
        client.close("interrupted").result()
        print("closed", flush=True)
    time.sleep(600)
""")


@pytest.fixture
def busy_client(service) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a process that asks for 4,096 samples of 1,000 tokens."""
    started: list[subprocess.Popen[str]] = []

    def start(what_then: str) -> subprocess.Popen[str]:
        arguments = [service.base_url, service.api_key, service.model, what_then]
        command = [sys.executable, "-c", CLIENT, *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout is not None
        assert started[-1].stdout.readline() == "asked\n"
        wait_until(lambda: queue_of(service)["sampling_running"] >= 128)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    wait_until(lambda: is_idle(service))


def test_a_client_is_not_held_up_by_the_thousands_of_samples_of_another(service, busy_client):
    with service.connect() as client:
        sampler = client.create_sampling_client(base_model=service.model).result()
        alone = sampler.sample(text(tokens(8)), 1, SHORT).result()
        process = busy_client("stays")
        together = sampler.sample(text(tokens(8)), 1, SHORT).result()
        answer = httpx.post(
            f"{service.base_url}/oai/api/v1/completions",
            headers={"X-API-Key": service.api_key},
            json={"model": service.model, "prompt": "x", "max_tokens": 20},
            timeout=PATIENCE,
        )
        assert answer.status_code == 200, answer.text
        assert queue_of(service)["sampling_waiting"] > 100  # most of the others have not begun
    assert process.poll() is None
    assert together.sequences[0].tokens == alone.sequences[0].tokens
    assert together.sequences[0].logprobs == alone.sequences[0].logprobs


NEEDS_CLOSE = pytest.mark.skipif(
    not hasattr(tinker.ServiceClient, "close"), reason="this SDK cannot close a session"
)


@pytest.mark.parametrize("end", ["killed", pytest.param("closes", marks=NEEDS_CLOSE)])
def test_the_samples_of_a_client_that_is_gone_are_dropped(service, busy_client, end):
    process = busy_client(end)
    if end == "killed":
        process.kill()
    else:
        assert process.stdout is not None
        assert process.stdout.readline() == "closed\n"
    wait_until(lambda: is_idle(service))
    assert queue_of(service)["sampling_waiting"] == 0


def test_training_of_a_client_that_was_killed_is_finished(service):
    code = textwrap.dedent("""
        import sys, time
        import tinker
        from tests.e2e.sdk import ADAM, batch
        from tinker_cookbook.utils.sdk_compat import wait_for_client
        client = tinker.ServiceClient(base_url=sys.argv[1], api_key=sys.argv[2])
        run = wait_for_client(client.create_lora_training_client(base_model=sys.argv[3], rank=4))
        for _ in range(30):
            run.forward_backward(batch(6, length=200), "cross_entropy")
            run.optim_step(ADAM)
        run.save_state("last")
        print(run.model_id, flush=True)
        time.sleep(600)
    """)
    command = [sys.executable, "-c", code, service.base_url, service.api_key, service.model]
    rest = rest_client(service)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    run_id = process.stdout.readline().strip()

    def is_accepted() -> bool:
        return queue_of(service)["unfinished"] >= 61 or has_saved()

    def has_saved() -> bool:
        return bool(rest.list_checkpoints(run_id).result().checkpoints)

    wait_until(is_accepted)
    process.kill()
    process.wait()
    process.stdout.close()
    wait_until(has_saved)
    with service.connect() as client:
        path = f"tinker://{run_id}/weights/last"
        run = client.create_training_client_from_state_with_optimizer(path).result()
        stepped = (
            run.forward_backward(batch(), "cross_entropy"),
            run.optim_step(tinker.AdamParams()),
        )
        assert stepped[1].result().metrics["num_steps"] == 31


def test_what_was_dropped_is_gone_so_that_a_client_that_comes_back_asks_anew(service, busy_client):
    headers = {"X-API-Key": service.api_key}
    with httpx.Client(base_url=f"{service.base_url}/api/v1", headers=headers) as http:
        session = http.post("/create_session", json={"tags": [], "sdk_version": "x"}).json()
        body = {"sampling_session_seq_id": 0, "base_model": service.model} | session
        sampler = http.post("/create_sampling_session", json=body).json()
        asked = {
            "sampling_session_id": sampler["sampling_session_id"],
            "seq_id": 0,
            "num_samples": 1000,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
            "sampling_params": {"max_tokens": 1000, "stop": []},
        }
        request = {"request_id": http.post("/asample", json=asked).json()["request_id"]}
        with pytest.raises(httpx.ReadTimeout):
            http.post("/retrieve_future", json=request, timeout=1)
        wait_until(lambda: is_idle(service))
        assert http.post("/retrieve_future", json=request).status_code == 410
        again = http.post("/asample", json=asked | {"seq_id": 1, "num_samples": 1}).json()
        answer = http.post("/retrieve_future", json={"request_id": again["request_id"]}, timeout=60)
        assert answer.status_code == 200


def test_a_stream_that_nobody_reads_holds_up_nothing(service):
    body = {"model": service.model, "prompt": "x", "max_tokens": 900, "n": 30, "logprobs": 20}
    body |= {"stream": True, "stop_token_ids": []}
    payload = json.dumps(body).encode()
    address = urlsplit(service.base_url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(
            b"POST /oai/api/v1/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\n"
            + f"x-api-key: {service.api_key}\r\ncontent-length: {len(payload)}\r\n\r\n".encode()
            + payload
        )
        assert b"200 OK" in connection.recv(1000)
        for _ in range(30):  # while it is sampled, and when it waits for its reader
            assert httpx.get(f"{service.base_url}/api/v1/healthz", timeout=5).status_code == 200
            time.sleep(0.1)
    for _ in range(10):  # and when the reader has left
        assert httpx.get(f"{service.base_url}/api/v1/healthz", timeout=5).status_code == 200
        time.sleep(0.05)
    wait_until(lambda: is_idle(service))


def test_a_service_stops_while_a_stream_is_not_read(service_factory, tiny_model_folder):
    service = service_factory(tiny_model_folder)
    body = {"model": service.model, "prompt": "x", "max_tokens": 900, "n": 30, "logprobs": 20}
    body |= {"stream": True, "stop_token_ids": []}
    headers = {"X-API-Key": service.api_key}
    url = f"{service.base_url}/oai/api/v1/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as answer:
        next(answer.iter_raw())
        time.sleep(1)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(50) == 0


def resident_bytes(service: ServiceProcess) -> int:
    pages = Path(f"/proc/{service.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_memory_of_uploads_that_never_end_is_given_back(service_factory, tiny_model_folder):
    service = service_factory(tiny_model_folder, "--spill-after", "1")  # looks after it each second
    wait_until(lambda: httpx.get(f"{service.base_url}/api/v1/healthz").status_code == 200)
    with service.connect() as client:
        sampler = client.create_sampling_client(base_model=service.model).result()
        sampler.sample(text(tokens(8)), 1, SHORT).result()
    before = resident_bytes(service)
    address = urlsplit(service.base_url)
    uploads = []
    piece = b"x" * 2**20
    for _ in range(4):
        connection = socket.create_connection((address.hostname, address.port))
        connection.sendall(
            b"POST /api/v1/forward_backward HTTP/1.1\r\nhost: localhost\r\n"
            + f"x-api-key: {service.api_key}\r\ncontent-length: {2**30}\r\n\r\n".encode()
        )
        for _ in range(60):
            connection.sendall(piece)
        uploads.append(connection)
    wait_until(lambda: resident_bytes(service) > before + 200 * 2**20)
    time.sleep(3)  # it is looked for while all of it is still in use
    for connection in uploads:
        connection.close()
    wait_until(lambda: resident_bytes(service) < before + 60 * 2**20)
