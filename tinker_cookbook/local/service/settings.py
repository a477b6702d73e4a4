"""What an owner can set about a service, and the limits it enforces."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tinker_cookbook.local.engine.settings import EngineSettings

__all__ = ["DAY_SECONDS", "Limits", "Patience", "RetentionSettings", "ServiceSettings"]

DAY_SECONDS = 86_400


@dataclass(frozen=True)
class Patience:
    """When the samples of a client are dropped since it will not fetch them."""

    cut_seconds: float = 5.0
    """The connections over which it waited ended, and nothing was heard of its session since."""
    silent_seconds: float = 60.0
    """Nothing was heard of its session, and it holds no request."""
    ended_seconds: float = 2.0
    """It has closed its session."""


@dataclass(frozen=True)
class Limits:
    """Upper bounds on what one request or one idle client may cost."""

    max_json_bytes: int = 64 * 2**20
    """Body of a JSON request (a prompt with images is the largest)."""
    max_batch_bytes: int = 2 * 2**30
    """Body of a forward_backward request, after decompression."""
    max_data: int = 65_536
    """Datums in one forward_backward request."""
    max_num_samples: int = 4096
    poll_hold_seconds: float = 25.0
    """How long an unfinished future holds a poll; the SDK gives up at 45."""
    gap_grace_seconds: float = 5.0
    """How long a request waits for a lower seq_id that has not arrived."""
    result_keep_seconds: float = 900.0
    """How long a result stays that nobody has read."""
    read_keep_seconds: float = 300.0
    """How long one stays after it was last read: an answer that was lost is asked for again."""
    result_keep_bytes: int = 2**30
    """Finished results kept in memory; the oldest go first."""
    session_idle_seconds: float = 900.0
    """A session without heartbeat, request or work in flight for this long is expired."""
    download_link_seconds: float = 3600.0
    spill_seconds: float = 600.0
    """A run or sampler not used for this long moves from memory to the state folder."""
    patience: Patience = field(default_factory=Patience)
    drain_seconds: float = 60.0
    """How long a shutdown waits for what is in flight."""


@dataclass(frozen=True)
class RetentionSettings:
    """How much of the past is kept beside the checkpoints."""

    keep_days: float = 90.0
    """Logs of ended processes, and sessions and runs without a checkpoint, go after this time."""
    log_bytes: int = 64 * 2**20
    """What the logs of this process may hold, and those of ended ones together."""

    @property
    def keep_seconds(self) -> float:
        return self.keep_days * DAY_SECONDS


@dataclass(frozen=True)
class ServiceSettings:
    """One service process."""

    state_dir: Path
    models: tuple[str, ...]
    """Names or folders a client may ask for; the first is loaded at start."""
    api_key: str
    host: str = "127.0.0.1"
    port: int = 0
    engine: EngineSettings = field(default_factory=EngineSettings)
    allowed_hosts: tuple[str, ...] = ()
    """Names that requests may address the service by, besides its own address."""
    log_format: str = "text"
    """`text` or `json`."""
    assets_dir: Path | None = None
    """Folder whose files clients may point at instead of sending images; None: none."""
    model_dirs: tuple[Path, ...] = ()
    """Folders under which clients may name any model folder."""
    limits: Limits = field(default_factory=Limits)
    retention: RetentionSettings = field(default_factory=RetentionSettings)
