"""A reply in parts, and how it ended: what a server gives to the writer of a dialect."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

__all__ = [
    "Ending",
    "Piece",
    "PieceKind",
    "ReplyWriter",
    "data_event",
    "join_texts",
    "named_event",
    "new_id",
]

PieceKind = Literal["content", "reasoning", "tool_call"]


@dataclass(frozen=True)
class Piece:
    """The next part of a reply."""

    kind: PieceKind
    text: str = ""
    call: dict[str, Any] = field(default_factory=dict)
    """A tool call as the OpenAI chat API shows it: `id`, `type`, `function`."""


@dataclass(frozen=True)
class Ending:
    """How a reply ended, and what it cost."""

    reason: Literal["stop", "length", "tool_calls"]
    prompt_tokens: int
    sampled_tokens: int
    cached_tokens: int = 0
    """Tokens of the prompt that did not have to be computed."""
    stop_text: str | None = None
    """The text of the request's stops that ended the reply."""


class ReplyWriter(Protocol):
    """Writes one reply in the form of a dialect, whole or as a stream of events."""

    def whole(self, pieces: Sequence[Piece], ending: Ending) -> dict[str, Any]:
        """Return the response object."""
        ...

    def opening(self, prompt_tokens: int) -> Iterator[dict[str, Any]]:
        """Yield the events before the first piece."""
        ...

    def take(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield the events of a piece."""
        ...

    def closing(self, ending: Ending) -> Iterator[dict[str, Any]]:
        """Yield the events after the last piece."""
        ...


def join_texts(pieces: Iterable[Piece], kind: PieceKind) -> str:
    """Return the text of all pieces of a kind."""
    return "".join(piece.text for piece in pieces if piece.kind == kind)


def new_id(prefix: str, name: str | None = None) -> str:
    """Return an identifier with an API's prefix: of this name, or a random one."""
    return f"{prefix}_{name or secrets.token_hex(12)}"


def data_event(value: object) -> bytes:
    """Return a server-sent event without a name, as OpenAI's chat API sends it."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def named_event(value: dict[str, Any]) -> bytes:
    """Return a server-sent event whose name is its `type`, as the other two APIs send it."""
    return f"event: {value['type']}\n".encode() + data_event(value)
