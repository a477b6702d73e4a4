"""Running the service: metrics, state, request ids, the page's sign-in, hosts, shutdown."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import tinker
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.sdk import batch, train_step
from tinker_cookbook.local.app import build_app
from tinker_cookbook.local.service.protocol.auth import Authenticator
from tinker_cookbook.local.service.protocol.host_guard import host_name
from tinker_cookbook.local.service.protocol.request_ids import TextFormatter
from tinker_cookbook.local.service.routes import operating as routes_operating
from tinker_cookbook.local.service.settings import ServiceSettings
from tinker_cookbook.local.service.state.core import Service

KEY = "tml-0123456789abcdef0123"


@pytest.fixture
async def service(tmp_path: Path):
    settings = ServiceSettings(
        tmp_path / "state", ("some/model",), KEY, allowed_hosts=("tinker.example",)
    )
    service = Service(settings)
    yield service
    service.store.close()


@pytest.fixture
async def http(service: Service):
    transport = httpx.ASGITransport(build_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


def get(service, path: str, key: str | None = None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key or service.api_key}"}
    return httpx.get(f"{service.base_url}{path}", headers=headers)


def read_metrics(text: str) -> dict[str, float]:
    """Sums over all labels."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


def test_training_and_sampling_move_the_metrics(service_factory, tiny_model_folder) -> None:
    service = service_factory(tiny_model_folder)  # what other clients do would move them too
    before = read_metrics(get(service, "/metrics").text)
    run = service.connect().create_lora_training_client(base_model=service.model, rank=4).result()
    for _ in range(3):
        train_step(run, batch(2, length=10))
    sampler = run.save_weights_and_get_sampling_client().result()
    prompt = tinker.ModelInput.from_ints([1, 2, 3])
    sampler.sample(prompt, 2, tinker.SamplingParams(max_tokens=5, stop=[])).result()
    answer = get(service, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    after = read_metrics(answer.text)
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["tinker_optimizer_steps_total"] == 3
    assert (
        grown["tinker_trained_tokens_total"]
        == sum(datum.model_input.length for datum in batch(2, length=10)) * 3
    )
    assert grown["tinker_sampled_tokens_total"] == 10
    assert grown["tinker_runs"] == 1
    assert grown["tinker_http_requests_total"] > 8
    assert after["process_resident_memory_bytes"] > 50e6
    assert 'route="/api/v1/optim_step",status="200"' in answer.text
    assert 'tinker_operations_total{kind="optim_step",outcome="done"}' in answer.text
    status = get(service, "/api/v1/local/status").json()
    (shown,) = [item for item in status["runs"] if item["run_id"] == run.model_id]
    assert (shown["num_steps"], shown["is_live"], shown["lora_rank"]) == (3, True, 4)
    curve = get(service, f"/api/v1/local/curves/{run.model_id}").json()
    assert [point[0] for point in curve["points"]] == [1, 2, 3]
    losses = [point[1] for point in curve["points"]]
    assert losses[2] < losses[0], "the same batch three times"
    result = run.forward(batch(2, length=10), "cross_entropy").result()
    num_trained = sum(sum(d.loss_fn_inputs["weights"].data) for d in batch(2, length=10))
    assert result.metrics["loss:sum"] / num_trained < losses[0]


def test_curves_outlive_the_service(service_factory, tiny_model_folder) -> None:
    service = service_factory(tiny_model_folder)
    client = service.connect(display_name="a name")
    run = client.create_lora_training_client(base_model=service.model, rank=2).result()
    train_step(run, batch())
    curve = get(service, f"/api/v1/local/curves/{run.model_id}").json()["points"]
    assert len(curve) == 1
    assert service.stop() == 0
    again = service_factory(tiny_model_folder)
    assert get(again, f"/api/v1/local/curves/{run.model_id}").json()["points"] == curve
    (shown,) = get(again, "/api/v1/local/status").json()["runs"]
    assert (shown["name"], shown["is_live"]) == ("a name", False)


@pytest.mark.anyio
async def test_the_status_token_opens_the_state_and_nothing_else(service, http) -> None:
    token = service.auth.status_token
    assert token == Authenticator(KEY).status_token != Authenticator(KEY + "x").status_token
    for path in routes_operating.STATUS_PATHS:
        assert (await http.get(path)).status_code == 401
        assert (await http.get(path, headers={"X-API-Key": token})).status_code == 200
    for path in ("/api/v1/sessions", "/oai/api/v1/models", "/api/v1/local/curves/x"):
        assert (await http.get(path, headers={"X-API-Key": token})).status_code == 401


@pytest.mark.anyio
async def test_request_ids_go_through(service, http, caplog) -> None:
    given = {"X-API-Key": KEY, "X-Request-Id": "client.id-7"}
    assert (await http.get("/api/v1/sessions", headers=given)).headers["x-request-id"] == (
        "client.id-7"
    )
    for bad in ("a b", "x" * 65, b"\xc3\xa9", "-x"):
        headers = {"X-API-Key": KEY, "X-Request-Id": bad}
        answer = await http.get("/api/v1/sessions", headers=headers)
        assert len(answer.headers["x-request-id"]) == 12


def test_json_logs_carry_request_ids(service_factory, tiny_model_folder) -> None:
    service = service_factory(tiny_model_folder, "--log-format", "json")
    headers = {"X-API-Key": service.api_key, "X-Request-Id": "mine-1"}
    httpx.get(f"{service.base_url}/api/v1/sessions?limit=-1", headers=headers)
    assert service.stop() == 0
    lines = [json.loads(line) for line in service.log().splitlines()]
    (line,) = [line for line in lines if line["request_id"] == "mine-1"]
    assert (line["method"], line["path"], line["status"]) == ("GET", "/sessions", 400)
    assert {"time", "level", "logger", "message", "milliseconds"} <= set(line)
    assert lines[-1]["message"] == "stopped"


MEAN = "x\n2026-01-01 00:00:00,000 ERROR forged\x1b[31m\x9b2J\u202e"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_names_of_clients_forge_no_lines(
    service_factory, tiny_model_folder, capfd, log_format: str
) -> None:
    """Neither in the log, nor on the terminal of the service, nor in what `status` prints."""
    service = service_factory(tiny_model_folder, "--log-format", log_format)
    client = service.connect(display_name=MEAN)
    run = client.create_lora_training_client(base_model=service.model, rank=2).result()
    headers = {"X-API-Key": service.api_key}
    for path, body in (
        ("create_sampling_session", {"session_id": MEAN, "base_model": MEAN}),
        ("optim_step", {"model_id": run.model_id, "seq_id": 1, "adam_params": {MEAN: 1}}),
        ("create_model", {"session_id": run.model_id.split(":")[0], "base_model": MEAN}
         | {"model_seq_id": 7}),
    ):  # fmt: skip
        httpx.post(f"{service.base_url}/api/v1/{path}", json=body, headers=headers)
    shown = status_command("--state-dir", str(service.state_dir))
    deadline = time.monotonic() + 30
    while service.log().count("forged") < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    log = service.log()
    assert log.count("forged") >= 2, "the refusals are logged with the names"
    assert r"x\n2026-01-01" in shown.stdout
    for text in (log, shown.stdout, shown.stderr, *capfd.readouterr()):
        assert not set(text) & set("\x1b\x9b\u202e")
        assert not any(line.startswith("2026-01-01 00:00:00,000") for line in text.splitlines())


def test_lines_of_a_traceback_are_marked_as_such() -> None:
    formatter = TextFormatter("%(message)s")
    try:
        raise ValueError(MEAN)
    except ValueError:
        info = sys.exc_info()
    record = logging.LogRecord("x", logging.ERROR, "x", 1, f"failed for {MEAN}", None, info)
    first, *others = formatter.format(record).split("\n")
    assert first.startswith(r"failed for x\n2026")
    assert all(line.startswith("  | ") for line in others)
    assert not {"\x1b", "\x9b"} & set("".join(others))


def test_the_number_format_is_said_everywhere(local_service, service_client) -> None:
    """In status, metrics, log and get_info: what the engine multiplies matrices in."""
    run = service_client.create_lora_training_client(base_model=local_service.model, rank=2)
    run = run.result()
    (model,) = get(local_service, "/api/v1/local/status").json()["models"]
    dtype = model["dtype"]
    assert dtype in ("float32", "bfloat16")
    assert model["device"]
    assert f'dtype="{dtype}"' in get(local_service, "/metrics").text
    assert f"model {local_service.model} computes in {dtype} on" in local_service.log()
    info = httpx.post(
        f"{local_service.base_url}/api/v1/get_info",
        json={"model_id": run.model_id},
        headers={"X-API-Key": local_service.api_key},
    )
    assert info.json()["model_data"]["dtype"] == dtype
    shown = status_command("--state-dir", str(local_service.state_dir))
    assert f"{local_service.model} ({dtype} on {model['device']})" in shown.stdout


def test_a_format_that_was_asked_for_is_the_one_that_is_said(
    service_factory, tiny_model_folder
) -> None:
    service = service_factory(tiny_model_folder, "--dtype", "float32")
    sampler = service.connect().create_sampling_client(base_model=service.model).result()
    assert sampler.sample(tinker.ModelInput.from_ints([1]), 1, tinker.SamplingParams(max_tokens=1))
    (model,) = get(service, "/api/v1/local/status").json()["models"]
    assert (model["is_loaded"], model["dtype"]) == (True, "float32")


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost:80", "localhost"),
        ("LOCALHOST", "localhost"),
        ("127.0.0.1:1", "127.0.0.1"),
        ("[::1]:8000", "::1"),
        ("::1", "::1"),
        ("evil.example:8400", "evil.example"),
        ("[::1]evil.com", None),
        ("[::1]:evil.com", None),
        ("[::1", None),
        ("[evil.com]", None),
        ("[fe80::1%evil.com]", None),
        ("localhost:evil", None),
        ("localhost:80:80", None),
        ("localhost:", None),
        ("user@localhost", None),
        ("localhost/evil.com", None),
        ("localhost evil.com", None),
        ("", None),
    ],
)
def test_the_host_is_read_without_its_port(header: str, name: str | None) -> None:
    assert host_name(header) == name


@pytest.mark.anyio
async def test_foreign_hosts_are_refused_before_anything_else(service, http) -> None:
    foreign = ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io:8400", "")
    for host in (*foreign, "[::1]evil.com", "[::1]:80.evil.com", "[evil.com]", "localhost:x"):
        for path in ("/", "/api/v1/healthz", "/metrics", "/oai/api/v1/models"):
            answer = await http.get(path, headers={"Host": host, "X-API-Key": KEY})
            assert answer.status_code == 421, (host, path)
            assert "--allowed-host" in answer.json()["detail"]
    for host in ("localhost:1", "127.0.0.1", "[::1]:2", "192.168.3.4:8400", "tinker.example"):
        assert (await http.get("/api/v1/healthz", headers={"Host": host})).status_code == 200


@pytest.mark.anyio
async def test_the_page_is_sealed(service, http) -> None:
    answer = await http.get("/")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    for rule in ("default-src 'none'", "script-src 'sha256-", "frame-ancestors 'none'"):
        assert rule in policy
    assert "unsafe" not in policy
    text = answer.text
    assert "https://" not in text, "nothing is fetched from elsewhere"
    assert KEY not in text
    assert service.auth.status_token not in text
    for dangerous in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert dangerous not in text
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.anyio
async def test_a_ticket_signs_in_once(service, http, monkeypatch) -> None:
    ticket = service.auth.tickets.make()
    assert (await http.post("/dashboard/token", json={"ticket": "guess"})).status_code == 403
    token = (await http.post("/dashboard/token", json={"ticket": ticket})).json()["token"]
    assert (await http.get("/api/v1/sessions", headers={"X-API-Key": token})).status_code == 200
    assert (await http.post("/dashboard/token", json={"ticket": ticket})).status_code == 403
    late = service.auth.tickets.make()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    assert (await http.post("/dashboard/token", json={"ticket": late})).status_code == 403


@pytest.mark.anyio
async def test_other_origins_get_no_permission(service, http) -> None:
    """Keys travel in headers, never in cookies, so a foreign page has nothing to ride on."""
    for path in ("/api/v1/create_session", "/oai/api/v1/completions", "/dashboard/token"):
        asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
        answer = await http.options(path, headers=asked)
        assert answer.status_code == 405
        posted = await http.post(path, headers={"Origin": "https://evil.example"}, json={})
        assert posted.status_code in (400, 401)
        for name in (*answer.headers, *posted.headers):
            assert not name.startswith(("access-control-", "set-cookie"))


@pytest.mark.anyio
async def test_a_shutdown_records_what_it_could_not_finish(service, caplog) -> None:
    entry = service.futures.create("optim_step", "session")

    async def never():
        await asyncio.Event().wait()

    service.launch(entry, never, lane="run")
    stream = asyncio.get_running_loop().create_future()
    with service.in_flight(stream), caplog.at_level(logging.WARNING):
        await service.drain(0.05)
    assert stream.cancelled()
    assert entry.payload is not None
    failure = json.loads(entry.payload.body)
    assert failure["error"] == "the service stopped before optim_step finished"
    assert f"{entry.request_id} optim_step did not finish before the shutdown" in caplog.text


def status_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from tinker_cookbook.cli import main; sys.exit(main())"
    environment = {k: v for k, v in os.environ.items() if k != "TINKER_API_KEY"}
    return subprocess.run(
        [sys.executable, "-c", program, "status", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )


def test_the_status_command_finds_the_service(service_factory, tiny_model_folder, tmp_path) -> None:
    nothing = status_command("--state-dir", str(tmp_path / "none"))
    assert nothing.returncode == 3
    assert "No service is running, and nothing is saved." in nothing.stdout
    assert not (tmp_path / "none").exists(), "looking changes nothing"
    service = service_factory(tiny_model_folder)
    client = service.connect(display_name="my run")
    run = client.create_lora_training_client(base_model=service.model, rank=4).result()
    train_step(run, batch())
    path = run.save_state("kept").result().path
    (note,) = (service.state_dir / "running").glob("*.json")
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    assert service.api_key not in note.read_text()
    shown = status_command("--state-dir", str(service.state_dir))
    assert shown.returncode == 0, shown.stderr
    for text in (service.base_url, "my run", "1 steps", path, "1 optimizer steps", "MiB"):
        assert text in shown.stdout
    assert "continued by a newer run" not in shown.stdout
    resumed = client.create_training_client_from_state_with_optimizer(path).result()
    train_step(resumed, batch())
    again = status_command("--state-dir", str(service.state_dir)).stdout
    lines = {line.split()[2]: line for line in again.splitlines() if ":train:" in line}
    assert "2 steps" in lines[resumed.model_id]
    assert "in memory, continued by a newer run, 1 steps" in lines[run.model_id]
    as_json = status_command("--state-dir", str(service.state_dir), "--json")
    assert json.loads(as_json.stdout)["services"][0]["status"]["num_runs"] == 2
    service.process.kill()
    service.process.wait()
    gone = status_command("--state-dir", str(service.state_dir))
    assert gone.returncode == 3
    assert "No service is running. Saved runs: 2, checkpoints: 1." in gone.stdout
    assert path in gone.stdout
    assert "Traceback" not in gone.stderr
