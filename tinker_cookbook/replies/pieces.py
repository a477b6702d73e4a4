"""The pieces that a reply is read into."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["UNTERMINATED_CALL_ERROR", "BadCall", "Call", "ReadCall", "TextPiece", "ThoughtPiece"]

UNTERMINATED_CALL_ERROR = "unterminated tool block"


@dataclass(frozen=True)
class TextPiece:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class ThoughtPiece:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True)
class Call:
    """A tool call that was read."""

    name: str
    arguments: str
    """A JSON object as text. Values that the model wrote in JSON are not changed."""
    call_id: str | None = None


@dataclass(frozen=True)
class BadCall:
    """Text that looks like a tool call but cannot be read as one."""

    raw_text: str
    """The whole call with its marks, so that nothing is lost."""
    error: str


ReadCall = Call | BadCall
