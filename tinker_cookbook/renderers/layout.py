"""How a chat format writes a conversation: it appends pieces to a `Layout`, in order.

A piece is text, token ids or an image. Each knows its message, its purpose (`SegmentKind`) and
whether the model samples it. Loss weights, prompts, example splits and pictures of tokens all
follow from that, so a format writes a conversation in one place only. `rendering.py` turns layouts
into tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tinker_cookbook.renderers.segments import CUT, Piece, Segment, SegmentKind

if TYPE_CHECKING:
    import tinker

__all__ = ["Frame", "Layout", "SegmentKind"]


# A conversation has dozens of segments and pieces. Calling the classes takes twice as long.
_new = tuple.__new__


@dataclass(frozen=True, slots=True)
class Frame:
    """The fixed opening of a message: control tokens, then text right before the content.

    `Format.build_frame` makes one. Example: `<|im_start|>`, then `user` and a newline.
    """

    ids: tuple[int, ...]
    """The whole frame, encoded separately from the content."""
    control: tuple[int, ...]
    tail: str
    is_separate: bool
    """Whether `ids` is correct in front of every text that does not start with white space."""


class Layout:
    """The pieces of one conversation, in order. A format only appends.

    Arguments of all methods: `message` is the index of the message, -1 before the first one.
    `sampled=True` marks what the model itself writes; the prompt writes everything else. `kind` is
    FRAME (headers, separators), CONTENT, THINK (reasoning), TOOL (declarations, calls, results) or
    STOP (the end of a turn).
    """

    __slots__ = ("_frame", "pieces")

    def __init__(self) -> None:
        self.pieces: list[Piece | Segment] = []
        self._frame: Frame | None = None
        """Set if the last piece is a frame whose tail may have to be encoded again with a text."""

    def frame(self, frame: Frame, message: int) -> None:
        """Open a message. Text appended next is encoded as if it were one string with the frame."""
        self.pieces.append(_new(Segment, (frame.ids, SegmentKind.FRAME, message, False, None)))
        self._frame = frame

    def ids(
        self, tokens: Sequence[int], kind: SegmentKind, message: int, *, sampled: bool = False
    ) -> None:
        """Append token ids: the only way to write a control token."""
        self.pieces.append(_new(Segment, (tokens, kind, message, sampled, None)))
        self._frame = None

    def text(self, text: str, kind: SegmentKind, message: int, *, sampled: bool = False) -> None:
        """Append text. Control tokens typed in it stay text.

        It is encoded together with text, or the tail of a frame, that is right before it. Sampled
        text is never encoded together with text that is not sampled, because the prompt ends there.
        """
        if not text:
            return
        pieces = self.pieces
        before = pieces[-1] if pieces else CUT
        starts_sampling = sampled and not before.sampled
        joined = before.__class__ is Piece and not starts_sampling
        frame = self._frame
        if frame is not None and not starts_sampling and _merges(frame, text):
            # The frame's ids are wrong in front of this text: encode its tail with the text.
            opened = pieces.pop()
            if frame.control:
                pieces.append(Segment(frame.control, opened.kind, opened.message, False))
            pieces.append(Piece(frame.tail, opened.kind, opened.message, False))
            joined = True
        pieces.append(_new(Piece, (text, kind, message, sampled, joined)))
        self._frame = None

    def cut(self) -> None:
        """Encode what follows separately from the text before it."""
        self._frame = None
        self.pieces.append(CUT)

    def media(self, chunk: tinker.ModelInputChunk, message: int) -> None:
        """Append an image or an audio clip."""
        self.pieces.append(Segment((), SegmentKind.CONTENT, message, False, chunk))
        self._frame = None


def _merges(frame: Frame, text: str) -> bool:
    """Whether the tokenizer may merge the frame's tail with this text."""
    return not frame.is_separate or text[0].isspace()
