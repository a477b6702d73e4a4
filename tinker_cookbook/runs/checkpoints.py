"""checkpoints.jsonl, and when to write it: periodic, rolling and final checkpoints.

A record is written only after its checkpoint is safe on the service. A crash between the two
leaves a checkpoint that nobody refers to, never a record of something that does not exist.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tinker_cookbook.exceptions import CheckpointError
from tinker_cookbook.utils import trace
from tinker_cookbook.utils.jsonl_log import append_row, change_rows, read_rows

if TYPE_CHECKING:
    import tinker

__all__ = [
    "CHECKPOINTS_BASE_NAME",
    "RENDERER_NAME_METADATA_KEY",
    "CheckpointManager",
    "CheckpointRecord",
    "PendingCheckpoint",
    "add_renderer_name_to_user_metadata",
    "check_renderer_name_for_checkpoint",
    "check_renderer_name_for_checkpoint_async",
    "forget_path",
    "get_last_checkpoint",
    "get_renderer_name_from_checkpoint",
    "get_renderer_name_from_checkpoint_async",
    "load_checkpoints_file",
    "resolve_renderer_name_from_checkpoint_or_default",
    "resolve_renderer_name_from_checkpoint_or_default_async",
    "rest_client_of",
    "save_checkpoint",
    "save_checkpoint_async",
    "submit_checkpoint",
]

logger = logging.getLogger(__name__)

CHECKPOINTS_BASE_NAME = "checkpoints.jsonl"
RENDERER_NAME_METADATA_KEY = "renderer_name"
CheckpointKind = Literal["state", "sampler", "both"]
_MISSING = object()


@dataclass
class CheckpointRecord:
    """One line of checkpoints.jsonl."""

    name: str
    batch: int | None = None
    """The next batch of the epoch: everything before it is in the checkpoint."""
    epoch: int | None = None
    final: bool | None = None
    state_path: str | None = None
    sampler_path: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of the loop that are not fields, at the top level of the line."""

    def to_dict(self) -> dict[str, Any]:
        """The line as an object, without fields that are None."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return {key: value for key, value in known.items() if value is not None} | self.extra

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> CheckpointRecord:
        """Read a line; unknown keys go to `extra`."""
        if "name" not in d:
            raise CheckpointError(
                f"checkpoint record {d} has no name; every line of {CHECKPOINTS_BASE_NAME} has one."
            )
        known = {f.name for f in fields(cls)} - {"extra"}
        extra = {key: value for key, value in d.items() if key not in known}
        return cls(**{key: d[key] for key in d.keys() & known}, extra=extra)

    def has(self, key: str) -> bool:
        """Whether a field is set, or a key is in `extra`."""
        return self.get(key, None) is not None or key in self.extra

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """A field's value (None included), else that of `extra`, else `default`.

        Raises:
            KeyError: if the key is nowhere and there is no default.
        """
        if key != "extra" and key in {f.name for f in fields(self)}:
            return getattr(self, key)
        if key in self.extra:
            return self.extra[key]
        if default is _MISSING:
            raise KeyError(key)
        return default


@trace.scope
def load_checkpoints_file(log_dir: str) -> list[CheckpointRecord]:
    """All records of a run directory, oldest first; empty if there are none."""
    rows = read_rows(Path(log_dir).expanduser() / CHECKPOINTS_BASE_NAME)
    return [CheckpointRecord.from_dict(row) for row in rows]


@trace.scope
def get_last_checkpoint(log_dir: str, required_key: str = "state_path") -> CheckpointRecord | None:
    """The newest record that has `required_key`, or None."""
    records = [record for record in load_checkpoints_file(log_dir) if record.has(required_key)]
    return records[-1] if records else None


def forget_path(log_path: str | Path, path: str) -> None:
    """Take a `tinker://` path out of the records, before it is deleted on the service."""

    def without(row: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if value != path}

    change_rows(Path(log_path).expanduser() / CHECKPOINTS_BASE_NAME, without)


class PendingCheckpoint:
    """A checkpoint whose saving has been put into the run's queue."""

    def __init__(self, record: CheckpointRecord, log_path: str, futures: dict[str, Any]) -> None:
        self._record = record
        self._log_path = Path(log_path).expanduser()
        self._futures = futures

    async def finish(self) -> dict[str, str]:
        """Wait until the service has it, then append the record.

        Returns:
            `state_path` and `sampler_path`, as far as they were asked for.

        Raises:
            CheckpointError: if the service could not save it.
        """
        paths = {}
        for key, future in self._futures.items():
            try:
                paths[key] = (await future).path
            except (_sdk_errors(), ValueError, RuntimeError) as error:
                raise CheckpointError(
                    f"checkpoint {self._record.name!r} could not be saved ({error}). The run can "
                    "be resumed from the one before by the same command."
                ) from error
        for key, path in paths.items():
            setattr(self._record, key, path)
        append_row(self._log_path / CHECKPOINTS_BASE_NAME, self._record.to_dict())
        return paths


def submit_checkpoint(
    training_client: tinker.TrainingClient,
    name: str,
    log_path: str,
    loop_state: dict[str, Any],
    *,
    kind: CheckpointKind = "state",
    ttl_seconds: int | None = None,
) -> PendingCheckpoint:
    """Queue the saving of the weights as they are after everything submitted so far.

    Args:
        training_client: The run.
        name: Name of the checkpoint; one that exists is replaced.
        log_path: The run directory.
        loop_state: What a resumed loop needs: `batch`, `epoch` and anything else.
        kind: `state` (weights and optimizer), `sampler` (weights to sample from) or `both`.
        ttl_seconds: How long the service keeps it; None for ever.
    """
    futures: dict[str, Any] = {}
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
    loop_state: dict[str, Any],
    kind: CheckpointKind = "state",
    ttl_seconds: int | None = None,
) -> dict[str, str]:
    """Save, wait, and append the record; see `submit_checkpoint`."""
    pending = submit_checkpoint(
        training_client, name, log_path, loop_state, kind=kind, ttl_seconds=ttl_seconds
    )
    return await pending.finish()


@trace.scope
def save_checkpoint(
    training_client: tinker.TrainingClient,
    name: str,
    log_path: str,
    loop_state: dict[str, Any],
    kind: CheckpointKind = "state",
    ttl_seconds: int | None = None,
) -> dict[str, str]:
    """`save_checkpoint_async` for code without an event loop."""
    return asyncio.run(
        save_checkpoint_async(training_client, name, log_path, loop_state, kind, ttl_seconds)
    )


@dataclass
class CheckpointManager:
    """Saves a run periodically (kept `ttl_seconds`), rolling (only the newest) and at the end."""

    training_client: tinker.TrainingClient
    service_client: tinker.ServiceClient
    log_path: str
    save_every: int = 0
    """Steps between periodic checkpoints; 0 is off, as for the next two."""
    save_every_tokens: int = 0
    save_every_seconds: float = 0.0
    ttl_seconds: int | None = 604800
    rolling_save_every: int = 0
    rolling_ttl_seconds: int = 7200
    async_periodic_saves: bool = False
    """Do not wait for a periodic checkpoint before going on."""
    keep_checkpoints: int = 0
    """Training states kept of those that this object has saved, the newest; 0 keeps all."""

    def __post_init__(self) -> None:
        self._tokens_at_last_save = 0
        self._time_of_last_save = time.monotonic()
        self._last_rolling_path: str | None = None
        self._states: list[str] = []
        self._background: list[asyncio.Task[Any]] = []

    def restore_last_saved_tokens(self, last_saved_tokens: int) -> None:
        """Count tokens from here on, after a resume."""
        self._tokens_at_last_save = last_saved_tokens

    def should_save_periodic(self, step: int, *, elapsed_tokens: int = 0) -> bool:
        """Whether a periodic checkpoint is due once `step` steps are done."""
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
        self, step: int, loop_state: dict[str, Any], *, elapsed_tokens: int = 0
    ) -> Callable[[], Any] | None:
        """Queue the checkpoint that is due after `step` steps, periodic before rolling.

        Call it directly after submitting the optimizer step. The returned coroutine function
        waits for the checkpoint and writes its record: await it after the metrics of all steps
        before have been written. None if nothing is due.
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

    async def save_periodic_async(self, step: int, loop_state: dict[str, Any]) -> dict[str, str]:
        """Save weights, optimizer and sampler weights as `NNNNNN`, and wait."""
        return await self._finish_and_thin(self._submit(step, loop_state, "both", self.ttl_seconds))

    def save_periodic(self, step: int, loop_state: dict[str, Any]) -> dict[str, str]:
        """`save_periodic_async` for code without an event loop."""
        return asyncio.run(self.save_periodic_async(step, loop_state))

    async def maybe_save_rolling_async(self, step: int, loop_state: dict[str, Any]) -> None:
        """Start a rolling checkpoint if one is due and no periodic one is."""
        every = self.rolling_save_every
        if step > 0 and every and step % every == 0 and not self.should_save_periodic(step):
            state = {**loop_state, "rolling": True}
            pending = self._submit(step, state, "state", self.rolling_ttl_seconds)
            await self._finish_in_background(self._finish_rolling(pending))

    def maybe_save_rolling(self, step: int, loop_state: dict[str, Any]) -> None:
        """`maybe_save_rolling_async` for code without an event loop; waits."""
        asyncio.run(self._then_drain(self.maybe_save_rolling_async(step, loop_state)))

    async def maybe_save_async(
        self, step: int, loop_state: dict[str, Any], *, elapsed_tokens: int = 0
    ) -> dict[str, str] | None:
        """Save what is due; the paths of a periodic checkpoint that was waited for, else None."""
        finish = self.submit_due(step, loop_state, elapsed_tokens=elapsed_tokens)
        return None if finish is None else await finish()

    def maybe_save(
        self, step: int, loop_state: dict[str, Any], *, elapsed_tokens: int = 0
    ) -> dict[str, str] | None:
        """`maybe_save_async` for code without an event loop; waits."""
        save = self.maybe_save_async(step, loop_state, elapsed_tokens=elapsed_tokens)
        return asyncio.run(self._then_drain(save))

    async def save_final_async(self, loop_state: dict[str, Any]) -> dict[str, str]:
        """Save the end of the run as `final`, kept for ever, and drop the rolling checkpoint."""
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

    def save_final(self, loop_state: dict[str, Any]) -> dict[str, str]:
        """`save_final_async` for code without an event loop."""
        return asyncio.run(self.save_final_async(loop_state))

    async def finalize_async(self) -> None:
        """Wait for saves in the background and drop the last rolling checkpoint."""
        await self._drain()
        if self._last_rolling_path is not None:
            await self._delete(self._last_rolling_path)
            self._last_rolling_path = None

    def finalize(self) -> None:
        """`finalize_async` for code without an event loop."""
        asyncio.run(self.finalize_async())

    def _submit(
        self, step: int, loop_state: dict[str, Any], kind: CheckpointKind, ttl: int | None
    ) -> PendingCheckpoint:
        return submit_checkpoint(
            self.training_client,
            f"{step:06d}",
            self.log_path,
            loop_state,
            kind=kind,
            ttl_seconds=ttl,
        )

    async def _finish_periodic(self, pending: PendingCheckpoint) -> dict[str, str] | None:
        if not self.async_periodic_saves:
            await self._drain()  # records stay in the order of their steps
            return await self._finish_and_thin(pending)
        await self._finish_in_background(self._finish_and_thin(pending))
        return None

    async def _finish_and_thin(self, pending: PendingCheckpoint) -> dict[str, str]:
        """Once a checkpoint is safe, delete the training states that are too many.

        Only states that this object has saved: records of an earlier start may be a copy's too.
        The weights to sample from stay.
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

    async def _finish_in_background(self, saving: Any) -> None:
        """One save at a time, so that records stay in the order of their steps."""
        await self._drain()
        self._background.append(asyncio.create_task(saving))

    async def _drain(self) -> None:
        waiting, self._background = self._background, []
        for task in waiting:
            await task

    async def _then_drain(self, saving: Any) -> Any:
        result = await saving
        await self._drain()
        return result

    async def _delete(self, path: str) -> None:
        rest = rest_client_of(self.service_client)
        try:
            await asyncio.wait_for(rest.delete_checkpoint_from_tinker_path(path), timeout=60)
        except (_sdk_errors(), TimeoutError, ValueError) as error:
            logger.warning("checkpoint %s could not be deleted: %s", path, error)


def add_renderer_name_to_user_metadata(
    user_metadata: dict[str, str], renderer_name: str | None
) -> None:
    """Record the renderer in a run's metadata, so that its checkpoints tell how to prompt them."""
    if renderer_name:
        user_metadata[RENDERER_NAME_METADATA_KEY] = renderer_name


async def get_renderer_name_from_checkpoint_async(
    service_client: tinker.ServiceClient, checkpoint_path: str
) -> str | None:
    """The renderer a checkpoint was trained with, or None (with a warning) if unknown."""
    try:
        rest = rest_client_of(service_client)
        run = await rest.get_training_run_by_tinker_path(checkpoint_path)
    except (_sdk_errors(), ValueError) as error:
        logger.warning("no metadata of %s: %s", checkpoint_path, error)
        return None
    return (run.user_metadata or {}).get(RENDERER_NAME_METADATA_KEY)


def get_renderer_name_from_checkpoint(
    service_client: tinker.ServiceClient, checkpoint_path: str
) -> str | None:
    """`get_renderer_name_from_checkpoint_async` for code without an event loop."""
    return asyncio.run(get_renderer_name_from_checkpoint_async(service_client, checkpoint_path))


async def check_renderer_name_for_checkpoint_async(
    service_client: tinker.ServiceClient, checkpoint_path: str, expected_renderer_name: str | None
) -> None:
    """Warn if a checkpoint was trained with another renderer than the one in use."""
    found = await get_renderer_name_from_checkpoint_async(service_client, checkpoint_path)
    if found and expected_renderer_name and found != expected_renderer_name:
        logger.warning(
            "renderer_name=%s is used, but %s was trained with %s",
            expected_renderer_name,
            checkpoint_path,
            found,
        )


def check_renderer_name_for_checkpoint(
    service_client: tinker.ServiceClient, checkpoint_path: str, expected_renderer_name: str | None
) -> None:
    """`check_renderer_name_for_checkpoint_async` for code without an event loop."""
    asyncio.run(
        check_renderer_name_for_checkpoint_async(
            service_client, checkpoint_path, expected_renderer_name
        )
    )


async def resolve_renderer_name_from_checkpoint_or_default_async(
    *,
    model_name: str,
    explicit_renderer_name: str | None,
    load_checkpoint_path: str | None,
    base_url: str | None = None,
) -> str:
    """The renderer to use: the given one, else the checkpoint's, else the model's recommended."""
    from tinker_cookbook import model_info

    if explicit_renderer_name is not None:
        return explicit_renderer_name
    if load_checkpoint_path is not None:
        import tinker

        client = tinker.ServiceClient(base_url=base_url)
        found = await get_renderer_name_from_checkpoint_async(client, load_checkpoint_path)
        if found is not None:
            return found
    return model_info.get_recommended_renderer_name(model_name)


def resolve_renderer_name_from_checkpoint_or_default(
    *,
    model_name: str,
    explicit_renderer_name: str | None,
    load_checkpoint_path: str | None,
    base_url: str | None = None,
) -> str:
    """`resolve_renderer_name_from_checkpoint_or_default_async` without an event loop."""
    return asyncio.run(
        resolve_renderer_name_from_checkpoint_or_default_async(
            model_name=model_name,
            explicit_renderer_name=explicit_renderer_name,
            load_checkpoint_path=load_checkpoint_path,
            base_url=base_url,
        )
    )


def rest_client_of(service_client: tinker.ServiceClient) -> Any:
    """An SDK client for runs and checkpoints on the connections of another."""
    import tinker

    if hasattr(tinker, "RestClient"):  # SDK 0.36 and later; `create_rest_client` warns there
        holder = service_client._get_rest_holder()
        return tinker.RestClient(_holder=holder)
    return service_client.create_rest_client()


def _sdk_errors() -> type[Exception]:
    import tinker

    return tinker.TinkerError
