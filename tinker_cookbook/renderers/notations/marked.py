"""Tool calls whose name and arguments are between control tokens."""

from __future__ import annotations

from collections.abc import Sequence

from tinker_cookbook.renderers.tool_calls import as_tool_call
from tinker_cookbook.renderers.types import ToolCall, UnparsedToolCall
from tinker_cookbook.replies import json_calls

__all__ = ["build_call", "texts_between_marks"]


def texts_between_marks(parts: Sequence[str | int]) -> list[str]:
    """Return the texts before, between and after marks, including empty ones."""
    texts = [""]
    for part in parts:
        if isinstance(part, str):
            texts[-1] += part
        else:
            texts.append("")
    return texts


def build_call(
    name: str, arguments: str, raw_text: str, *, call_id: str | None = None
) -> ToolCall | UnparsedToolCall:
    """Return the call with its arguments unchanged, or the raw text with the reason."""
    return as_tool_call(json_calls.build_call(name, arguments, raw_text, call_id=call_id))
