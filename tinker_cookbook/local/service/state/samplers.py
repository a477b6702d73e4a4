"""Sampling sessions, and the engine samplers that they use.

Many sessions share an engine sampler: one per base model, one per saved checkpoint, and one per
run for its in-flight sessions. The samplers of models and checkpoints can be loaded again. An
unsaved snapshot exists until its session ends or its run has made many newer ones.

A checkpoint path can be overwritten, so a checkpoint is identified by its folder, which is new with
every save. A session keeps the weights that its path had when the session was opened. Sessions that
are opened later use the new weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from tinker_cookbook.local.errors import NotFoundError, UserError
from tinker_cookbook.local.service.protocol.paths import parse_tinker_path
from tinker_cookbook.local.service.state.engine import EngineAccess
from tinker_cookbook.local.service.storage.rows import CheckpointRow, SamplerRow
from tinker_cookbook.local.service.storage.store import Store
from tinker_cookbook.local.service.threads import STORING

__all__ = ["SamplerSession", "SamplerTable", "SubmittedSample"]

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint:"
"""Prefix of the keys of engine samplers of saved weights. The name of the folder follows."""
MAX_REMEMBERED = 50_000
MAX_IDLE_ADAPTERS = 8
"""Maximum number of checkpoints' adapters that stay loaded while nobody uses them."""
MAX_SNAPSHOTS_PER_RUN = 16
"""Maximum number of unsaved snapshots per run, as a loop may make one in each step."""


@dataclass(frozen=True)
class SubmittedSample:
    """The answer to an asample request, kept for repeats of the request."""

    request_id: str
    sequence_ids: list[str]


@dataclass(eq=False)
class SamplerSession:
    """A sampling session of a client."""

    row: SamplerRow
    engine_key: str
    submitted: OrderedDict[int, SubmittedSample] = field(default_factory=OrderedDict)
    num_clients: int = 0
    num_running: int = 0

    @property
    def sampler_id(self) -> str:
        return self.row.sampler_id

    def remember(self, seq_id: int, sample: SubmittedSample) -> None:
        self.submitted[seq_id] = sample
        if len(self.submitted) > MAX_REMEMBERED:
            self.submitted.popitem(last=False)


@dataclass(eq=False)
class _EngineSampler:
    loaded: asyncio.Task[None] | None
    """Task that loads it; None: it was made from a run, so it is already loaded."""
    num_running: int = 0
    last_used: float = field(default_factory=time.monotonic)


class SamplerTable:
    """All sampling sessions of this process. Use it only on the event loop's thread."""

    def __init__(self, engine: EngineAccess, store: Store) -> None:
        self._engine = engine
        self._store = store
        self._sessions: dict[str, SamplerSession] = {}
        self._engine_samplers: dict[str, _EngineSampler] = {}

    def find(self, sampler_id: str) -> SamplerRow | None:
        """Return the record of a sampling session, also of one from before a restart."""
        session = self._sessions.get(sampler_id)
        return session.row if session is not None else self._store.index.sampler(sampler_id)

    def get(self, sampler_id: str) -> SamplerSession:
        """Return a sampling session that can sample, or raise NotFoundError."""
        session = self._sessions.get(sampler_id)
        if session is not None:
            return session
        row = self._store.index.sampler(sampler_id)
        if row is None:
            raise NotFoundError(f"sampling_session_id={sampler_id[:200]!r} does not exist")
        if row.run_id is not None:
            raise NotFoundError(
                f"sampling_session_id={sampler_id!r} was not saved by name and is no longer in "
                f"memory; the service keeps the {MAX_SNAPSHOTS_PER_RUN} last used snapshots of a "
                "run until its session ends. Use save_weights_for_sampler to keep one",
            )
        if row.model_path is not None and self._checkpoint(row).created_at > row.created_at:
            raise _replaced(row)
        return self._add(row, self._shared_key(row))

    def _shared_key(self, row: SamplerRow) -> str:
        """Return the engine sampler of a model or a path; UserError if its weights are gone."""
        if row.model_path is None:
            return f"base:{row.base_model}"
        return f"{CHECKPOINT}{self._checkpoint(row).folder}"

    def _checkpoint(self, row: SamplerRow) -> CheckpointRow:
        assert row.model_path is not None, "a base model has no checkpoint"
        path = parse_tinker_path(row.model_path, field="model_path")
        checkpoint = self._store.find(path.run_id, path.segment, path.name)
        if checkpoint is None:
            raise UserError(f"model_path={row.model_path!r} does not exist; it may have expired")
        return checkpoint

    def _add(self, row: SamplerRow, engine_key: str) -> SamplerSession:
        session = self._sessions[row.sampler_id] = SamplerSession(row, engine_key)
        return session

    async def open(self, row: SamplerRow) -> SamplerSession:
        """Open a session on a base model or a saved checkpoint, and load it if needed.

        Raises:
            UserError: the checkpoint does not exist or cannot be loaded.
        """
        key = self._shared_key(row)
        await self._ensure(key, row)
        await STORING.run(self._store.index.insert, row)
        return self._add(row, key)

    async def adopt(self, row: SamplerRow, engine_key: str) -> list[str]:
        """Open a session on an engine sampler that was made from a run.

        Returns:
            The ids of older sampling sessions that were closed to make room.
        """
        self._engine_samplers.setdefault(engine_key, _EngineSampler(None))
        await STORING.run(self._store.index.insert, row)
        session = self._add(row, engine_key)
        return self._drop_old_snapshots(session)

    def _drop_old_snapshots(self, newest: SamplerSession) -> list[str]:
        """Close the least recently used unsaved snapshots of a run; returns their session ids."""
        snapshots = [
            session
            for session in self._sessions.values()
            if session.row.run_id == newest.row.run_id
            if session.engine_key == session.sampler_id
        ]
        idle = [session for session in snapshots if not session.num_running]
        idle.sort(key=lambda session: self._engine_samplers[session.engine_key].last_used)
        oldest = idle[: max(0, len(snapshots) - MAX_SNAPSHOTS_PER_RUN)]
        dropped = [session for session in oldest if session is not newest]
        for session in dropped:
            del self._sessions[session.sampler_id]
            self._free(session.engine_key)
        return [session.sampler_id for session in dropped]

    def forget_answered(self, is_kept: Callable[[str], bool]) -> None:
        """Forget requests whose results are no longer kept: clients do not repeat them."""
        for session in self._sessions.values():
            submitted = session.submitted
            while submitted and not is_kept(next(iter(submitted.values())).request_id):
                submitted.popitem(last=False)

    async def _ensure(self, key: str, row: SamplerRow) -> None:
        sampler = self._engine_samplers.get(key)
        if sampler is None:
            loading = asyncio.create_task(self._load(key, row))
            sampler = self._engine_samplers[key] = _EngineSampler(loading)
        sampler.last_used = time.monotonic()
        if sampler.loaded is None:
            return
        try:
            await asyncio.shield(sampler.loaded)
        except BaseException:
            failed = sampler.loaded.done() and sampler.loaded.exception() is not None
            if failed and self._engine_samplers.get(key) is sampler:
                del self._engine_samplers[key]
            raise

    async def _load(self, key: str, row: SamplerRow) -> None:
        await self._engine.load(row.base_model)
        worker = self._engine.worker
        if row.model_path is None:
            await worker.create_sampler(key, row.base_model)
            return
        self._make_room()
        checkpoint = self._store.index.checkpoint_in(key.removeprefix(CHECKPOINT))
        if checkpoint is None:
            raise _replaced(row)
        with self._store.pin(checkpoint):
            folder = await asyncio.to_thread(self._store.verify, checkpoint)
            await worker.create_sampler(
                key, row.base_model, folder=folder, saved_by=checkpoint.run_id
            )

    def _make_room(self) -> None:
        """Free the least recently used adapters of checkpoints."""
        idle = [
            (sampler.last_used, key)
            for key, sampler in self._engine_samplers.items()
            if key.startswith(CHECKPOINT) and not sampler.num_running
            if sampler.loaded is not None and sampler.loaded.done()
        ]
        for _, key in sorted(idle)[: max(0, len(idle) - MAX_IDLE_ADAPTERS + 1)]:
            self._free(key)

    async def use(self, session: SamplerSession) -> str:
        """Load a session's engine sampler, unless it is loaded; returns its key."""
        await self._ensure(session.engine_key, session.row)
        return session.engine_key

    @contextlib.asynccontextmanager
    async def borrow(self, base_model: str, model_path: str | None) -> AsyncIterator[str]:
        """Give the engine sampler of a model or a checkpoint to a request without a session."""
        row = SamplerRow("", "", base_model, model_path, None, time.time())
        session = SamplerSession(row, self._shared_key(row))
        key = await self.use(session)
        self.begin(session)
        try:
            yield key
        finally:
            self.finish(session)

    def begin(self, session: SamplerSession) -> None:
        """Count a request that uses a session's sampler."""
        session.num_running += 1
        sampler = self._engine_samplers.get(session.engine_key)
        if sampler is not None:
            sampler.num_running += 1

    def finish(self, session: SamplerSession) -> None:
        """The opposite of `begin`."""
        session.num_running -= 1
        sampler = self._engine_samplers.get(session.engine_key)
        if sampler is not None:
            sampler.num_running = max(0, sampler.num_running - 1)

    def close_session(self, session_id: str) -> list[str]:
        """Close the sampling sessions of a client session, and free the samplers that only they
        used.

        Returns:
            The ids of the sampling sessions that were closed.
        """
        closed = [s for s in self._sessions.values() if s.row.session_id == session_id]
        for session in closed:
            del self._sessions[session.sampler_id]
        still_used = {session.engine_key for session in self._sessions.values()}
        for key in {session.engine_key for session in closed} - still_used:
            if not key.startswith("base:"):
                self._free(key)
        return [session.sampler_id for session in closed]

    def _free(self, key: str) -> None:
        if self._engine_samplers.pop(key, None) is None:
            return
        self._engine.worker.free_sampler(key).add_done_callback(_log_failure)

    def __len__(self) -> int:
        return len(self._sessions)


def _replaced(row: SamplerRow) -> UserError:
    return UserError(
        f"model_path={row.model_path!r} was saved again or deleted since this sampling session was "
        "opened, and its weights are no longer in memory; create a new sampling client"
    )


def _log_failure(future: Future[None]) -> None:
    if not future.cancelled() and future.exception() is not None:
        logger.warning("a sampler could not be freed: %s", future.exception())
