"""The engine thread: everything that touches torch happens in it, one operation at a time.

Importing this module and building an `EngineWorker` cost nothing; the thread imports torch.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinker_cookbook.local.engine.jobs import EngineSettings, FairShare, Job, JobLanes, resolve
from tinker_cookbook.local.engine.types import (
    AdamSpec,
    LoraSpec,
    LossSpec,
    ModelInfo,
    OnToken,
    SampleResult,
    SampleSpec,
    TrainDatum,
    TrainResult,
)

if TYPE_CHECKING:
    from tinker_cookbook.local.engine.host import EngineHost

__all__ = ["EngineWorker"]

logger = logging.getLogger(__name__)

_CLOSED = "the engine is closed; start the service again"


class EngineWorker:
    """Owns the engine thread; methods are thread-safe and return futures at once.

    Operations of one run execute in the order they were submitted. Runs take turns, and training
    and sampling share the time evenly while both have work. A `UserError` in a future is the
    caller's fault, anything else the engine's.
    """

    def __init__(
        self,
        *,
        device: str | None = None,
        dtype: str | None = None,
        num_threads: int | None = None,
        kv_cache_bytes: int | None = None,
        memory_bytes: int | None = None,
        spill_dir: Path | None = None,
    ) -> None:
        """Start the thread.

        Args:
            device: torch's name; None picks the best there is.
            dtype: `float32` or `bfloat16` for base weights; None: see `choose_dtype`.
            num_threads: CPU threads of torch's kernels; None is torch's own choice.
            kv_cache_bytes: memory for keys and values of one model; None is a quarter of what is
                free when the model is loaded, at most 4 GiB.
            memory_bytes: what the process may hold; None is what the machine or container has.
            spill_dir: where adapters wait that are not used; None keeps them in memory.
        """
        self._settings = EngineSettings(
            device, dtype, num_threads, kv_cache_bytes, memory_bytes, spill_dir
        )
        self._changed = threading.Condition()
        self._lanes = JobLanes()
        self._share = FairShare()
        self._new_samplers: dict[str, Future[None]] = {}
        self._host: EngineHost | None = None
        self._closing = False
        self._failure: Exception = RuntimeError(_CLOSED)
        """What unfinished and later operations fail with once the thread has ended."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- models and runs -----------------------------------------------------------------------

    def load_model(self, name: str) -> Future[ModelInfo]:
        """Load a base model (a folder or a name); a loaded one is answered at once."""
        return self._submit("load_model", f"model:{name}", lambda host: host.load_model(name))

    def create_run(self, run_id: str, model_name: str, lora: LoraSpec) -> Future[None]:
        """Begin a run with a new adapter."""
        return self._on_run("create_run", run_id, lambda h: h.create_run(run_id, model_name, lora))

    def create_run_from(
        self, run_id: str, folder: Path, *, with_optimizer: bool
    ) -> Future[LoraSpec]:
        """Begin a run with a saved adapter, a folder that `save_run` wrote."""
        return self._on_run(
            "create_run_from",
            run_id,
            lambda host: host.create_run_from(run_id, folder, with_optimizer=with_optimizer),
        )

    def load_run(self, run_id: str, folder: Path, *, with_optimizer: bool) -> Future[None]:
        """Put a saved adapter into an existing run."""
        return self._on_run(
            "load_run",
            run_id,
            lambda host: host.load_run(run_id, folder, with_optimizer=with_optimizer),
        )

    def save_run(self, run_id: str, folder: Path, *, with_optimizer: bool) -> Future[None]:
        """Write a run's adapter into an existing empty folder, flushed to the disk."""
        return self._on_run(
            "save_run",
            run_id,
            lambda host: host.save_run(run_id, folder, with_optimizer=with_optimizer),
        )

    def forward_backward(
        self, run_id: str, data: Sequence[TrainDatum], loss: LossSpec, *, backward: bool = True
    ) -> Future[TrainResult]:
        """Compute a loss over a batch; with `backward`, add its gradient to the run's.

        A call that fails leaves no gradient behind.
        """
        return self._on_run(
            "forward_backward" if backward else "forward",
            run_id,
            lambda host: host.forward_backward(
                run_id, data, loss, backward=backward, pause=self._let_sampling_run
            ),
        )

    def optim_step(self, run_id: str, adam: AdamSpec) -> Future[dict[str, float]]:
        """Update the adapter with the gathered gradient and clear it."""
        return self._on_run("optim_step", run_id, lambda host: host.optim_step(run_id, adam))

    def free_run(self, run_id: str) -> Future[None]:
        """Drop a run and its memory."""
        return self._on_run("free_run", run_id, lambda host: host.free_run(run_id))

    # --- sampling ------------------------------------------------------------------------------

    def create_sampler(
        self,
        sampler_id: str,
        model_name: str,
        *,
        run_id: str | None = None,
        folder: Path | None = None,
    ) -> Future[None]:
        """Make a sampler of the base model, of a run at this point of its order, or of a folder."""
        lane = f"sampler:{sampler_id}" if run_id is None else f"run:{run_id}"
        future: Future[None] = Future()
        with self._changed:
            self._new_samplers[sampler_id] = future
        return self._submit(
            "create_sampler",
            lane,
            lambda host: host.create_sampler(sampler_id, model_name, run_id=run_id, folder=folder),
            future=future,
        )

    def refresh_sampler(self, sampler_id: str, run_id: str) -> Future[None]:
        """Give a sampler the run's weights at this point of its order.

        Requests that it is already serving go on with the weights they began with.
        """
        return self._on_run(
            "refresh_sampler", run_id, lambda host: host.refresh_sampler(sampler_id, run_id)
        )

    def sample(
        self,
        sampler_id: str,
        spec: SampleSpec,
        *,
        on_token: OnToken | None = None,
        client: str = "",
    ) -> Future[SampleResult]:
        """Sample completions of a prompt. Cancelling the future stops it.

        Args:
            client: whose request it is. Clients with work share the machine evenly, whatever each
                of them has outstanding.
            on_token: called in the engine thread with (sequence index, token, logprob), and the
                top-k logprobs if the request asks for them, as each token is drawn; it must
                return quickly.
        """
        future: Future[SampleResult] = Future()
        return self._submit(
            "sample",
            f"sampler:{sampler_id}",
            lambda host: host.sample(sampler_id, spec, future, on_token, client),
            future=future,
            after=self._new_samplers.get(sampler_id),
            deferred=True,
        )

    def free_sampler(self, sampler_id: str) -> Future[None]:
        """Drop a sampler; requests that it is serving are finished."""
        return self._submit(
            "free_sampler",
            f"sampler:{sampler_id}",
            lambda host: host.free_sampler(sampler_id),
            after=self._new_samplers.get(sampler_id),
            quick=True,
        )

    def spill_idle(self, seconds: float) -> Future[int]:
        """Move runs and samplers that were not used for so long to disk; how many these are."""
        return self._submit("spill_idle", "spill", lambda host: host.spill_idle(seconds))

    # --- the whole -----------------------------------------------------------------------------

    def stats(self) -> dict[str, float]:
        """Counts, rates and memory at this moment."""
        host = self._host
        with self._changed:
            numbers: dict[str, float] = {"queued_operations": float(len(self._lanes))}
        return numbers | (host.stats() if host is not None else {})

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is computed: it was closed, or its thread failed."""
        return self._closing

    def close(self) -> None:
        """Stop after the current operation; everything unfinished fails."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _on_run(self, name: str, run_id: str, call: Callable[[EngineHost], Any]) -> Future[Any]:
        return self._submit(name, f"run:{run_id}", call)

    def _submit(
        self,
        name: str,
        lane: str,
        call: Callable[[EngineHost], Any],
        *,
        future: Future[Any] | None = None,
        after: Future[Any] | None = None,
        deferred: bool = False,
        quick: bool = False,
    ) -> Future[Any]:
        def call_with_host() -> Any:
            assert self._host is not None, "jobs run after the host is there"
            return call(self._host)

        job = Job(
            name, lane, call_with_host, future or Future(), after, quick or deferred, deferred
        )
        with self._changed:
            if self._closing:
                resolve(job.future, error=self._failure)
            else:
                self._lanes.add(job)
                self._changed.notify_all()
        return job.future

    # --- in the engine thread ------------------------------------------------------------------

    def _run(self) -> None:
        try:
            from tinker_cookbook.local.engine.native.build import start_build

            start_build()  # the compiler works while torch is imported and weights are read
            _limit_spinning()
            from tinker_cookbook.local.engine.host import EngineHost

            self._host = EngineHost(self._settings)
            while self._serve_once():
                pass
        except Exception as error:
            logger.exception("the engine thread failed")
            self._failure = error
        self._shut_down()

    def _serve_once(self) -> bool:
        """Run the next piece of work, waiting for one if there is none; False when closing."""
        host = self._host
        assert host is not None
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
        waits = self._host is not None and self._host.has_sampling_work
        self._share.charge("training", now - self._training_since, other_waits=waits)
        self._training_since = now

    def _sample_once(self, *, job_waits: bool) -> None:
        started = time.perf_counter()
        assert self._host is not None
        self._host.sampling_step()
        seconds = time.perf_counter() - started
        self._share.charge("sampling", seconds, other_waits=job_waits)

    def _let_sampling_run(self) -> None:
        """Called by a long operation between its parts: gives sampling its share of the time."""
        if self._closing:
            raise self._failure
        self._charge_training()
        self._run_quick_jobs()
        host = self._host
        assert host is not None
        while host.has_sampling_work and self._share.sampling_is_due() and not self._closing:
            self._sample_once(job_waits=True)
            self._run_quick_jobs()
        self._training_since = time.perf_counter()

    def _execute(self, job: Job) -> None:
        if not job.deferred and not job.future.set_running_or_notify_cancel():
            return
        try:
            value = job.call()
        except Exception as error:
            self._log_failure(job, error)
            resolve(job.future, error=error)
        else:
            if not job.deferred:
                resolve(job.future, value)
        if job.name == "create_sampler":
            self._forget_new_samplers()

    def _forget_new_samplers(self) -> None:
        with self._changed:
            done = [name for name, future in self._new_samplers.items() if future.done()]
            for name in done:
                del self._new_samplers[name]

    def _log_failure(self, job: Job, error: Exception) -> None:
        from tinker_cookbook.local.errors import UserError

        if not isinstance(error, UserError):
            logger.error("%s in %s failed", job.name, job.lane, exc_info=error)

    def _shut_down(self) -> None:
        with self._changed:
            self._closing = True
            jobs = self._lanes.clear()
        for job in jobs:
            resolve(job.future, error=self._failure)
        if self._host is not None:
            self._host.close(self._failure)


def _limit_spinning() -> None:
    """Let threads of GNU OpenMP, which torch uses, sleep sooner when they wait for each other.

    By default they spin for milliseconds. Where other programs run, the one they wait for often has
    no CPU meanwhile: a decode step on a busy two-core machine took 4 times as long and 7 times the
    CPU. Counts only if torch is not imported yet.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "4000")
