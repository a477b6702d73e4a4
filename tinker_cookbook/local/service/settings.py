"""Settings of a service, and the limits that it enforces."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tinker_cookbook.local.engine.settings import EngineSettings

__all__ = ["DAY_SECONDS", "Limits", "Patience", "RetentionSettings", "ServiceSettings"]

DAY_SECONDS = 86_400


@dataclass(frozen=True)
class Patience:
    """How long the service keeps sampling for a client that seems to be gone, in seconds."""

    cut_seconds: float = 5.0
    """Limit after its polls were disconnected, without any later request of its session."""
    silent_seconds: float = 60.0
    """Limit without any request of its session, and without a poll that waits."""
    ended_seconds: float = 2.0
    """Limit after it closed its session."""


@dataclass(frozen=True)
class Limits:
    """Limits on what one request or one idle client may use."""

    max_json_bytes: int = 64 * 2**20
    """Maximum size of a JSON request. Prompts with images are the largest."""
    max_batch_bytes: int = 2 * 2**30
    """Maximum size of a forward_backward request, after decompression."""
    max_data: int = 65_536
    """Maximum number of datums in a forward_backward request."""
    poll_hold_seconds: float = 25.0
    """Maximum time that a poll waits for a result. The SDK gives up after 45 seconds."""
    gap_grace_seconds: float = 5.0
    """Maximum time that a request waits for a lower seq_id that has not arrived."""
    result_keep_seconds: float = 900.0
    """Time that a result is kept if nobody reads it."""
    read_keep_seconds: float = 300.0
    """Time that a result is kept after its last read, for clients that lost the answer."""
    result_keep_bytes: int = 2**30
    """Maximum size of the finished results in memory. The oldest are dropped first."""
    session_idle_seconds: float = 900.0
    """Time without heartbeat, request or running work after which a session expires."""
    download_link_seconds: float = 3600.0
    """Lifetime of a download link."""
    spill_seconds: float = 600.0
    """Time without use after which a run or sampler moves from memory to the state folder."""
    patience: Patience = field(default_factory=Patience)
    drain_seconds: float = 60.0
    """Maximum time that a shutdown waits for running work."""


@dataclass(frozen=True)
class RetentionSettings:
    """How long records, curves and logs are kept."""

    keep_days: float = 90.0
    """Days after which old logs, and sessions and runs without a checkpoint, are removed."""
    log_bytes: int = 64 * 2**20
    """Maximum size of this process's logs, and of all logs of ended processes together."""

    @property
    def keep_seconds(self) -> float:
        return self.keep_days * DAY_SECONDS


@dataclass(frozen=True)
class ServiceSettings:
    """Settings of one service process."""

    state_dir: Path
    models: tuple[str, ...]
    """Names or folders of the models that clients may use. The first is loaded at the start."""
    api_key: str
    host: str = "127.0.0.1"
    port: int = 0
    engine: EngineSettings = field(default_factory=EngineSettings)
    allowed_hosts: tuple[str, ...] = ()
    """Host names that requests may use for the service, in addition to its address."""
    log_format: str = "text"
    """Format of the log: `text` or `json`."""
    assets_dir: Path | None = None
    """Folder with images that clients may point at instead of sending them; None: no folder."""
    model_dirs: tuple[Path, ...] = ()
    """Folders in which clients may use any model folder."""
    limits: Limits = field(default_factory=Limits)
    retention: RetentionSettings = field(default_factory=RetentionSettings)
