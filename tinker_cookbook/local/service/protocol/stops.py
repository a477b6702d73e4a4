"""Stop sequences of sampling requests: texts, or token ids."""

from __future__ import annotations

from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.limits import INT32
from tinker_cookbook.local.service.protocol.json_body import show_value
from tinker_cookbook.local.service.protocol.typed_body import NotAcceptedError, Reader

__all__ = ["STOPS", "STOP_TEXTS", "read_stop_texts"]

MAX_STOPS = 256
MAX_CHARACTERS = 4096
_LENGTHS = f"texts of 1 to {MAX_CHARACTERS} characters"


def read_stop_texts(value: object, where: str) -> list[str]:
    """Return the stop texts of a text or a list of texts."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or len(items) > MAX_STOPS:
        raise NotAcceptedError
    for item in items:
        if not isinstance(item, str) or not 1 <= len(item) <= MAX_CHARACTERS:
            raise UserError(f"{where}={show_value(item)} is not accepted; expected {_LENGTHS}")
    return items


def _read_stops(value: object, where: str) -> list[str] | list[int]:
    """Return the stop texts or the stop token ids of a request."""
    if not isinstance(value, list) or all(isinstance(item, str) for item in value):
        return read_stop_texts(value, where)
    if len(value) > MAX_STOPS:
        raise NotAcceptedError
    for item in value:
        if type(item) is not int or item not in INT32:
            raise UserError(f"{where} holds {show_value(item)}; use texts only, or token ids only")
    return value


STOP_TEXTS = Reader(f"a text or a list of up to {MAX_STOPS} {_LENGTHS}", read_stop_texts)
STOPS = Reader(f"a text or a list of up to {MAX_STOPS} texts or token ids", _read_stops)
