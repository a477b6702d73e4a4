"""The stores of calls: what was acknowledged survives a kill, and a torn record does not."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tinker_cookbook.capture import (
    CallDatabase,
    CallLog,
    RecordedCall,
    open_calls,
    read_calls,
)
from tinker_cookbook.capture.store.database import read_database
from tinker_cookbook.exceptions import DataFormatError

WRITER = """
import sys
from tinker_cookbook.capture import RecordedCall, open_calls

log = open_calls(sys.argv[1])
for index in range(100_000):
    log.append(RecordedCall("r", index, None, [1] * 50, [2, 3], [-0.1, -0.2], "stop"))
    print(index, flush=True)
"""


def make(index: int, rollout: str = "r") -> RecordedCall:
    return RecordedCall(rollout, index, None, [1, 2], [3], [-0.1234567890123], "stop")


@pytest.mark.parametrize("name", ["calls.jsonl", "calls.sqlite"])
def test_a_killed_writer_has_lost_nothing_that_it_acknowledged(tmp_path: Path, name: str):
    path = tmp_path / name
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    acknowledged = [int(process.stdout.readline()) for _ in range(200)]
    process.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in process.stdout.read().splitlines(keepends=True)]
    process.wait()
    recorded = [call.index for call in read_calls(path)]
    assert recorded[: len(acknowledged)] == acknowledged
    assert len(recorded) <= len(acknowledged) + 1


def test_a_torn_line_is_dropped_and_the_file_continues(tmp_path: Path):
    path = tmp_path / "folder/calls.jsonl"
    with CallLog(path) as log:
        log.append(make(0))
    with path.open("a") as file:
        file.write('{"rollout": "r", "ind')
    assert list(read_calls(path)) == [make(0)]
    with CallLog(path) as log:
        log.append(make(1))
    assert list(read_calls(path)) == [make(0), make(1)]


@pytest.mark.parametrize("name", ["calls.jsonl", "calls.sqlite"])
def test_threads_write_whole_records(tmp_path: Path, name: str):
    path = tmp_path / name
    with open_calls(path, sync_to_disk=True) as log:

        def write(name: str) -> None:
            for index in range(50):
                log.append(make(index, name))

        threads = [threading.Thread(target=write, args=(f"r{n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = list(read_calls(path))
    for n in range(4):
        assert [call.index for call in found if call.rollout == f"r{n}"] == list(range(50))


@pytest.mark.parametrize(("name", "limit"), [("calls.jsonl", 1000), ("calls.sqlite", 60_000)])
def test_a_full_disk_leaves_the_store_whole(tmp_path: Path, name: str, limit: int):
    """The limit on the size of files stands for the disk; it is set in a child process."""
    path = tmp_path / name
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        log = open_calls(path)
        written = 0
        try:
            while written < 255:
                log.append(make(written))
                written += 1
        except OSError:
            os._exit(written)
        os._exit(255)
    _, status = os.waitpid(pid, 0)
    found = list(read_calls(path))
    assert 0 < len(found) == os.waitstatus_to_exitcode(status) < 255
    assert [call.index for call in found] == list(range(len(found)))


def test_processes_write_one_database(tmp_path: Path):
    path = tmp_path / "calls.db"
    with CallDatabase(path), CallDatabase(path) as second:
        second.append(make(1))
    with CallDatabase(path) as first:
        first.append(make(2, "other"))
    assert list(read_calls(path)) == [make(1), make(2, "other")]
    assert list(read_database(path, "other")) == [make(2, "other")]


def test_another_file_is_refused(tmp_path: Path):
    path = tmp_path / "calls.db"
    path.write_text("This text is long enough for a header\n")
    with pytest.raises(DataFormatError, match=r"calls\.db is not a database"):
        open_calls(path)


def test_a_line_that_is_not_a_call_is_named(tmp_path: Path):
    path = tmp_path / "calls.jsonl"
    path.write_text('{"rollout": "r"}\n')
    with pytest.raises(DataFormatError, match=r"line 1 is not a recorded call"):
        list(read_calls(path))
