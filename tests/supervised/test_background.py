"""Background processes: same results as here, whatever happens to them."""

import gc
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tinker_cookbook.supervised.background import BackgroundRenderer
from tinker_cookbook.supervised.conversations import SourceRow

ROOT = Path(__file__).parents[2]


def rows(count: int) -> list[SourceRow]:
    return [SourceRow(f"f:{i + 1}", {"value": i}) for i in range(count)]


def values(batch) -> list[int]:
    return [row.value["value"] for row in batch]


def double(batch):
    print("a print of the renderer must not get into the answers")
    return [value * 2 for value in values(batch)]


def refuse_seven(batch):
    for row in batch:
        if row.value["value"] == 7:
            raise KeyError(f"{row.where}: seven")
    return values(batch)


def own_pid(batch):
    return [os.getpid() for _ in batch]


def die_at_seven_elsewhere(batch):
    if 7 in values(batch) and "TINKER_TEST_MAIN" not in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    return values(batch)


def loaded_torch(batch):
    import tinker  # noqa: F401

    return [sys.modules.get("torch") is not None and "TINKER_TEST_MAIN" not in os.environ] * len(
        batch
    )


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def start():
    started: list[BackgroundRenderer] = []

    def start_renderer(render, num_workers: int, *, ready: bool = True) -> BackgroundRenderer:
        renderer = BackgroundRenderer(render, num_workers=num_workers, probe=rows(1)[0])
        started.append(renderer)
        if ready:
            wait_until(lambda: renderer.num_ready == num_workers)
        return renderer

    yield start_renderer
    for renderer in started:
        renderer.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_results_are_in_the_order_of_the_rows(start, num_workers):
    renderer = start(double, num_workers)
    tasks = [renderer.submit(rows(count), rows_per_part=3) for count in (10, 1, 25, 0)]
    for task, count in zip(tasks, (10, 1, 25, 0), strict=True):
        assert renderer.results(task) == [2 * i for i in range(count)]


def test_results_do_not_wait_for_the_processes_to_start(start):
    renderer = start(double, 1, ready=False)
    assert renderer.results(renderer.submit(rows(5))) == [0, 2, 4, 6, 8]


def test_the_processes_do_the_work_ahead(start):
    renderer = start(double, 1)
    task = renderer.submit(rows(5), rows_per_part=2)
    wait_until(lambda: all(part.results is not None for part in task.parts))
    assert renderer.results(task) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_reaches_the_caller_with_its_own_type(start, num_workers):
    renderer = start(refuse_seven, num_workers)
    task = renderer.submit(rows(10), rows_per_part=2)
    if num_workers:
        wait_until(lambda: task.parts[4].results is not None)  # the part with 7 came before
    with pytest.raises(KeyError, match="f:8: seven"):
        renderer.results(task)
    assert renderer.results(renderer.submit(rows(3))) == [0, 1, 2]


def test_a_process_that_dies_is_replaced_by_this_one(start, caplog, monkeypatch):
    renderer = start(die_at_seven_elsewhere, 1)
    monkeypatch.setenv("TINKER_TEST_MAIN", "1")
    task = renderer.submit(rows(10), rows_per_part=5)
    with caplog.at_level(logging.WARNING):
        wait_until(lambda: not renderer.worker_pids)
        assert renderer.results(task) == list(range(10))
    assert "signal 9" in caplog.text
    assert "out of memory" in caplog.text
    assert "f:6 to f:10" in caplog.text
    assert renderer.results(renderer.submit(rows(9))) == list(range(9))


def test_a_process_that_renders_differently_is_not_used(start, caplog):
    renderer = start(own_pid, 1, ready=False)
    wait_until(lambda: not renderer.worker_pids)
    assert set(renderer.results(renderer.submit(rows(5)))) == {os.getpid()}
    assert "renders f:1 differently" in caplog.text


def test_what_cannot_be_pickled_is_rendered_here(start, caplog):
    renderer = start(lambda batch: values(batch), 2, ready=False)
    assert renderer.results(renderer.submit(rows(3))) == [0, 1, 2]
    assert "cannot be pickled" in caplog.text
    assert renderer.worker_pids == []


def test_workers_do_not_load_torch(start, monkeypatch):
    monkeypatch.setenv("TINKER_TEST_MAIN", "1")
    renderer = BackgroundRenderer(loaded_torch, num_workers=0, probe=rows(1)[0])
    assert renderer.results(renderer.submit(rows(1))) == [False]
    monkeypatch.delenv("TINKER_TEST_MAIN")
    worker = start(loaded_torch, 1, ready=False)
    monkeypatch.setenv("TINKER_TEST_MAIN", "1")
    wait_until(lambda: worker.num_ready == 1 or not worker.worker_pids)
    assert worker.num_ready == 1, "the worker said that torch is loaded"


def test_close_stops_the_processes(start):
    renderer = start(double, 2)
    pids = renderer.worker_pids
    assert len(pids) == 2
    renderer.close()
    assert not any(map(is_alive, pids))


def test_dropping_the_last_reference_stops_the_processes():
    renderer = BackgroundRenderer(double, num_workers=1, probe=rows(1)[0])
    (pid,) = renderer.worker_pids
    del renderer
    gc.collect()
    wait_until(lambda: not is_alive(pid))


def run_script(body: str) -> subprocess.Popen:
    """A script without a `__main__` guard, in a separate process group."""
    script = textwrap.dedent(
        """
        import time
        from tests.supervised.test_background import double, rows
        from tinker_cookbook.supervised.background import BackgroundRenderer
        renderer = BackgroundRenderer(double, num_workers=2, probe=rows(1)[0])
        while renderer.num_ready < 2:
            time.sleep(0.02)
        print("PIDS", *renderer.worker_pids, flush=True)
        """
    ) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def read_pids(process: subprocess.Popen) -> list[int]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("PIDS"):
            pids = [int(word) for word in line.split()[1:]]
            assert len(pids) == 2
            return pids
    raise AssertionError(process.communicate()[1])


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_its_parent(signal_number):
    with run_script("time.sleep(30)") as process:
        pids = read_pids(process)
        if signal_number == signal.SIGINT:
            os.killpg(process.pid, signal_number)  # as a terminal sends Ctrl-C
        else:
            process.send_signal(signal_number)
        process.wait(timeout=30)
        wait_until(lambda: not any(map(is_alive, pids)), seconds=30)
        assert process.stderr is not None
        noise = process.stderr.read()
        assert "worker process died" not in noise
        assert noise.count("Traceback") == (signal_number == signal.SIGINT)


def test_a_script_ends_by_itself_and_quietly():
    body = "task = renderer.submit(rows(1000)); print(sum(renderer.results(task)))"
    with run_script(body) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.split()[-1] == str(sum(2 * i for i in range(1000)))
    assert "Traceback" not in err
    assert "worker process" not in err
