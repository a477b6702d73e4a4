"""Render rows in background processes, ahead of the loop that needs them.

Each process is a plain child interpreter that communicates over pipes: no fork (safe with threads),
and no re-import of the caller's main module (so scripts without a `__main__` guard and notebooks
work). A process that does not start, cannot unpickle the renderer, or renders the first row
differently from this process is not used; this process then does the work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np
import pydantic

from tinker_cookbook.supervised.conversations import SourceRow

__all__ = ["BackgroundRenderer", "Task", "available_cpus", "read_frame", "write_frame"]

logger = logging.getLogger(__name__)

Render = Callable[[Sequence[SourceRow]], list[Any]]

_HEADER = struct.Struct("<Q")


def available_cpus() -> int:
    """Return the number of CPUs this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not every platform has it
        return os.cpu_count() or 1


def write_frame(stream: BinaryIO, value: object) -> None:
    """Write the length of a pickled value, then the value."""
    data = pickle.dumps(value, protocol=5)
    stream.write(_HEADER.pack(len(data)))
    stream.write(data)
    stream.flush()


def read_frame(stream: BinaryIO) -> Any:
    """Read a value that `write_frame` wrote; raise EOFError at the end of the stream."""
    header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise EOFError
    (length,) = _HEADER.unpack(header)
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return pickle.loads(data)


class _Part:
    """Some rows of a task. A process or the waiting caller renders it, whichever claims it
    first."""

    def __init__(self, rows: Sequence[SourceRow]) -> None:
        self.rows = rows
        self.results: list[Any] | None = None
        self.condition = threading.Condition()
        self.claimed = False

    def claim(self) -> bool:
        with self.condition:
            if self.claimed:
                return False
            self.claimed = True
            return True

    def finish(self, results: list[Any] | None) -> None:
        """Store results, or with None release the claim."""
        with self.condition:
            self.results = results
            self.claimed = results is not None
            self.condition.notify_all()

    def claim_or_wait(self) -> bool:
        """Return True if the caller must render the part, False if the results are available."""
        with self.condition:
            while self.claimed and self.results is None:
                self.condition.wait()
            if self.results is not None:
                return False
            self.claimed = True
            return True

    def __str__(self) -> str:
        return f"{self.rows[0].where} to {self.rows[-1].where}"


class Task:
    """Rows submitted together."""

    def __init__(self, rows: Sequence[SourceRow], rows_per_part: int) -> None:
        self.parts = [
            _Part(rows[start : start + rows_per_part])
            for start in range(0, len(rows), rows_per_part)
        ]

    def cancel(self) -> None:
        """Cancel the parts that nobody has started."""
        for part in self.parts:
            part.claim()


class _Process:
    """A child interpreter that renders rows."""

    def __init__(self, render: bytes) -> None:
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            "from tinker_cookbook.supervised.background_worker import main; "
            f"main(parent_pid={os.getpid()})"
        )
        environment = os.environ | {
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.popen = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self.render = render

    def start(self) -> None:
        """Send the render function. Raises _Refusal if the process cannot use it."""
        self._ask(self.render)

    def run(self, rows: Sequence[SourceRow]) -> list[Any]:
        """Raises _Refusal with the worker's traceback, or EOFError/OSError if it died."""
        return self._ask(list(rows))

    def _ask(self, request: object) -> Any:
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        write_frame(self.popen.stdin, request)  # pyright: ignore[reportArgumentType]
        ok, value = read_frame(self.popen.stdout)  # pyright: ignore[reportArgumentType]
        if not ok:
            raise _Refusal(value)
        return value

    def stop(self) -> None:
        # The child has no state, so it does not have to be asked.
        self.popen.kill()
        self.popen.wait()
        for stream in (self.popen.stdin, self.popen.stdout):
            if stream is not None:
                _close_quietly(stream)

    def death(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(timeout=10)
        code = self.popen.poll()
        if code is None or code >= 0:
            return f"exit status {code}"
        hint = ", which is how a system out of memory ends it" if code == -signal.SIGKILL else ""
        return f"signal {-code}{hint}"


def _close_quietly(stream: Any) -> None:
    with contextlib.suppress(OSError):  # unsent data of a killed child
        stream.close()


class _Refusal(Exception):
    """The worker answered with an error."""


class _Shared:
    """State shared with the threads; it excludes the renderer, so that the renderer can be garbage
    collected."""

    def __init__(self, render: Render, probe: SourceRow) -> None:
        self.render = render
        self.probe = probe
        self.parts: queue.SimpleQueue[_Part | None] = queue.SimpleQueue()
        self.processes: list[_Process] = []
        self.closed = False
        self.render_lock = threading.Lock()
        """Tokenizers do not have to be thread-safe."""
        self.ready: set[_Process] = set()
        self.warned = threading.Event()

    def render_here(self, rows: Sequence[SourceRow]) -> list[Any]:
        with self.render_lock:
            return self.render(rows)


class BackgroundRenderer:
    """Applies `render` to rows in `num_workers` processes.

    Args:
        render: picklable; one result for each row, the same in any process.
        num_workers: number of processes; with 0 this process does everything.
        probe: a row that every process renders first; its result must equal this process's result.
    """

    def __init__(self, render: Render, *, num_workers: int, probe: SourceRow) -> None:
        self._shared = _Shared(render, probe)
        self.num_workers = num_workers if sys.executable else 0
        pickled = _pickled(render) if self.num_workers else None
        if pickled is None:
            self.num_workers = 0
            return
        for _ in range(self.num_workers):
            process = _Process(pickled)
            self._shared.processes.append(process)
            threading.Thread(target=_serve, args=(self._shared, process), daemon=True).start()
        self._stop = weakref.finalize(self, _stop, self._shared)

    @property
    def worker_pids(self) -> list[int]:
        """Return the process ids of the running workers."""
        return [p.popen.pid for p in self._shared.processes if p.popen.poll() is None]

    @property
    def num_ready(self) -> int:
        """Return the number of workers that passed the probe."""
        return len(self._shared.ready)

    def submit(self, rows: Sequence[SourceRow], rows_per_part: int = 64) -> Task:
        """Queue rows; parts of a task are rendered in parallel."""
        task = Task(rows, rows_per_part)
        for part in task.parts if self.num_workers else []:
            self._shared.parts.put(part)
        return task

    def results(self, task: Task) -> list[Any]:
        """Return the results in the order of the rows. Parts that no process has started are
        rendered here."""
        for part in task.parts:
            if part.claim():
                self._render_part(part)
        for part in task.parts:
            if part.claim_or_wait():
                self._render_part(part)
        return list(itertools.chain.from_iterable(part.results or [] for part in task.parts))

    def _render_part(self, part: _Part) -> None:
        try:
            part.finish(self._shared.render_here(part.rows))
        except BaseException:
            part.finish(None)
            raise

    def close(self) -> None:
        """Stop the processes."""
        if self.num_workers:
            self._stop()


def _pickled(render: Render) -> bytes | None:
    try:
        return pickle.dumps(render, protocol=5)
    except (pickle.PicklingError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        logger.warning("rendering in this process: the renderer cannot be pickled (%s)", error)
        return None


def _stop(shared: _Shared) -> None:
    shared.closed = True
    for process in shared.processes:
        shared.parts.put(None)
        process.stop()


def _serve(shared: _Shared, process: _Process) -> None:
    """Thread: feed one process until it ends or the renderer is closed."""
    try:
        if refusal := _refusal(shared, process):
            _warn_once(shared, refusal)
            return
        shared.ready.add(process)
        while (part := shared.parts.get()) is not None and not shared.closed:
            if part.claim() and not _serve_part(shared, process, part):
                return
    finally:
        shared.ready.discard(process)
        process.stop()


def _refusal(shared: _Shared, process: _Process) -> str | None:
    """Return why a process that just started cannot be used."""
    try:
        process.start()
        answer = process.run([shared.probe])
    except (_Refusal, EOFError, OSError) as error:
        logger.debug("worker process: %s", error)
        reason = str(error).strip().rpartition("\n")[2] or process.death()
        return f"a worker process could not start: {reason}"
    if not shared.closed and _comparable(answer) != _comparable(shared.render_here([shared.probe])):
        return f"a worker process renders {shared.probe.where} differently"
    return None


def _serve_part(shared: _Shared, process: _Process, part: _Part) -> bool:
    """Render a part; return False if the process is dead. In every case the part is completed or
    released."""
    results = None
    try:
        results = process.run(part.rows)
    except _Refusal as error:
        # The caller renders the part again, so it gets the same error with its own type.
        logger.debug("worker process, %s: %s", part, error)
    except (EOFError, OSError):
        if not shared.closed:
            logger.warning(
                "a worker process died (%s) while it rendered %s; these rows are rendered here",
                process.death(),
                part,
            )
        return False
    finally:
        part.finish(results)
    return True


def _warn_once(shared: _Shared, reason: str) -> None:
    if not shared.closed and not shared.warned.is_set():
        shared.warned.set()
        logger.warning("rendering in this process: %s", reason)


def _comparable(value: Any) -> Any:
    """Return nested tuples with the content of `value`, for an exact comparison."""
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, list | tuple):
        return tuple(_comparable(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _comparable(item)) for key, item in sorted(value.items()))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return tuple(_comparable(getattr(value, f.name)) for f in dataclasses.fields(value))
    if isinstance(value, pydantic.BaseModel):
        return _comparable(value.model_dump())
    return value
