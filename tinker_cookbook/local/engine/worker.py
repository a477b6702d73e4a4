"""The engine thread, and how the service calls it: everything that touches torch happens there.

Importing this module and building an `EngineWorker` are cheap: the thread imports torch.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Generic, ParamSpec, TypeVar

from tinker_cookbook.local.engine.jobs import (
    AnyJob,
    EngineFuture,
    FairShare,
    Job,
    JobLanes,
    fail,
    resolve,
)
from tinker_cookbook.local.engine.settings import EngineSettings
from tinker_cookbook.local.engine.types import OnToken, SampleResult, SampleSpec
from tinker_cookbook.local.errors import UserError

if TYPE_CHECKING:
    from tinker_cookbook.local.engine.host import EngineHost

__all__ = ["EngineWorker"]

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class _Operation(Generic[P, T]):
    """A method of the engine host as a method of the worker, which queues it for the thread.

    Parameters, result and documentation are those of the host's method, and written only there. The
    worker's method returns at once, with an `EngineFuture` of the result.
    """

    def __init__(
        self,
        method: Callable[[EngineHost], Callable[P, T]],
        lane: Callable[..., str],
        *,
        opens: Callable[..., str | None] | None = None,
        quick: bool = False,
    ) -> None:
        """Describe when the operation runs.

        Args:
            method: returns the method of a host.
            lane: returns the lane of a call; it is called with the arguments of the call.
            opens: returns the lane that waits for a call, see `Job.opens`.
            quick: see `Job.quick`.
        """
        self._method = method
        self._lane = lane
        self._opens = opens
        self._quick = quick
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, worker: EngineWorker, owner: type) -> Callable[P, EngineFuture[T]]:
        def submit(*args: P.args, **kwargs: P.kwargs) -> EngineFuture[T]:
            job = Job(
                self._name,
                self._lane(*args, **kwargs),
                lambda: self._method(worker.host)(*args, **kwargs),
                opens=None if self._opens is None else self._opens(*args, **kwargs),
                quick=self._quick,
            )
            return worker.submit(job)

        return submit


def _model_lane(name: str) -> str:
    return f"model:{name}"


def _run_lane(run_id: str, *args: object, **kwargs: object) -> str:
    return f"run:{run_id}"


def _sampler_lane(sampler_id: str, *args: object, **kwargs: object) -> str:
    return f"sampler:{sampler_id}"


def _creation_lane(
    sampler_id: str,
    model_name: str,
    *,
    run_id: str | None = None,
    folder: Path | None = None,
    saved_by: str | None = None,
) -> str:
    """A sampler of a run has the run's weights at this point of the run's order."""
    return _sampler_lane(sampler_id) if run_id is None else _run_lane(run_id)


def _refresh_lane(sampler_id: str, run_id: str) -> str:
    return _run_lane(run_id)


def _spill_lane(seconds: float) -> str:
    return "spill"


class EngineWorker:
    """Owns the engine thread. Methods are thread-safe and return futures at once.

    Operations of one run execute in the order in which they were submitted. Runs take turns, and
    training and sampling share the time evenly while both have work. A `UserError` in a future is
    the caller's fault; any other error is a fault of the engine.

    To add an operation, write it as a method of `EngineHost` and name its lane here.
    """

    load_model = _Operation(lambda host: host.load_model, _model_lane)
    create_run = _Operation(lambda host: host.create_run, _run_lane)
    create_run_from = _Operation(lambda host: host.create_run_from, _run_lane)
    load_run = _Operation(lambda host: host.load_run, _run_lane)
    save_run = _Operation(lambda host: host.save_run, _run_lane)
    forward_backward = _Operation(lambda host: host.forward_backward, _run_lane)
    optim_step = _Operation(lambda host: host.optim_step, _run_lane)
    free_run = _Operation(lambda host: host.free_run, _run_lane)
    create_sampler = _Operation(
        lambda host: host.create_sampler, _creation_lane, opens=_sampler_lane
    )
    refresh_sampler = _Operation(lambda host: host.refresh_sampler, _refresh_lane)
    free_sampler = _Operation(lambda host: host.free_sampler, _sampler_lane, quick=True)
    spill_idle = _Operation(lambda host: host.spill_idle, _spill_lane)

    def __init__(self, settings: EngineSettings | None = None) -> None:
        """Start the thread."""
        self._settings = settings or EngineSettings()
        self._changed = threading.Condition()
        self._lanes = JobLanes()
        self._share = FairShare()
        self._training_since = 0.0
        self._host: EngineHost | None = None
        self._closing = False
        self._failure: Exception = RuntimeError("the engine is closed; start the service again")
        """Error of unfinished and later operations once the thread has ended."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def sample(
        self,
        sampler_id: str,
        spec: SampleSpec,
        *,
        on_token: OnToken | None = None,
        client: str = "",
    ) -> EngineFuture[SampleResult]:
        """Sample completions of a prompt; cancelling the future stops it at any time.

        This is not an `_Operation`: the host keeps the future and resolves it many steps later.

        Args:
            client: who sent the request. Clients with work share the machine evenly, however much
                each of them has submitted.
        """
        future: EngineFuture[SampleResult] = EngineFuture()

        def start() -> None:
            self.host.sample(sampler_id, spec, future, on_token, client)

        lane = _sampler_lane(sampler_id)
        return self.submit(Job("sample", lane, start, future, quick=True, deferred=True))

    def stats(self) -> dict[str, float]:
        """Return counts, rates and memory at this moment."""
        host = self._host
        with self._changed:
            numbers: dict[str, float] = {"queued_operations": float(len(self._lanes))}
        return numbers | (host.stats() if host is not None else {})

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is computed: the worker was closed, or its thread failed."""
        return self._closing

    def close(self) -> None:
        """Stop after the current operation; everything unfinished fails."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def submit(self, job: Job[T]) -> EngineFuture[T]:
        """Queue a job and return its future."""
        with self._changed:
            if self._closing:
                fail(job.future, self._failure)
            else:
                self._lanes.add(job)
                self._changed.notify_all()
        return job.future

    # --- in the engine thread ------------------------------------------------------------------

    @property
    def host(self) -> EngineHost:
        """The engine host; only the engine thread may use it."""
        assert self._host is not None, "jobs run after the host was built"
        return self._host

    def _run(self) -> None:
        try:
            from tinker_cookbook.local.engine.native.build import start_build

            start_build()  # the compiler runs while torch is imported and weights are read
            _limit_spinning()
            from tinker_cookbook.local.engine.host import EngineHost

            self._host = EngineHost(self._settings, pause=self._let_sampling_run)
            while self._serve_once():
                pass
        except Exception as error:
            logger.exception("the engine thread failed")
            self._failure = error
        self._shut_down()

    def _serve_once(self) -> bool:
        """Do the next piece of work, waiting for one if there is none; return False when closed."""
        host = self.host
        with self._changed:
            while not (self._closing or host.has_sampling_work or self._lanes.has_ready()):
                self._changed.wait()
            if self._closing:
                return False
        self._run_quick_jobs()
        job_waits = self._has_long_job()
        if host.has_sampling_work and (not job_waits or self._share.sampling_is_due()):
            self._sample_once(job_waits=job_waits)
        elif job_waits:
            self._run_long_job()
        return True

    def _has_long_job(self) -> bool:
        with self._changed:
            return self._lanes.has_ready(quick=False)

    def _run_quick_jobs(self) -> None:
        while True:
            with self._changed:
                job = self._lanes.take(quick=True)
            if job is None:
                return
            self._execute(job)

    def _run_long_job(self) -> None:
        with self._changed:
            job = self._lanes.take(quick=False)
        if job is None:
            return
        self._training_since = time.perf_counter()
        self._execute(job)
        self._charge_training()

    def _charge_training(self) -> None:
        now = time.perf_counter()
        waits = self.host.has_sampling_work
        self._share.charge("training", now - self._training_since, other_waits=waits)
        self._training_since = now

    def _sample_once(self, *, job_waits: bool) -> None:
        started = time.perf_counter()
        self.host.sampling_step()
        seconds = time.perf_counter() - started
        self._share.charge("sampling", seconds, other_waits=job_waits)

    def _let_sampling_run(self) -> None:
        """Give sampling its share of the time; long operations call this between their parts."""
        if self._closing:
            raise self._failure
        self._charge_training()
        self._run_quick_jobs()
        host = self.host
        while host.has_sampling_work and self._share.sampling_is_due() and not self._closing:
            self._sample_once(job_waits=True)
            self._run_quick_jobs()
        self._training_since = time.perf_counter()

    def _execute(self, job: AnyJob) -> None:
        if not job.deferred and not job.future.set_running_or_notify_cancel():
            return
        try:
            value = job.call()
        except Exception as error:
            if not isinstance(error, UserError):
                logger.error("%s in %s failed", job.name, job.lane, exc_info=error)
            fail(job.future, error)
        else:
            if not job.deferred:
                resolve(job.future, value)

    def _shut_down(self) -> None:
        with self._changed:
            self._closing = True
            jobs = self._lanes.clear()
        for job in jobs:
            fail(job.future, self._failure)
        if self._host is not None:
            self._host.close(self._failure)


def _limit_spinning() -> None:
    """Let threads of GNU OpenMP, which torch uses, sleep sooner when they wait for each other.

    By default they spin for milliseconds. Where other programs run, the thread they wait for often
    has no CPU meanwhile: a decode step on a busy two-core machine took 4 times as long and 7 times
    the CPU time. This works only before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "4000")
