"""Checkpoints of a run: the records in checkpoints.jsonl, and how one is saved.

A record is written only after its checkpoint is safe on the service. A crash between the two
leaves a checkpoint that no record names, never a record of a checkpoint that does not exist.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tinker_cookbook.exceptions import CheckpointError
from tinker_cookbook.stores.checkpoint_record import CheckpointRecord
from tinker_cookbook.stores.storage import LocalStorage
from tinker_cookbook.stores.training_store import TrainingRunStore
from tinker_cookbook.utils import trace
from tinker_cookbook.utils.jsonl_log import Row, change_rows, read_rows
from tinker_cookbook.utils.run_files import CHECKPOINTS_FILE

if TYPE_CHECKING:
    import tinker

__all__ = [
    "CHECKPOINTS_BASE_NAME",
    "CheckpointRecord",
    "PendingCheckpoint",
    "forget_path",
    "get_best_checkpoint",
    "get_last_checkpoint",
    "load_checkpoints_file",
    "save_checkpoint",
    "save_checkpoint_async",
    "submit_checkpoint",
]

CHECKPOINTS_BASE_NAME = CHECKPOINTS_FILE
CheckpointKind = Literal["state", "sampler", "both"]
LoopState = Mapping[str, Any]
"""What a resumed loop needs: `batch`, `epoch` and any other values that JSON can hold."""


class SavedWeights(Protocol):
    """The SDK's answer to a save request."""

    path: str


@trace.scope
def load_checkpoints_file(log_dir: str) -> list[CheckpointRecord]:
    """Return all records of a run directory, oldest first; empty if there are none."""
    rows = read_rows(Path(log_dir).expanduser() / CHECKPOINTS_BASE_NAME)
    return [CheckpointRecord.from_dict(row) for row in rows]


@trace.scope
def get_last_checkpoint(log_dir: str, required_key: str = "state_path") -> CheckpointRecord | None:
    """Return the newest record that has `required_key`, or None."""
    records = [record for record in load_checkpoints_file(log_dir) if record.has(required_key)]
    return records[-1] if records else None


def get_best_checkpoint(log_dir: str) -> CheckpointRecord | None:
    """Return the record of the weights with the best held-out value, or None.

    Such a record is written only when a value is better than all before: the newest is the best.
    """
    return get_last_checkpoint(log_dir, "best_value")


def forget_path(log_path: str | Path, path: str) -> None:
    """Remove a `tinker://` path from the records, before it is deleted on the service."""

    def without(row: Row) -> Row:
        return {key: value for key, value in row.items() if value != path}

    change_rows(Path(log_path).expanduser() / CHECKPOINTS_BASE_NAME, without)


class PendingCheckpoint:
    """A checkpoint whose save requests are in the run's queue."""

    def __init__(
        self,
        record: CheckpointRecord,
        log_path: str,
        futures: dict[str, Awaitable[SavedWeights]],
    ) -> None:
        self._record = record
        self._log_path = Path(log_path).expanduser()
        self._futures = futures

    async def finish(self) -> dict[str, str]:
        """Wait until the service has saved it, then append the record.

        Returns:
            `state_path` and `sampler_path`, whichever were requested.

        Raises:
            CheckpointError: if the service could not save it.
        """
        import tinker

        paths = {}
        for key, future in self._futures.items():
            try:
                paths[key] = (await future).path
            except (tinker.TinkerError, ValueError, RuntimeError) as error:
                raise CheckpointError(
                    f"checkpoint {self._record.name!r} could not be saved ({error}). The same "
                    "command resumes the run from the previous checkpoint."
                ) from error
        for key, path in paths.items():
            setattr(self._record, key, path)
        TrainingRunStore(LocalStorage(self._log_path)).write_checkpoint(self._record.to_dict())
        return paths


def submit_checkpoint(
    training_client: tinker.TrainingClient,
    name: str,
    log_path: str,
    loop_state: LoopState,
    *,
    kind: CheckpointKind = "state",
    ttl_seconds: int | None = None,
) -> PendingCheckpoint:
    """Queue a checkpoint of the weights after all requests submitted so far.

    Args:
        training_client: The training client of the run.
        name: Name of the checkpoint; an existing one of this name is replaced.
        log_path: The run directory.
        loop_state: What a resumed loop needs: `batch`, `epoch` and any other keys.
        kind: `state` (weights and optimizer), `sampler` (weights to sample from) or `both`.
        ttl_seconds: Seconds that the service keeps it; None: no limit.
    """
    futures: dict[str, Awaitable[SavedWeights]] = {}
    if kind in ("state", "both"):
        futures["state_path"] = training_client.save_state(
            name, ttl_seconds=ttl_seconds, overwrite=True
        )
    if kind in ("sampler", "both"):
        futures["sampler_path"] = training_client.save_weights_for_sampler(
            name, ttl_seconds=ttl_seconds
        )
    record = CheckpointRecord.from_dict({"name": name, **loop_state})
    return PendingCheckpoint(record, log_path, futures)


@trace.scope
async def save_checkpoint_async(
    training_client: tinker.TrainingClient,
    name: str,
    log_path: str,
    loop_state: LoopState,
    kind: CheckpointKind = "state",
    ttl_seconds: int | None = None,
) -> dict[str, str]:
    """Save a checkpoint, wait, and append its record; see `submit_checkpoint`."""
    pending = submit_checkpoint(
        training_client, name, log_path, loop_state, kind=kind, ttl_seconds=ttl_seconds
    )
    return await pending.finish()


@trace.scope
def save_checkpoint(
    training_client: tinker.TrainingClient,
    name: str,
    log_path: str,
    loop_state: LoopState,
    kind: CheckpointKind = "state",
    ttl_seconds: int | None = None,
) -> dict[str, str]:
    """Run `save_checkpoint_async` from code without an event loop."""
    return asyncio.run(
        save_checkpoint_async(training_client, name, log_path, loop_state, kind, ttl_seconds)
    )
