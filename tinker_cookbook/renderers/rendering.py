"""From layouts to tokens: all texts encoded in one batch, and what follows from the segments.

`encode_layouts` turns the layouts that formats wrote into `Rendering`s. A rendering is a list of
segments of token ids, each with its message and kind and whether the model would have sampled it.
Weights, inputs for the service, one-example-per-reply splits and pictures derive from segments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tinker_cookbook.renderers.encoding.encoder import TextEncoder
from tinker_cookbook.renderers.encoding.first_space import FirstSpace, TextPlace
from tinker_cookbook.renderers.layout import Frame, Layout
from tinker_cookbook.renderers.segments import CUT, Piece, Segment, SegmentKind

if TYPE_CHECKING:
    import tinker

__all__ = ["Frame", "Layout", "Rendering", "Segment", "SegmentKind", "encode_layouts"]


# A conversation has dozens of segments. Calling the class takes twice as long.
_new = tuple.__new__


class Rendering:
    """A conversation as segments of tokens."""

    __slots__ = ("segments",)

    def __init__(self, segments: list[Segment]) -> None:
        self.segments = segments

    @property
    def length(self) -> int:
        """Number of positions in the model's input."""
        return sum(segment.length for segment in self.segments)

    def tokens(self) -> list[int]:
        """All token ids in order; media contribute none."""
        tokens: list[int] = []
        for segment in self.segments:
            tokens += segment.tokens
        return tokens

    def sampled_start(self, message: int) -> int | None:
        """Return the position of the first sampled token of this message; None if there is none."""
        position = 0
        for segment in self.segments:
            if segment.message == message and segment.sampled:
                return position
            position += segment.length
        return None

    def weights(self, trained: Iterable[int]) -> np.ndarray:
        """Return float32 [length]: 1 for the bodies of the trained messages, else 0.

        Frames, and everything that the generation prompt writes, have weight 0.
        """
        chosen, frame = frozenset(trained), SegmentKind.FRAME
        runs: list[tuple[int, int]] = []
        end = 0
        for tokens, kind, message, _, chunk in self.segments:
            start = end
            end += len(tokens) if chunk is None else chunk.length
            if message in chosen and kind is not frame:
                runs.append((start, end))
        weights = np.zeros(end, dtype=np.float32)
        for start, end in runs:
            weights[start:end] = 1
        return weights

    def model_input(self) -> tinker.ModelInput:
        """Return the input for the service: media, and one non-empty text chunk between them."""
        import tinker

        # These are valid ids. Checking each of them again takes a twentieth of the total time.
        text_chunk = tinker.EncodedTextChunk.model_construct
        chunks: list[tinker.ModelInputChunk] = []
        run: list[int] = []
        for tokens, _, _, _, chunk in self.segments:
            run += tokens
            if chunk is not None:
                if run:
                    chunks.append(text_chunk(tokens=run))
                chunks.append(chunk)
                run = []
        if run:
            chunks.append(text_chunk(tokens=run))
        return tinker.ModelInput(chunks=chunks)


def encode_layouts(layouts: Sequence[Layout], encoder: TextEncoder) -> list[Rendering]:
    """Encode the texts of all layouts in one batch."""
    is_boundary = encoder.newline_is_boundary
    plans = [_plan(layout.pieces, is_boundary) for layout in layouts]
    if encoder.first_space is not FirstSpace.NEVER:
        return [Rendering(_placed_segments(plan, encoder)) for plan in plans]
    texts = [run.text for plan in plans for run in plan if isinstance(run, Piece)]
    encoded = iter(encoder.encode_batch(texts)) if texts else iter(())
    return [Rendering(_segments(plan, encoded, encoder)) for plan in plans]


_Run = Segment | Piece | list[Piece]


def _plan(pieces: list[Piece | Segment], newline_is_boundary: bool) -> list[_Run]:
    """Group the texts that must be encoded together; nearly all are encoded alone."""
    runs: list[_Run] = []
    for piece in pieces:
        if piece.__class__ is Segment:
            if piece is not CUT:
                runs.append(piece)
        elif piece.joined and not (newline_is_boundary and _meet_at_newline(runs[-1], piece)):  # pyright: ignore
            before = runs[-1]
            if isinstance(before, list):
                before.append(piece)  # pyright: ignore
            else:
                runs[-1] = [before, piece]  # pyright: ignore
        else:
            runs.append(piece)
    return runs


def _meet_at_newline(left: Piece | list[Piece], right: Piece) -> bool:
    """Whether exactly one newline, and no other white space, is between two texts."""
    last = left[-1] if isinstance(left, list) else left
    end = last.text[-2:]
    is_newline = len(end) == 2 and end[1] == "\n" and not end[0].isspace()
    return is_newline and not right.text[0].isspace()


def _segments(
    plan: list[_Run], encoded: Iterator[list[int]], encoder: TextEncoder
) -> list[Segment]:
    segments: list[Segment] = []
    for run in plan:
        if run.__class__ is Segment:
            segments.append(run)  # pyright: ignore
        elif run.__class__ is Piece:
            _, kind, message, sampled, _ = run  # pyright: ignore
            segments.append(_new(Segment, (next(encoded), kind, message, sampled, None)))
        else:
            ids = encoder.encode_spans([piece.text for piece in run])  # pyright: ignore
            segments += [
                Segment(tokens, piece.kind, piece.message, piece.sampled)  # pyright: ignore
                for piece, tokens in zip(run, ids, strict=True)
                if tokens
            ]
    return segments


def _placed_segments(plan: list[_Run], encoder: TextEncoder) -> list[Segment]:
    """Encode like `_segments`, for tokenizers that encode a text by what precedes it."""
    segments: list[Segment] = []
    place = TextPlace.START
    for run in plan:
        if isinstance(run, Segment):
            segments.append(run)
            ends_in_text = bool(run.tokens) and not encoder.is_control(run.tokens[-1])
            place = TextPlace.INSIDE if ends_in_text else TextPlace.AFTER_CONTROL
            continue
        pieces = [run] if isinstance(run, Piece) else run
        ids = encoder.encode_placed([piece.text for piece in pieces], place)
        segments += [
            Segment(tokens, piece.kind, piece.message, piece.sampled)
            for piece, tokens in zip(pieces, ids, strict=True)
            if tokens
        ]
        place = TextPlace.INSIDE
    return segments
