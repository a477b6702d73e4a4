"""A run directory belongs to one process, until that process ends."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.runs import lock
from tinker_cookbook.runs.directory import open_log_dir, prepare_log_dir

HOLDER = """
import sys, time
from tinker_cookbook.runs.directory import open_log_dir
with open_log_dir(sys.argv[1], "ask"):
    print("held", flush=True)
    time.sleep(100)
"""
FORKING_HOLDER = """
import os, sys, time
from tinker_cookbook.runs.directory import open_log_dir
with open_log_dir(sys.argv[1], "ask"):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(100)
"""


def enter(manager: contextlib.AbstractContextManager[object] | None) -> None:
    with manager or contextlib.nullcontext():
        pass


def start_holder(folder: Path, code: str = HOLDER) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_folder_in_use_is_refused_by_whom_and_since_when(tmp_path: Path):
    holder, _ = start_holder(tmp_path / "run")
    try:
        for take in (open_log_dir, prepare_log_dir):
            with pytest.raises(ConfigurationError) as caught:
                enter(take(tmp_path / "run", "delete"))
            assert f"is in use by process {holder.pid} since 20" in str(caught.value)
            assert f"kill {holder.pid}" in str(caught.value)
    finally:
        holder.kill()
        holder.communicate()
    with open_log_dir(tmp_path / "run", "ask"):
        note = json.loads((tmp_path / "run" / lock.LOCK_FILE).read_text())
        assert note["pid"] == os.getpid()


def test_what_children_of_a_dead_process_still_hold_is_taken_over(tmp_path: Path):
    holder, child = start_holder(tmp_path / "run", FORKING_HOLDER)
    try:
        holder.kill()
        holder.wait()
        with (
            open_log_dir(tmp_path / "run", "ask"),
            pytest.raises(ConfigurationError, match="another run of this process"),
        ):
            lock.refuse_if_held(tmp_path / "run")
    finally:
        os.kill(int(child), signal.SIGKILL)
        holder.communicate()


def test_two_runs_of_one_process_are_kept_apart_and_one_after_the_other_is_fine(tmp_path: Path):
    for _ in range(2):
        with (
            open_log_dir(tmp_path, "ask"),
            pytest.raises(ConfigurationError, match="another run of this process"),
        ):
            enter(open_log_dir(tmp_path, "ask"))
        assert list(tmp_path.iterdir()) == []


def test_without_locks_of_the_file_system_the_note_decides(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # an import of it fails, as on Windows
    path = tmp_path / lock.LOCK_FILE
    here = {"host": socket.gethostname(), "started_at": "2026-01-01T00:00:00+00:00"}
    path.write_text(json.dumps(here | {"pid": os.getppid()}))
    with pytest.raises(ConfigurationError, match=f"process {os.getppid()} since 2"):
        enter(lock.hold(tmp_path))
    path.write_text(json.dumps(here | {"pid": os.getpid(), "host": "another-host"}))
    with pytest.raises(ConfigurationError, match=r"on another-host .* delete .*in_use"):
        enter(lock.hold(tmp_path))
    path.write_text(json.dumps(here | {"pid": _dead_pid()}))
    with (
        lock.hold(tmp_path),
        pytest.raises(ConfigurationError, match="another run of this process"),
    ):
        lock.refuse_if_held(tmp_path)
    assert not path.exists()


def _dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_of_many_that_start_at_once_one_at_a_time_is_inside(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    inside, failures = tmp_path / "inside", tmp_path / "failures"
    (tmp_path / "run").mkdir()

    def enter_often() -> None:
        for _ in range(60):
            try:
                with lock.hold(tmp_path / "run"):
                    try:
                        inside.mkdir()
                        time.sleep(0.0005)
                        inside.rmdir()
                    except OSError:
                        failures.touch()
            except ConfigurationError:
                time.sleep(0.0005)

    workers = [context.Process(target=enter_often) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert not failures.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / lock.LOCK_FILE).mkdir()
    with pytest.raises(ConfigurationError, match=f"log_path={tmp_path} cannot be written"):
        enter(lock.hold(tmp_path))
