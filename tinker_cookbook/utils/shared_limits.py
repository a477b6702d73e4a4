"""Limits that clients check before a run starts and that the local service enforces."""

from __future__ import annotations

__all__ = ["MAX_LORA_RANK", "MAX_TTL_SECONDS", "MIN_TTL_SECONDS"]

MAX_LORA_RANK = 1024
"""At this rank an adapter of a small model already has more parameters than the matrices that it
changes, so a larger one would be a mistake."""
MIN_TTL_SECONDS = 3600
MAX_TTL_SECONDS = 10 * 366 * 24 * 3600
"""Ten years, including leap days: the longest time to live of a checkpoint."""
