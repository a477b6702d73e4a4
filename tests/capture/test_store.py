"""The file of calls: what was acknowledged survives a kill, and a torn line does not."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tinker_cookbook.capture import CallLog, RecordedCall, read_calls
from tinker_cookbook.exceptions import DataFormatError

WRITER = """
import sys
from tinker_cookbook.capture import CallLog, RecordedCall

log = CallLog(sys.argv[1])
for index in range(100_000):
    log.append(RecordedCall("r", index, None, [1] * 50, [2, 3], [-0.1, -0.2], "stop"))
    print(index, flush=True)
"""


def make(index: int, rollout: str = "r") -> RecordedCall:
    return RecordedCall(rollout, index, None, [1, 2], [3], [-0.1234567890123], "stop")


def test_a_killed_writer_has_lost_nothing_that_it_acknowledged(tmp_path: Path):
    path = tmp_path / "calls.jsonl"
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


def test_threads_write_whole_lines(tmp_path: Path):
    path = tmp_path / "calls.jsonl"
    with CallLog(path, sync_to_disk=True) as log:

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


def test_a_full_disk_leaves_the_file_whole(tmp_path: Path):
    """The limit on the size of files stands for the disk; it is set in a child process."""
    path = tmp_path / "calls.jsonl"
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        log = CallLog(path)
        written = 0
        try:
            while True:
                log.append(make(written))
                written += 1
        except OSError:
            os._exit(written)
    _, status = os.waitpid(pid, 0)
    found = list(read_calls(path))
    assert 0 < len(found) == os.waitstatus_to_exitcode(status)
    assert path.read_bytes().endswith(b"\n")


def test_a_line_that_is_not_a_call_is_named(tmp_path: Path):
    path = tmp_path / "calls.jsonl"
    path.write_text('{"rollout": "r"}\n')
    with pytest.raises(DataFormatError, match=r"line 1 is not a recorded call"):
        list(read_calls(path))
