"""When a run is saved: periodic, rolling and final checkpoints."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tinker_cookbook.runs.checkpoints import (
    CheckpointKind,
    LoopState,
    PendingCheckpoint,
    forget_path,
    submit_checkpoint,
)
from tinker_cookbook.utils.sdk_compat import rest_client_of

if TYPE_CHECKING:
    import tinker

__all__ = ["CheckpointManager", "FinishSave"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
Paths = dict[str, str]
FinishSave = Callable[[], Awaitable[Paths | None]]
"""Waits for a submitted checkpoint and writes its record."""
DELETE_SECONDS = 60


@dataclass
class CheckpointManager:
    """Saves a run periodically (kept `ttl_seconds`), rolling (only the newest) and at the end."""

    training_client: tinker.TrainingClient
    service_client: tinker.ServiceClient
    log_path: str
    save_every: int = 0
    """Steps between periodic checkpoints; 0: off."""
    save_every_tokens: int = 0
    """Tokens between periodic checkpoints; 0: off."""
    save_every_seconds: float = 0.0
    """Seconds between periodic checkpoints; 0: off."""
    ttl_seconds: int | None = 604800
    """Seconds that the service keeps a periodic checkpoint; None: no limit."""
    rolling_save_every: int = 0
    """Steps between rolling checkpoints; 0: off."""
    rolling_ttl_seconds: int = 7200
    async_periodic_saves: bool = False
    """Continue with the next steps while a periodic checkpoint is being saved."""
    keep_checkpoints: int = 0
    """Number of training states to keep, of those that this object has saved; 0: all."""

    def __post_init__(self) -> None:
        self._tokens_at_last_save = 0
        self._time_of_last_save = time.monotonic()
        self._last_rolling_path: str | None = None
        self._states: list[str] = []
        self._background: list[asyncio.Task[object]] = []

    def restore_last_saved_tokens(self, last_saved_tokens: int) -> None:
        """Set the token count of the checkpoint that the run was resumed from."""
        self._tokens_at_last_save = last_saved_tokens

    def should_save_periodic(self, step: int, *, elapsed_tokens: int = 0) -> bool:
        """Return whether a periodic checkpoint is due once `step` steps are done."""
        if step <= 0:
            return False
        tokens = elapsed_tokens - self._tokens_at_last_save
        seconds = time.monotonic() - self._time_of_last_save
        return (
            bool(self.save_every and step % self.save_every == 0)
            or bool(self.save_every_tokens and tokens >= self.save_every_tokens)
            or bool(self.save_every_seconds and seconds >= self.save_every_seconds)
        )

    def submit_due(
        self, step: int, loop_state: LoopState, *, elapsed_tokens: int = 0
    ) -> FinishSave | None:
        """Queue the checkpoint that is due after `step` steps: a periodic one, else a rolling one.

        Call this directly after submitting the optimizer step: the service executes requests in
        order, so the checkpoint then contains exactly these steps.

        Returns:
            A function to call and await after the metrics of all earlier steps are written. It
            waits for the checkpoint and writes its record. None if nothing is due.
        """
        if self.should_save_periodic(step, elapsed_tokens=elapsed_tokens):
            self._tokens_at_last_save = elapsed_tokens
            self._time_of_last_save = time.monotonic()
            pending = self._submit(step, loop_state, "both", self.ttl_seconds)
            return lambda: self._finish_periodic(pending)
        if step > 0 and self.rolling_save_every and step % self.rolling_save_every == 0:
            state = {**loop_state, "rolling": True}
            pending = self._submit(step, state, "state", self.rolling_ttl_seconds)
            return lambda: self._finish_in_background(self._finish_rolling(pending))
        return None

    async def save_periodic_async(self, step: int, loop_state: LoopState) -> Paths:
        """Save weights, optimizer and sampler weights as `NNNNNN`, and wait."""
        return await self._finish_and_thin(self._submit(step, loop_state, "both", self.ttl_seconds))

    def save_periodic(self, step: int, loop_state: LoopState) -> Paths:
        """Run `save_periodic_async` from code without an event loop."""
        return asyncio.run(self.save_periodic_async(step, loop_state))

    async def maybe_save_rolling_async(self, step: int, loop_state: LoopState) -> None:
        """Start a rolling checkpoint if one is due and no periodic one is."""
        every = self.rolling_save_every
        if step > 0 and every and step % every == 0 and not self.should_save_periodic(step):
            state = {**loop_state, "rolling": True}
            pending = self._submit(step, state, "state", self.rolling_ttl_seconds)
            await self._finish_in_background(self._finish_rolling(pending))

    def maybe_save_rolling(self, step: int, loop_state: LoopState) -> None:
        """Run `maybe_save_rolling_async` from code without an event loop, and wait."""
        asyncio.run(self._then_drain(self.maybe_save_rolling_async(step, loop_state)))

    async def maybe_save_async(
        self, step: int, loop_state: LoopState, *, elapsed_tokens: int = 0
    ) -> Paths | None:
        """Save what is due.

        Returns:
            The paths of a periodic checkpoint, unless it is saved in the background; else None.
        """
        finish = self.submit_due(step, loop_state, elapsed_tokens=elapsed_tokens)
        return None if finish is None else await finish()

    def maybe_save(
        self, step: int, loop_state: LoopState, *, elapsed_tokens: int = 0
    ) -> Paths | None:
        """Run `maybe_save_async` from code without an event loop, and wait."""
        save = self.maybe_save_async(step, loop_state, elapsed_tokens=elapsed_tokens)
        return asyncio.run(self._then_drain(save))

    async def save_final_async(self, loop_state: LoopState) -> Paths:
        """Save the end of the run as `final`, without a time limit, and delete the rolling one."""
        await self._drain()
        pending = submit_checkpoint(
            self.training_client,
            "final",
            self.log_path,
            {**loop_state, "final": True},
            kind="both",
            ttl_seconds=None,
        )
        paths = await self._finish_and_thin(pending)
        await self.finalize_async()
        return paths

    def save_final(self, loop_state: LoopState) -> Paths:
        """Run `save_final_async` from code without an event loop."""
        return asyncio.run(self.save_final_async(loop_state))

    async def finalize_async(self) -> None:
        """Wait for background saves and delete the last rolling checkpoint."""
        await self._drain()
        if self._last_rolling_path is not None:
            await self._delete(self._last_rolling_path)
            self._last_rolling_path = None

    def finalize(self) -> None:
        """Run `finalize_async` from code without an event loop."""
        asyncio.run(self.finalize_async())

    def _submit(
        self, step: int, loop_state: LoopState, kind: CheckpointKind, ttl: int | None
    ) -> PendingCheckpoint:
        return submit_checkpoint(
            self.training_client,
            f"{step:06d}",
            self.log_path,
            loop_state,
            kind=kind,
            ttl_seconds=ttl,
        )

    async def _finish_periodic(self, pending: PendingCheckpoint) -> Paths | None:
        if not self.async_periodic_saves:
            await self._drain()  # records stay in the order of their steps
            return await self._finish_and_thin(pending)
        return await self._finish_in_background(self._finish_and_thin(pending))

    async def _finish_and_thin(self, pending: PendingCheckpoint) -> Paths:
        """Wait for a checkpoint, then delete the oldest training states above `keep_checkpoints`.

        Only states that this object has saved are deleted: after a copy of the run directory,
        earlier records may belong to the other copy as well. Sampler weights are always kept.
        """
        paths = await pending.finish()
        self._states.append(paths["state_path"])
        while self.keep_checkpoints and len(self._states) > self.keep_checkpoints:
            oldest = self._states.pop(0)
            forget_path(self.log_path, oldest)
            await self._delete(oldest)
        return paths

    async def _finish_rolling(self, pending: PendingCheckpoint) -> None:
        paths = await pending.finish()
        previous, self._last_rolling_path = self._last_rolling_path, paths["state_path"]
        if previous is not None:
            await self._delete(previous)

    async def _finish_in_background(self, saving: Coroutine[object, object, object]) -> None:
        """Start one save at a time, so that records stay in the order of their steps."""
        await self._drain()
        self._background.append(asyncio.create_task(saving))

    async def _drain(self) -> None:
        waiting, self._background = self._background, []
        for task in waiting:
            await task

    async def _then_drain(self, saving: Awaitable[T]) -> T:
        result = await saving
        await self._drain()
        return result

    async def _delete(self, path: str) -> None:
        import tinker

        deletion = rest_client_of(self.service_client).delete_checkpoint_from_tinker_path(path)
        try:
            await asyncio.wait_for(deletion, timeout=DELETE_SECONDS)
        except (tinker.TinkerError, TimeoutError, ValueError) as error:
            logger.warning("checkpoint %s could not be deleted: %s", path, error)
