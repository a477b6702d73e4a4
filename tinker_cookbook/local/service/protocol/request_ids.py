"""Log lines: each has the id of its HTTP request, and control characters are made visible.

Clients choose names that are logged. A newline in a name must not look like the start of another
line, and an escape sequence must not reach a terminal.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType

from tinker_cookbook.utils.terminal_text import escape_controls

__all__ = [
    "JsonFormatter",
    "RequestIdFilter",
    "TextFormatter",
    "begin_request",
    "current_request_id",
]

NO_REQUEST = "-"
_ACCEPTED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
ExceptionInfo = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
)
_current: ContextVar[str] = ContextVar("request_id", default=NO_REQUEST)


def begin_request(given: str | None) -> str:
    """Choose and return the id of the request that is being answered.

    Tasks that the request starts keep the id. A given id that could confuse a log is replaced.
    """
    is_usable = given is not None and _ACCEPTED.fullmatch(given) is not None
    chosen = given if is_usable and given is not None else secrets.token_hex(6)
    _current.set(chosen)
    return chosen


def current_request_id() -> str:
    """Return the id of the request that is being answered."""
    return _current.get()


class RequestIdFilter(logging.Filter):
    """Adds the id of the current request to every log record."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = _current.get()
        return True


class TextFormatter(logging.Formatter):
    """Writes one line per record. The lines of a traceback follow it, each with a mark."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escape_controls(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: ExceptionInfo) -> str:
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"  | {escape_controls(line)}" for line in lines)


class JsonFormatter(logging.Formatter):
    """Writes one JSON object per line: time, level, logger, message, request_id, extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": getattr(record, "request_id", NO_REQUEST),
        }
        values |= getattr(record, "fields", {})
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return escape_controls(json.dumps(values, ensure_ascii=False))
