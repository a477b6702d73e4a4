"""Where the renderer's and the template's tokens differ, and which differences are deliberate.

Two differences are deliberate in every format (docs/renderers.md). A reply is encoded separately
from its prompt, where a template merges tokens across that border. Typed text stays text, where a
template writes a control token. Both leave the text the same.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple

from tinker_cookbook.renderers.encoding.encoder import TextEncoder
from tinker_cookbook.renderers.rendering import Rendering

__all__ = ["Difference", "DifferenceKind", "differences", "tokens_with_pads"]


class DifferenceKind(StrEnum):
    """Kinds of difference."""

    REPLY = "a reply is encoded apart from its prompt"
    TYPED = "a typed control token stays text"
    BORDER = "the same text in other tokens"
    TEXT = "another text"


class Difference(NamedTuple):
    """A range of tokens that differs: [start, end) of ours and of the template's."""

    start: int
    end: int
    template_start: int
    template_end: int
    kind: DifferenceKind

    @property
    def is_meant(self) -> bool:
        """Whether the difference is documented."""
        return self.kind in (DifferenceKind.REPLY, DifferenceKind.TYPED)


_PADS = ("<|image_pad|>", "<|media_pad|>")


def tokens_with_pads(rendering: Rendering, encoder: TextEncoder) -> tuple[list[int], set[int]]:
    """Return our tokens, with one token per image as in templates, and where replies start in
    them."""
    pads = [pad for pad in map(encoder.control_id, _PADS) if pad is not None]
    tokens: list[int] = []
    starts: set[int] = set()
    is_sampled = False
    for segment in rendering.segments:
        if segment.sampled and not is_sampled:
            starts.add(len(tokens))
        is_sampled = segment.sampled
        tokens += pads[:1] if segment.chunk is not None else segment.tokens
    return tokens, starts


def differences(
    rendering: Rendering, template_tokens: Sequence[int], encoder: TextEncoder
) -> list[Difference]:
    """Return every difference, in order; none if the tokens are the same.

    Args:
        rendering: our rendering.
        template_tokens: the template's tokens for the same conversation.
        encoder: the renderer's encoder.
    """
    ours, starts = tokens_with_pads(rendering, encoder)
    theirs = list(template_tokens)
    found = []
    for a, b, c, d in _blocks(ours, theirs, encoder):
        left, right = ours[a:b], theirs[c:d]
        if _bytes(left, encoder) != _bytes(right, encoder):
            kind = DifferenceKind.TEXT
        elif _control(right, encoder) != _control(left, encoder):
            kind = DifferenceKind.TYPED
        elif any(a < start < b for start in starts):
            kind = DifferenceKind.REPLY
        else:
            kind = DifferenceKind.BORDER
        found.append(Difference(a, b, c, d, kind))
    return found


_MAX_JOINED = 4


def _blocks(
    ours: list[int], theirs: list[int], encoder: TextEncoder
) -> Iterator[tuple[int, int, int, int]]:
    """Yield the ranges that differ; neighbouring ranges are joined if only together they have equal
    text."""
    matcher = difflib.SequenceMatcher(None, ours, theirs, autojunk=False)
    blocks = [code[1:] for code in matcher.get_opcodes() if code[0] != "equal"]
    index = 0
    while index < len(blocks):
        a, b, c, d = blocks[index]
        taken = 1
        for more in range(min(_MAX_JOINED, len(blocks) - index)):
            _, end, _, template_end = blocks[index + more]
            if _bytes(ours[a:end], encoder) == _bytes(theirs[c:template_end], encoder):
                b, d, taken = end, template_end, more + 1
                break
        yield a, b, c, d
        index += taken


def _bytes(tokens: Sequence[int], encoder: TextEncoder) -> bytes:
    pieces = (encoder.token_bytes(token) for token in tokens)
    if None in (found := list(pieces)):
        return encoder.decode(tokens).encode("utf-8", "replace")
    return b"".join(piece or b"" for piece in found)


def _control(tokens: Sequence[int], encoder: TextEncoder) -> list[int]:
    return [token for token in tokens if encoder.is_control(token)]
