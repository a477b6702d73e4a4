"""Settings of the engine. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["EngineSettings"]


@dataclass(frozen=True)
class EngineSettings:
    """How the engine uses the machine; None leaves a choice to the engine."""

    device: str | None = None
    """Device name as torch spells it; None picks the fastest one present."""
    dtype: str | None = None
    """Number format of base weights, `float32` or `bfloat16`; None: see `devices.choose_dtype`."""
    num_threads: int | None = None
    """Number of CPU threads per kernel; None is torch's own choice."""
    kv_cache_bytes: int | None = None
    """Memory for keys and values per model; None is a quarter of what is free when the model is
    loaded, at most 4 GiB."""
    memory_bytes: int | None = None
    """Memory that the process may hold; None is all that the machine or container has free."""
    spill_dir: Path | None = None
    """Folder for idle adapters; None keeps them in memory."""
    base_format: str | None = None
    """How base weights are stored: `full`, `int8` or `int4`; None: the environment's choice, or
    `full`."""
