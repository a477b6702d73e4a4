"""The service behind the routes: the state that they share, and the life of an operation."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

from tinker_cookbook.exceptions import TinkerCookbookError
from tinker_cookbook.local.engine.memory import resident_bytes
from tinker_cookbook.local.errors import (
    GoneError,
    NotFoundError,
    ShuttingDownError,
    StorageError,
    UserError,
)
from tinker_cookbook.local.service.protocol.auth import Authenticator
from tinker_cookbook.local.service.settings import ServiceSettings
from tinker_cookbook.local.service.state.engine import EngineAccess
from tinker_cookbook.local.service.state.freed_memory import FreedMemory
from tinker_cookbook.local.service.state.futures import Entry, FutureTable, Payload
from tinker_cookbook.local.service.state.presence import Presence
from tinker_cookbook.local.service.state.request_trace import TraceLog
from tinker_cookbook.local.service.state.runs import Run
from tinker_cookbook.local.service.state.samplers import SamplerTable
from tinker_cookbook.local.service.state.service_metrics import Metrics
from tinker_cookbook.local.service.state.sessions import Session, SessionTable
from tinker_cookbook.local.service.state.uploaded_losses import LossTable
from tinker_cookbook.local.service.storage.loss_curves import ProgressLog
from tinker_cookbook.local.service.storage.retention import Retention
from tinker_cookbook.local.service.storage.rows import Status
from tinker_cookbook.local.service.storage.store import Store
from tinker_cookbook.local.service.threads import STORING

__all__ = ["Service", "Work"]

logger = logging.getLogger(__name__)

Work = Callable[[], Awaitable[Payload]]
"""One operation. To keep the order of a run, it must give its work to the engine before its first
`await`, or be submitted with `alone`."""

HOUSEKEEPING_SECONDS = 20.0
WATCH_SECONDS = 1.0
FETCH_SECONDS = 2.0
"""Time that a shutdown gives clients to fetch results that have just been finished."""


class Service:
    """State of one service process. Use it only on the event loop's thread."""

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings = settings
        self.limits = settings.limits
        self.auth = Authenticator(settings.api_key)
        self.store = Store(settings.state_dir)
        self.engine = EngineAccess(settings, spill_dir=self.store.spill_dir)
        self.futures = FutureTable(
            keep_seconds=self.limits.result_keep_seconds,
            keep_bytes=self.limits.result_keep_bytes,
            read_keep_seconds=self.limits.read_keep_seconds,
        )
        self.sessions = SessionTable(self.store.index, Presence(self.limits.patience))
        self.samplers = SamplerTable(self.engine, self.store)
        self.losses = LossTable()
        self.runs: dict[str, Run] = {}
        self.trace = TraceLog()
        self.metrics = Metrics()
        self.progress = ProgressLog(settings.state_dir)
        self.retention = Retention(settings.retention, self.store, self.progress)
        self.freed_memory = FreedMemory()
        self.started_at = time.time()
        self.is_draining = False
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._streams: set[asyncio.Future] = set()
        self._housekeeping: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._freeing: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self.engine.start()
        self._housekeeping = asyncio.create_task(self._keep_house())
        self._watching = asyncio.create_task(self._watch_clients())

    def require_open(self) -> None:
        """Refuse new work during a shutdown. The SDK sends it again, to the next service."""
        if self.is_draining:
            raise ShuttingDownError("the service is shutting down")

    def launch(
        self, entry: Entry, work: Work, *, lane: str, run: Run | None = None
    ) -> asyncio.Task[None]:
        """Start an operation whose result or error becomes the result of its future."""
        started_at = time.time()
        task = asyncio.create_task(self._perform(entry, work))
        self._tasks[entry.request_id] = task
        if run is not None:
            run.num_running += 1

        def settle(_: asyncio.Task[None]) -> None:
            # also called if the task was cancelled before its first step
            self._tasks.pop(entry.request_id, None)
            self.futures.fail(entry, f"{entry.kind} was cancelled", "user")
            self.trace.add(entry, lane, started_at)
            outcome = "done" if not entry.failed else f"{entry.category}_error"
            self.metrics.count_operation(entry.kind, outcome, time.time() - started_at)
            if run is not None:
                run.num_running -= 1
                run.touch()

        task.add_done_callback(settle)
        return task

    async def _perform(self, entry: Entry, work: Work) -> None:
        try:
            self.futures.resolve(entry, await work())
        except (UserError, ShuttingDownError, TinkerCookbookError) as error:
            logger.info("%s %s refused: %s", entry.request_id, entry.kind, error)
            self.futures.fail(entry, str(error), "user")
        except StorageError as error:
            logger.error("%s %s failed: %s", entry.request_id, entry.kind, error)
            self.futures.fail(entry, str(error), "server")
        except Exception as error:
            logger.exception("%s %s failed", entry.request_id, entry.kind)
            self.futures.fail(
                entry, f"{type(error).__name__}: {error} (request {entry.request_id})", "server"
            )

    @contextlib.contextmanager
    def in_flight(self, work: asyncio.Future) -> Iterator[None]:
        """Count work that has no future. A shutdown waits for it, then cancels it."""
        self._streams.add(work)
        try:
            yield
        finally:
            self._streams.discard(work)

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    def engine_stats(self) -> dict[str, float]:
        """Return counts and memory of the engine; empty while it starts."""
        return self.engine.worker.stats() if self.engine.is_ready else {}

    def resident_bytes(self) -> int:
        """Return the memory of this process."""
        return resident_bytes()

    def cancel(self, request_id: str) -> None:
        """Cancel an operation. A finished or unknown request is ignored."""
        task = self._tasks.get(request_id)
        if task is not None:
            task.cancel()

    def get_run(self, run_id: str) -> Run:
        """Return a run that is in this process's memory, or raise NotFoundError."""
        run = self.runs.get(run_id)
        if run is not None:
            return run
        row = self.store.index.run(run_id)
        if row is None:
            raise NotFoundError(f"model_id={run_id[:200]!r} does not exist")
        raise NotFoundError(
            f"model_id={run_id!r} is no longer in memory (its session ended or the service was "
            "restarted); continue from one of its checkpoints with "
            "create_training_client_from_state_with_optimizer",
        )

    def submit(self, run: Run, seq_id: int, kind: str, work: Work, *, alone: bool = False) -> str:
        """Queue a numbered operation of a run; returns its request id. A repeat gets the same id.

        Args:
            alone: start later operations of the run only when this one has finished. It may then
                await other things before it gives its work to the engine.
        """
        known = run.gate.request_id_of(seq_id)
        if known is not None:
            return known
        if run.gate.has_forgotten(seq_id):
            raise GoneError(
                f"seq_id={seq_id} of {run.run_id} was answered before; its result is no longer kept"
            )
        self.require_open()
        self.sessions.get_active(run.session_id)
        if run.is_closed:
            raise UserError(f"model_id={run.run_id!r} is closed")
        run.touch()
        entry = self.futures.create(kind, run.session_id)

        def start() -> None:
            task = self.launch(entry, work, lane=run.run_id, run=run)
            if alone:
                run.gate.pause()
                task.add_done_callback(lambda _: run.gate.resume())

        run.gate.submit(seq_id, entry.request_id, start)
        return entry.request_id

    async def end_session(self, session: Session, status: Status) -> None:
        """Record the end of a session, and free its runs and samplers after their work."""
        if not session.is_active:
            return
        try:
            await self.sessions.end(session, status)
        finally:  # even if the disk is full
            self._begin_freeing(session)

    def _begin_freeing(self, session: Session) -> None:
        runs = [run for run in self.runs.values() if run.session_id == session.session_id]
        for run in runs:
            run.is_closed = True
            run.gate.close()
        task = asyncio.create_task(self._free_session(session.session_id, runs))
        self._freeing.add(task)
        task.add_done_callback(self._freeing.discard)
        task.add_done_callback(_log_task_failure)

    async def _free_session(self, session_id: str, runs: list[Run]) -> None:
        for entry in self.futures.unfinished(session_id):
            await entry.done.wait()
        for run in runs:
            try:
                await self.free_run(run)
            except StorageError as error:
                logger.error(
                    "the time of the last use of %s could not be recorded: %s", run.run_id, error
                )
        self.losses.drop_session(session_id)
        for sampler_id in self.samplers.close_session(session_id):
            self.futures.drop_group(sampler_id)

    async def free_run(self, run: Run) -> None:
        """Remove a run from memory. Its checkpoints stay."""
        self.runs.pop(run.run_id, None)
        await STORING.run(self.progress.save)
        self.progress.drop(run.run_id)
        await self.engine.worker.free_run(run.run_id)
        seen = {run.run_id: run.last_request_at}
        await STORING.run(self.store.index.touch_runs, seen)

    async def _watch_clients(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                self.drop_unwanted()
            except Exception:
                logger.exception("requests of clients that are gone could not be cancelled")

    def drop_unwanted(self) -> None:
        """Cancel sample requests of clients that are gone. Accepted training requests continue.

        If the client comes back, it is told that the results are gone, and the SDK asks again.
        """
        entries = [self.futures.get(request_id) for request_id in self._tasks]
        samples = [entry for entry in entries if entry is not None and entry.kind == "sample"]
        sessions = {entry.session_id for entry in samples}
        lost = {session for session in sessions if self.sessions.presence.is_lost(session)}
        unwanted = [entry for entry in samples if entry.session_id in lost]
        for entry in unwanted:
            entry.is_unwanted = True
            self.cancel(entry.request_id)
        for session_id in lost:
            logger.info(
                "session %s: its client is gone, its sample requests are cancelled", session_id
            )

    async def _record_use(self) -> None:
        """Record in the index when sessions and runs were last used."""
        await self.sessions.record_seen()
        used = {run.run_id: run.last_request_at for run in self.runs.values()}
        await STORING.run(self.store.index.touch_runs, used)

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(min(HOUSEKEEPING_SECONDS, max(self.limits.spill_seconds, 0.5)))
            try:
                await self.keep_house()
            except Exception:
                logger.exception("housekeeping failed; it will be repeated")

    async def keep_house(self) -> None:
        """Drop old results, expired checkpoints and abandoned sessions; record the last uses.

        If the disk is full, the steps that free memory still run.
        """
        self.futures.expire()
        self._forget_answered()
        self.sessions.presence.forget_silent(self.limits.session_idle_seconds)
        await STORING.run(self.progress.save)
        steps = (self._remove_expired, self._end_idle_sessions, self._record_use, self._remove_old)
        for step in steps:
            try:
                await step()
            except StorageError as error:
                logger.error("housekeeping: %s", error)
        await self.freed_memory.give_back(is_idle=not self._tasks and not self._streams)
        if self.engine.is_ready:
            await self.engine.worker.spill_idle(self.limits.spill_seconds)

    def _forget_answered(self) -> None:
        """Forget the numbers of requests whose results are no longer kept."""

        def is_kept(request_id: str) -> bool:
            return self.futures.get(request_id) is not None

        self.samplers.forget_answered(is_kept)
        for run in self.runs.values():
            run.gate.forget_answered(is_kept)

    async def _remove_expired(self) -> None:
        await STORING.run(self.store.remove_expired)

    async def _remove_old(self) -> None:
        await STORING.run(self.retention.remove_old_if_due)

    async def _end_idle_sessions(self) -> None:
        for session in self.sessions.idle(self.limits.session_idle_seconds):
            if self.futures.unfinished(session.session_id):
                continue
            if self.sessions.is_elsewhere(session, self.limits.session_idle_seconds):
                self.sessions.forget(session)
                continue
            detail = f"no request of the client for {self.limits.session_idle_seconds:g} s"
            logger.info("session %s expired: %s", session.session_id, detail)
            try:
                await self.end_session(session, {"type": "cancelled", "detail": detail})
            except StorageError as error:
                logger.error("the end of %s could not be recorded: %s", session.session_id, error)
            self.trace.drop(session.session_id)

    def _unfinished_work(self) -> list[asyncio.Future]:
        return [work for work in (*self._tasks.values(), *self._streams) if not work.done()]

    async def drain(self, seconds: float) -> None:
        """Refuse new work, wait for running work, and fail what does not finish in time."""
        self.is_draining = True
        for run in self.runs.values():
            run.gate.close()
        deadline = time.monotonic() + seconds
        # an operation of a run may start, and be listed, only when an earlier one has finished
        while (work := self._unfinished_work()) and time.monotonic() < deadline:
            logger.info("shutting down: %d operations are running", len(work))
            await asyncio.wait(work, timeout=deadline - time.monotonic())
        for stream in self._streams:
            if not stream.done():
                logger.warning("an answer did not finish before the shutdown")
                stream.cancel()
        for entry in self.futures.unfinished():
            logger.warning("%s %s did not finish before the shutdown", entry.request_id, entry.kind)
            self.futures.fail(entry, f"the service stopped before {entry.kind} finished", "server")
        deadline = time.monotonic() + min(seconds, FETCH_SECONDS)
        while self.futures.has_unread() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    def describe_work(self) -> str:
        """Return the running work in words, such as `2 forward_backward, 1 save_weights`, or ``."""
        kinds = Counter(entry.kind for entry in self.futures.unfinished())
        kinds["OpenAI answer"] = len(self._streams)
        return ", ".join(f"{number} {kind}" for kind, number in kinds.items() if number)

    def abandon(self) -> None:
        """Remove temporary files before the process ends at once."""
        self.progress.save()
        self.store.abandon()

    async def close(self) -> None:
        """Stop the engine and close the store. Call `drain` first."""
        for task in (self._housekeeping, self._watching):
            if task is not None:
                task.cancel()
        for task in list(self._tasks.values()):
            task.cancel()
        try:
            await self._record_use()
        except StorageError as error:
            logger.error("the last uses could not be recorded: %s", error)
        await asyncio.to_thread(self.engine.close)
        self.progress.save()
        self.store.close()


def _log_task_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("the memory of a session could not be freed", exc_info=task.exception())
