"""The HTTP side without an engine: keys, bounds, errors, sessions, polling, idempotency."""

import asyncio
import json
import logging
import time
from pathlib import Path

import httpx
import pytest
import zstandard

from tests.traced_memory import traced_memory
from tinker_cookbook.local.app import ROUTES, build_app
from tinker_cookbook.local.errors import StorageError
from tinker_cookbook.local.service.routes.sessions import CLIENT_CONFIG
from tinker_cookbook.local.service.settings import Limits, ServiceSettings
from tinker_cookbook.local.service.state import request_trace as trace
from tinker_cookbook.local.service.state.core import Service
from tinker_cookbook.local.service.state.engine import EngineAccess
from tinker_cookbook.local.service.state.futures import Entry, Payload
from tinker_cookbook.local.service.state.samplers import SubmittedSample
from tinker_cookbook.local.service.storage.rows import SamplerRow

pytestmark = pytest.mark.anyio

KEY = "tml-0123456789abcdef0123"
LIMITS = Limits(
    poll_hold_seconds=0.3, max_json_bytes=20_000, max_batch_bytes=50_000, session_idle_seconds=0.2
)


@pytest.fixture
async def service(tmp_path: Path):
    settings = ServiceSettings(tmp_path / "state", ("some/model",), KEY, limits=LIMITS)
    service = Service(settings)
    yield service
    service.store.close()


@pytest.fixture
async def http(service: Service):
    transport = httpx.ASGITransport(build_app(service))
    async with httpx.AsyncClient(
        transport=transport, base_url="http://localhost/api/v1", headers={"X-API-Key": KEY}
    ) as client:
        yield client


async def new_session(http: httpx.AsyncClient, **fields) -> str:
    response = await http.post("/create_session", json={"tags": [], "sdk_version": "x"} | fields)
    assert response.status_code == 200, response.text
    return response.json()["session_id"]


async def test_all_routes_but_health_and_downloads_need_the_key(service, http) -> None:
    for method, path, _ in ROUTES:
        url = path.replace("{", "").replace("}", "")
        response = await http.request(method, url, headers={"X-API-Key": "tml-wrong"})
        if path == "/healthz":
            assert response.status_code == 200
        elif path.startswith("/download"):
            assert response.status_code == 403
        else:
            assert response.status_code == 401, path
            assert "TINKER_API_KEY" in response.json()["detail"]


async def test_the_token_works_instead_of_the_key(http) -> None:
    token = (await http.post("/auth/token", json={})).json()["jwt"]
    response = await http.get("/sessions", headers={"X-API-Key": token})
    assert response.status_code == 200
    response = await http.get("/sessions", headers={"X-API-Key": token[:-4]})
    assert response.status_code == 401
    assert 'error="invalid_token"' in response.headers["www-authenticate"]


async def test_unknown_paths_and_methods_have_json_bodies(http) -> None:
    for method, path, status in [("GET", "/nothing", 404), ("GET", "/create_session", 405)]:
        response = await http.request(method, path)
        assert response.status_code == status
        assert path in response.json()["detail"]
        assert int(response.headers["content-length"]) > 0


BODIES = [b"{", b"[]", b"\xff", b"[" * 5000, b'{"session_id": 1}', b'{"session_id": null}', b"NaN"]


@pytest.mark.parametrize("body", BODIES)
async def test_bad_bodies_are_bad_requests_on_every_route(http, body: bytes) -> None:
    for method, path, _ in ROUTES:
        if method != "POST" or path in ("/healthz", "/auth/token") or path.startswith("/client"):
            continue
        url = path.replace("{", "").replace("}", "")
        response = await http.request(method, url, content=body)
        assert response.status_code in (200, 400, 404), (path, response.status_code)
        if response.status_code == 400:
            assert response.json()["detail"]


async def test_bodies_are_bounded(http) -> None:
    response = await http.post("/create_session", content=b"x" * 30_000)
    assert response.status_code == 413
    assert "20000" in response.json()["detail"]

    async def endless():
        for _ in range(1000):
            yield b"x" * 1000

    response = await http.post("/create_session", content=endless())
    assert response.status_code == 413
    bomb = zstandard.ZstdCompressor().compress(b"\0" * 10_000_000)
    assert len(bomb) < 2000
    headers = {"content-encoding": "zstd", "content-type": "application/x-protobuf"}
    response = await http.post("/forward_backward", content=bomb, headers=headers)
    assert response.status_code == 413
    response = await http.post("/forward_backward", content=b"not zstd", headers=headers)
    assert response.status_code == 400
    headers["content-encoding"] = "gzip"
    response = await http.post("/forward_backward", content=b"", headers=headers)
    assert response.status_code == 400


async def test_client_configuration_is_complete_enough_for_the_sdk(http) -> None:
    from tinker.types import ClientConfigResponse

    response = await http.post("/client/config", json={"sdk_version": "0.38.0"})
    config = ClientConfigResponse.model_validate(response.json())
    assert config.pjwt_auth_enabled
    assert config.fwdbwd_max_chunk_bytes_count == 1_000_000_000
    newer = {"create_model_via_load_weights"}  # dropped after 0.35
    assert set(CLIENT_CONFIG) - newer <= set(ClientConfigResponse.model_fields)


async def test_a_poll_is_held_then_answered_408(service, http) -> None:
    entry = service.futures.create("optim_step", "s")
    began = asyncio.get_running_loop().time()
    response = await http.post("/retrieve_future", json={"request_id": entry.request_id})
    assert asyncio.get_running_loop().time() - began >= 0.3
    assert response.status_code == 408
    assert response.json() == {
        "type": "try_again",
        "request_id": entry.request_id,
        "queue_state": "active",
    }
    asyncio.get_running_loop().call_later(
        0.05, service.futures.resolve, entry, Payload.of_json({"metrics": {"a": 1.0}})
    )
    for _ in range(2):
        response = await http.post("/retrieve_future", json={"request_id": entry.request_id})
        assert response.status_code == 200
        assert response.json() == {"metrics": {"a": 1.0}}


async def test_failures_and_lost_results(service, http) -> None:
    entry = service.futures.create("optim_step", "s")
    service.futures.fail(entry, "lr=-1 is negative", "user")
    response = await http.post("/retrieve_future", json={"request_id": entry.request_id})
    assert response.status_code == 200
    assert response.json() == {"error": "lr=-1 is negative", "category": "user"}
    response = await http.post("/retrieve_future", json={"request_id": "nonsense"})
    assert response.status_code == 404
    service.futures.drop([entry.request_id])
    response = await http.post("/retrieve_future", json={"request_id": entry.request_id})
    assert response.status_code == 410


async def test_heartbeats_and_the_end_of_a_session(http) -> None:
    session = await new_session(http)
    beat = {"session_id": session}
    assert (await http.post("/session_heartbeat", json=beat)).json() == {
        "type": "session_heartbeat"
    }
    finish = {"reason": {"type": "errored"}, "detail": "first"}
    assert (await http.post(f"/sessions/{session}/finish", json=finish)).status_code == 204
    later = {"reason": {"type": "success"}, "detail": "second"}
    assert (await http.post(f"/sessions/{session}/finish", json=later)).status_code == 204
    assert (await http.post("/session_heartbeat", json=beat)).status_code == 410
    found = (await http.post("/sessions/search", json={"session_id": session})).json()["sessions"]
    assert found[0]["status"]["detail"] == "first"
    create = {"session_id": session, "model_seq_id": 0, "base_model": "some/model"}
    response = await http.post("/create_model", json=create)
    assert response.status_code == 400
    assert "has ended (client finished: errored: first)" in response.json()["detail"]


async def test_silent_sessions_expire_but_not_while_work_is_in_flight(service, http) -> None:
    idle, busy = await new_session(http), await new_session(http)
    entry = service.futures.create("sample", busy)
    elsewhere = await new_session(http)
    await asyncio.sleep(0.3)
    service.store.index.touch_sessions({elsewhere: time.time() + 1})
    await service.keep_house()
    assert (await http.post("/session_heartbeat", json={"session_id": idle})).status_code == 410
    assert (
        await http.post("/session_heartbeat", json={"session_id": elsewhere})
    ).status_code == 200
    service.futures.resolve(entry, Payload.of_json({}))
    assert (await http.post("/session_heartbeat", json={"session_id": busy})).status_code == 200
    found = (await http.post("/sessions/search", json={"session_id": idle})).json()["sessions"]
    assert found[0]["status"]["type"] == "cancelled"


async def test_a_resent_creation_is_answered_as_before(service, http) -> None:
    session = await new_session(http)
    create = {"session_id": session, "model_seq_id": 3, "base_model": "some/model"}
    first = await http.post("/create_model", json=create)
    second = await http.post("/create_model", json=create)
    assert first.json() == second.json()
    assert first.json()["model_id"] == f"{session}:train:3"
    await service.drain(0)


async def test_draining_refuses_new_work_with_503(service, http) -> None:
    session = await new_session(http)
    await service.drain(0)
    create = {"session_id": session, "model_seq_id": 0, "base_model": "some/model"}
    response = await http.post("/create_model", json=create)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert (await http.get("/sessions")).status_code == 200


async def test_drain_fails_what_does_not_finish(service, http) -> None:
    entry = service.futures.create("sample", "s")

    async def forever() -> Payload:
        await asyncio.sleep(1000)
        raise AssertionError

    service.launch(entry, forever, lane="x")
    await service.drain(0.05)
    assert entry.payload is not None
    assert json.loads(entry.payload.body)["category"] == "server"
    service.cancel(entry.request_id)


async def test_a_task_cancelled_before_it_starts_is_settled(service) -> None:
    entry = service.futures.create("sample", "s")

    async def never() -> Payload:
        raise AssertionError

    service.launch(entry, never, lane="x")
    service.cancel(entry.request_id)
    assert await service.futures.wait(entry, 1)
    assert entry.category == "user"


async def test_unexpected_errors_are_500_with_the_id_of_the_log_line(
    service, http, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.store, "index", None)  # as a mistake of our own would
    with caplog.at_level(logging.ERROR):
        response = await http.get("/training_runs/x")
    assert response.status_code == 500
    assert response.headers["x-request-id"] in response.json()["detail"]
    assert response.headers["x-request-id"] in caplog.text


async def test_an_index_that_cannot_be_used_is_named(service, http) -> None:
    service.store.index.close()
    response = await http.get("/training_runs/x")
    assert response.status_code == 400  # the SDK would repeat a 500 for minutes
    assert "index.sqlite3 cannot be used" in response.json()["detail"]
    service.store.index.open()


async def test_pages_are_checked(http) -> None:
    for query in ("limit=-1", "limit=x", "offset=-1", f"offset={2**40}", "limit=1e3"):
        response = await http.get(f"/training_runs?{query}")
        assert response.status_code == 400
        assert query.split("=")[0] in response.json()["detail"]
    response = await http.get("/training_runs?limit=5&offset=2")
    assert response.json()["cursor"] == {"offset": 2, "limit": 5, "total_count": 0}


@pytest.mark.parametrize(
    ("search", "problem"),
    [
        ({"statuses": [{"type": "active", "reasons": 5}]}, "reasons=5"),
        ({"statuses": ["active"]}, "statuses[0]='active'"),
        ({"cursor": {"last_created_at": "0001-01-01", "last_session_id": "x"}}, "is not a time"),
    ],
)
async def test_searches_are_checked(http, search: dict, problem: str) -> None:
    await new_session(http)
    response = await http.post("/sessions/search", json=search)
    assert response.status_code == 400
    assert problem in response.json()["detail"]


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"model_type": "gpt2", "n_positions": 512}, 512),
        ({"model_type": "bloom"}, 2048),
        ({"model_type": "llava", "text_config": {"max_position_embeddings": 64}}, 64),
    ],
)
async def test_models_name_their_longest_context_in_several_ways(
    tmp_path, config: dict, length: int
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    settings = ServiceSettings(tmp_path / "state", (str(folder),), KEY)
    card = await EngineAccess(settings).describe(str(folder))
    assert card.max_context_length == length


async def test_the_end_of_a_session_frees_memory_also_where_the_disk_is_full(service, http) -> None:
    ended, idle = await new_session(http), await new_session(http)
    for session in (ended, idle):
        service.losses._request_ids[session] = {0: "req"}
    service.store.index.close()  # every write fails from here on
    status = {"type": "client_finished", "reason": {"type": "success"}, "detail": None}
    with pytest.raises(StorageError):
        await service.end_session(service.sessions.get(ended), status)
    await asyncio.sleep(0.3)
    service.sessions.is_elsewhere = lambda *_: False
    await service.keep_house()
    await asyncio.sleep(0.05)
    assert service.losses._request_ids == {}
    assert len(service.sessions) == 0
    service.store.index.open()


async def test_resent_samples_are_remembered_as_long_as_their_results(service) -> None:
    row = SamplerRow("s:sample:0", "s", "some/model", None, None, 0.0)
    sampler = service.samplers._add(row, "base:some/model")
    entries = [service.futures.create("sample", "s") for _ in range(3)]
    for number, entry in enumerate(entries):
        sampler.remember(number, SubmittedSample(entry.request_id, []))
    service.futures.resolve(entries[0], Payload.of_json({}))
    service.futures.drop([entries[0].request_id])
    await service.keep_house()
    assert sorted(sampler.submitted) == [1, 2]


def test_timelines_are_bounded_over_all_sessions(monkeypatch) -> None:
    monkeypatch.setattr(trace, "MAX_EVENTS", 5)
    log = trace.TraceLog()
    for session in ("a", "b", "a", "a", "c", "c"):
        log.add(Entry("req", "sample", session, None), "lane", 0.0)
    assert {key: len(spans) for key, spans in log._spans.items()} == {"a": 3, "c": 2}
    log.drop("a")
    assert log._num_spans == 2


def add_operations(log: trace.TraceLog) -> list[str]:
    """Add 5,000 operations; return the ids of their requests."""
    ids = [f"req-00000000-{number:032x}" for number in range(5000)]
    for request_id in ids:
        entry = Entry(request_id, "optim_step", "s", None)
        entry.finished_at = entry.created_at + 2.0
        log.add(entry, "run-1", entry.created_at + 0.5)
    return ids


def test_a_timeline_of_many_operations_is_small_and_complete() -> None:
    log = trace.TraceLog()
    ids = add_operations(log)
    size, _ = traced_memory(
        "from tests.local.test_app import add_operations, trace",
        "log = trace.TraceLog(); add_operations(log)",
    )
    assert size < 5000 * 200
    events = json.loads(log.export("s"))["traceEvents"]
    assert [event["args"].get("request_id") for event in events[:-1]] == ids
    assert {(event["name"], event["args"]["outcome"]) for event in events[:-1]} == {
        ("optim_step", "done")
    }
    assert events[0]["dur"] == pytest.approx(1.5e6, abs=1)
    assert events[-1]["args"] == {"name": "run-1"}


async def test_an_answer_that_waits_for_its_model_is_in_flight(service, http) -> None:
    body = {"model": "some/model", "prompt": "x"}  # nothing starts the engine here
    asking = asyncio.create_task(http.post("http://localhost/oai/api/v1/completions", json=body))
    await asyncio.sleep(0.1)
    assert service.num_streams == 1
    await service.drain(0.05)
    response = await asyncio.wait_for(asking, 5)
    assert response.status_code == 503
    assert "the service stopped" in response.json()["error"]["message"]
    assert service.num_streams == 0
