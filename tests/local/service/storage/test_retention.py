"""Logs, curves and records stay within bounds, and what belongs to a checkpoint stays with it."""

# pyright: reportArgumentType=false

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tinker_cookbook.local.engine.types import TrainDatum, TrainResult
from tinker_cookbook.local.process import lifecycle
from tinker_cookbook.local.service.settings import (
    DAY_SECONDS,
    RetentionSettings,
    ServiceSettings,
)
from tinker_cookbook.local.service.state.core import Service
from tinker_cookbook.local.service.storage import loss_curves as progress
from tinker_cookbook.local.service.storage.loss_curves import ProgressLog
from tinker_cookbook.local.service.storage.retention import log_path, prune_logs
from tinker_cookbook.local.service.storage.rows import RunRow, SamplerRow, SessionRow
from tinker_cookbook.local.service.storage.store import NewCheckpoint

KEY = "tml-0123456789abcdef0123"
KEEP = RetentionSettings(keep_days=10, log_bytes=100_000)


@pytest.fixture
def ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def service(tmp_path: Path):
    service = Service(ServiceSettings(tmp_path / "state", ("some/model",), KEY, retention=KEEP))
    yield service
    service.store.close()


def write_log(state_dir: Path, pid: int, size: int, days_ago: float, part: str = "") -> Path:
    path = log_path(state_dir, pid)
    path = path.with_name(path.name + part)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    modified = time.time() - days_ago * DAY_SECONDS
    os.utime(path, (modified, modified))
    return path


def test_logs_of_ended_processes_go_by_age_and_size(tmp_path: Path, ended_pid: int) -> None:
    alive = write_log(tmp_path, os.getpid(), 10_000, days_ago=99)
    kept = write_log(tmp_path, ended_pid, 400, days_ago=1)
    also_kept = write_log(tmp_path, ended_pid, 500, days_ago=2, part=".1")
    too_much = write_log(tmp_path, ended_pid, 200, days_ago=3, part=".2")
    too_old = write_log(tmp_path, ended_pid, 1, days_ago=11, part=".3")
    foreign = alive.with_name("notes.log")
    foreign.write_text("mine")
    before = time.time() - 10 * DAY_SECONDS
    assert prune_logs(alive.parent, max_bytes=1000, before=before) == 2
    assert {path.name for path in alive.parent.iterdir()} == {
        path.name for path in (alive, kept, also_kept, foreign)
    }
    assert not too_much.exists()
    assert not too_old.exists()


def test_the_log_of_a_process_has_a_size(tmp_path: Path, ended_pid: int) -> None:
    old = write_log(tmp_path, ended_pid, 10, days_ago=11)
    root = logging.getLogger()
    before = list(root.handlers), root.level
    try:
        path = lifecycle.set_up_logging(ServiceSettings(tmp_path, ("m",), KEY, retention=KEEP))
        own = root.handlers[0]
        for number in range(3000):
            logging.getLogger("test").info("request %d of a service that runs for long", number)
        own.close()
    finally:
        root.handlers[:], root.level = before
    files = list(path.parent.iterdir())
    assert sum(file.stat().st_size for file in files) <= KEEP.log_bytes
    assert "request 2999" in path.read_text()
    assert len(files) > 1
    assert not old.exists()


def add_run(service: Service, name: str, days_ago: float) -> str:
    """A session with a run, a sampler and a curve."""
    then = time.time() - days_ago * DAY_SECONDS
    index = service.store.index
    ended = {"type": "client_finished"}
    index.insert(SessionRow(name, then, then, None, None, [], "default", None, ended))
    run_id = f"{name}:train:0"
    index.insert(RunRow(run_id, name, "m", {"rank": 4}, None, then, then, is_trainable=True))
    index.insert(SamplerRow(f"{name}:sample:0", name, "m", None, None, then))
    add_points(service.progress, run_id, 1)
    service.progress.save()
    service.progress.drop(run_id)
    return run_id


def add_points(log: ProgressLog, run_id: str, number: int) -> None:
    for _ in range(number):
        log.add_batch(run_id, [], TrainResult([], {"loss:sum": 1.0}))
        log.add_step(run_id)


def has_curve(service: Service, run_id: str) -> bool:
    return bool(service.progress.curve(run_id))


@pytest.mark.anyio
async def test_old_runs_go_with_their_curves_unless_they_have_checkpoints(service) -> None:
    index = service.store.index
    old, new, saved = (add_run(service, n, d) for n, d in (("old", 11), ("new", 9), ("saved", 99)))
    staged = service.store.stage()
    (staged / "adapter_model.safetensors").write_bytes(b"weights")
    row = service.store.commit(staged, NewCheckpoint(saved, "weights", "x", has_optimizer=False))
    index.put_copy("key", row.tinker_path)
    await service.keep_house()
    assert sorted(index.run_ids()) == sorted([new, saved])
    assert [index.session(name) is None for name in ("old", "new", "saved")] == [True, False, False]
    assert [has_curve(service, run) for run in (old, new, saved)] == [False, True, True]
    assert index.sampler("new:sample:0") is not None
    assert index.sampler("old:sample:0") is None
    assert index.copy_of("key") == row.tinker_path
    service.store.delete(row)
    await service.keep_house()
    assert saved in index.run_ids(), "it is looked at once an hour"
    service.retention.remove_old()
    assert index.run_ids() == [new]
    assert not has_curve(service, saved)
    assert index.copy_of("key") is None


def test_the_curve_of_a_long_run_is_thinned_out(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(progress, "MAX_POINTS_SAVED", 100)
    tmp_path.joinpath("state").mkdir()
    log = ProgressLog(tmp_path / "state")
    for _ in range(100):
        add_points(log, "run", 9)
        log.save()
    (path,) = (tmp_path / "state" / "curves").glob("*.jsonl")
    assert 50 <= len(path.read_text().splitlines()) <= 100
    steps = [point[0] for point in log.curve("run")]
    assert steps == list(range(16, 901, 16))


def test_a_step_is_counted_while_a_disk_is_slow(tmp_path: Path) -> None:
    """The event loop counts; it must not wait for the thread that writes."""
    (tmp_path / "curves").mkdir()
    log = ProgressLog(tmp_path)
    datum = TrainDatum(np.zeros(3, np.int32), {"weights": np.ones(3, np.float32)})
    result = TrainResult(logprobs=[], metrics={"loss:sum": 6.0})
    log.add_batch("run", [datum], result)
    log.add_step("run")
    os.mkfifo(log._path("run"))  # writing waits until somebody reads
    saving = threading.Thread(target=log.save)
    saving.start()
    time.sleep(0.2)
    assert saving.is_alive()
    log.add_batch("run", [datum], result)
    log.add_step("run")
    assert log.facts("run").num_steps == 2
    with log._path("run").open() as reader:
        assert json.loads(reader.readline())[:3] == [1, 2.0, 3]
    saving.join(30)
    assert not saving.is_alive()
