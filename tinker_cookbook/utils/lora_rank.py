"""The largest LoRA rank: clients check it before a run starts, the local service enforces it."""

from __future__ import annotations

__all__ = ["MAX_LORA_RANK"]

MAX_LORA_RANK = 1024
"""At this rank an adapter of a small model already has more parameters than the matrices that it
changes, so a larger one would be a mistake."""
