"""Recording of SDK calls: scopes, threads, the exporter, the database, and the proxy."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import tinker

from tests.capture.test_endpoint import ASK, renderer, sampling_client
from tinker_cookbook.capture import (
    CaptureExporter,
    JsonlFileSink,
    capture,
    current_scope,
    instrument_tinker,
    uninstrument_tinker,
)
from tinker_cookbook.capture.instrument import current_exporter
from tinker_cookbook.capture.propagate import (
    instrument_threads,
    threads_instrumented,
    uninstrument_threads,
)
from tinker_cookbook.capture.proxy.address import parse_address
from tinker_cookbook.capture.proxy.app import ProxyDeps, make_app
from tinker_cookbook.capture.proxy.serve import validate_bind
from tinker_cookbook.capture.scope import replace_scope
from tinker_cookbook.capture.store import daemon
from tinker_cookbook.capture.store.client import capture_to_store
from tinker_cookbook.capture.store.daemon import DATABASE, INFO
from tinker_cookbook.exceptions import ConfigurationError, DataFormatError
from tinker_cookbook.stores import LocalStorage

__all__ = ["renderer", "sampling_client"]


class Kept:
    """A sink that keeps records in memory, and can be made to wait."""

    def __init__(self) -> None:
        self.records: list[dict] = []
        self.may_export = threading.Event()
        self.may_export.set()

    def export(self, records: Sequence[dict], timeout: float | None = None) -> None:
        self.may_export.wait()
        self.records += records


def test_scopes_nest_and_end():
    with capture(run_id="r", iteration=1):
        with capture(iteration=2, mine=True) as inner:
            assert dict(inner) == {"run_id": "r", "iteration": 2, "mine": True}
        assert dict(current_scope()) == {"run_id": "r", "iteration": 1}
        with replace_scope({"purpose": "grading"}):
            assert dict(current_scope()) == {"purpose": "grading"}
    assert not current_scope()
    with pytest.raises(ConfigurationError, match="run_id="):
        capture(run_id=["r"])  # pyright: ignore[reportArgumentType]


@pytest.mark.anyio
async def test_decorated_functions_run_in_their_scope():
    @capture(traj_idx=3)
    def plain() -> dict:
        return dict(current_scope())

    @capture(traj_idx=4)
    async def later() -> dict:
        await asyncio.sleep(0)
        return dict(current_scope())

    assert plain() == {"traj_idx": 3}
    both = await asyncio.gather(later(), later())
    assert both == [{"traj_idx": 4}] * 2
    assert not current_scope()


def test_threads_get_the_scope_of_their_starter():
    seen: list[dict] = []

    def look() -> None:
        seen.append(dict(current_scope()))

    def run_both() -> None:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(look).result()

    with capture(run_id="r"):
        run_both()
        instrument_threads()
        try:
            assert threads_instrumented()
            run_both()
        finally:
            uninstrument_threads()
        run_both()
    assert seen == [{}, {}, {"run_id": "r"}, {"run_id": "r"}, {}, {}]


def test_a_full_queue_drops_records_and_counts_them():
    sink = Kept()
    sink.may_export.clear()
    exporter = CaptureExporter(sink, max_queue_size=2, max_batch_size=1)
    for number in range(10):
        exporter.enqueue({"number": number})
    assert not exporter.force_flush(timeout=0.01)
    sink.may_export.set()
    assert exporter.force_flush(timeout=10)
    exporter.shutdown()
    assert exporter.num_dropped > 0
    assert len(sink.records) + exporter.num_dropped == 10


def test_calls_are_recorded_in_their_scope(sampling_client, tmp_path: Path):
    exporter = CaptureExporter(JsonlFileSink(LocalStorage(tmp_path), "run/1"))
    original = tinker.SamplingClient.sample
    instrument_tinker(exporter)
    try:
        assert current_exporter() is exporter
        prompt = tinker.ModelInput.from_ints([5, 6, 7])
        params = tinker.SamplingParams(max_tokens=4, seed=1)
        with capture(run_id="r", iteration=2):
            future = sampling_client.sample(prompt, num_samples=2, sampling_params=params)
        response = future.result()
        assert exporter.wait_pending(10)
    finally:
        uninstrument_tinker()
        exporter.shutdown()
    assert tinker.SamplingClient.sample is original
    [line] = (tmp_path / "run/1/captures.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["kind"] == "sample"
    assert record["scope"] == {"run_id": "r", "iteration": 2}
    assert record["request"]["prompt"] == [5, 6, 7]
    sequences = record["response"]["sequences"]
    assert [s["tokens"] for s in sequences] == [list(s.tokens) for s in response.sequences]
    assert [s["logprobs"] for s in sequences] == [list(s.logprobs) for s in response.sequences]


def test_calls_are_kept_in_a_database(sampling_client, tmp_path: Path):
    prompt = tinker.ModelInput.from_ints([5, 6, 7])
    params = tinker.SamplingParams(max_tokens=4, seed=1)
    try:
        for attempt in range(2):
            with (
                capture_to_store("r", data_dir=tmp_path, run_attempt=attempt, mine="x"),
                capture(traj_idx=7),
            ):
                sampling_client.sample(prompt, num_samples=2, sampling_params=params).result()
    finally:
        os.kill(json.loads((tmp_path / INFO).read_text())["pid"], signal.SIGTERM)
    with sqlite3.connect(tmp_path / DATABASE) as database:
        found = database.execute("SELECT run_id, traj_idx, row FROM rows ORDER BY id").fetchall()
    assert [row[:2] for row in found] == [("r", 7)] * 4
    rows = [json.loads(row[2]) for row in found]
    assert [(row["run_attempt"], row["sample"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(len(row["tokens"]) == len(row["logprobs"]) == 4 for row in rows)
    assert {row["tags"]["mine"] for row in rows} == {"x"}


def test_the_server_of_a_database_ends_when_it_is_idle(tmp_path: Path):
    assert daemon.main([str(tmp_path), "--idle-minutes", "0.001"]) == 0
    assert (tmp_path / DATABASE).exists()
    assert not (tmp_path / INFO).exists()


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("/v1/chat/completions", {}),
        (
            "/run/my%20run/iter/3/group/0/traj/5/v1/messages",
            {"run_id": "my run", "iteration": 3, "group_idx": 0, "traj_idx": 5},
        ),
        ("/purpose/eval", {"purpose": "eval"}),
    ],
)
def test_an_address_is_a_scope(path: str, scope: dict):
    assert parse_address(path) == scope


@pytest.mark.parametrize("path", ["/run/v1/chat", "/iter/x/v1", "/nothing/1/v1", "/run/a/run/b/v1"])
def test_a_wrong_address_is_refused(path: str):
    with pytest.raises(DataFormatError, match="address"):
        parse_address(path)


def test_only_a_key_lets_others_reach_the_proxy():
    assert validate_bind("127.0.0.1", None) is None
    assert validate_bind("0.0.0.0", "secret") is None
    assert "secret key" in str(validate_bind("0.0.0.0", None))


@pytest.mark.anyio
async def test_the_proxy_answers_in_the_scope_of_its_address(sampling_client, renderer):
    sink = Kept()
    exporter = CaptureExporter(sink)
    app = make_app(ProxyDeps(renderer, sampling_client, "policy", 4), auth_token="key")
    instrument_tinker(exporter)
    try:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            key = {"authorization": "Bearer key"}
            body = {"model": "m", "messages": ASK, "seed": 3}
            path = "/run/r/traj/5/v1/chat/completions"
            answer = await client.post(path, json=body, headers=key)
            streamed = await client.post(path, json=body | {"stream": True}, headers=key)
            refused = await client.post(path, json=body)
            unknown = await client.post("/walk/r/v1/messages", json=body, headers=key)
            models = await client.get("/run/r/v1/models", headers=key)
    finally:
        uninstrument_tinker()
        exporter.shutdown()
    text = answer.json()["choices"][0]["message"]["content"]
    chunks = [line for line in streamed.text.splitlines() if line.startswith("data: {")]
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == text
    assert (refused.status_code, unknown.status_code) == (401, 400)
    assert models.json()["data"][0]["id"] == "policy"
    assert [record["scope"] for record in sink.records] == [{"run_id": "r", "traj_idx": 5}] * 2
