"""The pieces that a chat format has written: text, token ids, images, each with its origin.

Layout (layout.py) collects them; rendering.py encodes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import tinker

__all__ = ["CUT", "Piece", "Segment", "SegmentKind"]


class SegmentKind(StrEnum):
    """What a segment is for."""

    FRAME = "frame"
    """Written by the format around a message: headers, separators, what a prompt supplies.
    Never trained, except with `TrainOnWhat.ALL_TOKENS`."""
    CONTENT = "content"
    THINK = "think"
    TOOL = "tool"
    """Tool declarations, calls and results, with their markers."""
    STOP = "stop"
    """The end-of-turn token."""


class Segment(NamedTuple):
    """Token ids, or one image or audio clip, with their origin."""

    tokens: Sequence[int]
    """Empty for media."""
    kind: SegmentKind
    message: int
    """Index of the message; -1 for what precedes the first, such as begin-of-sequence."""
    sampled: bool
    """Whether the model writes these tokens when it takes this turn."""
    chunk: tinker.ModelInputChunk | None = None

    @property
    def length(self) -> int:
        """Number of positions in the model's input."""
        return len(self.tokens) if self.chunk is None else self.chunk.length


class Piece(NamedTuple):
    """Text to encode, with its origin."""

    text: str
    kind: SegmentKind
    message: int
    sampled: bool
    joined: bool = False
    """Whether to encode it together with the text before it: no control token is between them."""


CUT = Segment((), SegmentKind.FRAME, -1, False)
"""A segment without tokens that separates two texts."""
