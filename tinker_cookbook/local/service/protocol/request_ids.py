"""Lines of the log: an id for every HTTP request in each, and clients' texts in visible letters.

A name with a newline in it must not look like a line of its own, nor one with ESC reach a terminal.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from tinker_cookbook.utils.terminal_text import escape_controls

__all__ = ["JsonFormatter", "RequestIdFilter", "TextFormatter", "begin_request"]

NO_REQUEST = "-"
_ACCEPTED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
_current: ContextVar[str] = ContextVar("request_id", default=NO_REQUEST)


def begin_request(given: str | None) -> str:
    """Choose the id of the request that is being answered.

    Work that it launches keeps the id. A given id that could confuse a log is replaced.
    """
    is_usable = given is not None and _ACCEPTED.fullmatch(given) is not None
    chosen = given if is_usable and given is not None else secrets.token_hex(6)
    _current.set(chosen)
    return chosen


class RequestIdFilter(logging.Filter):
    """Gives every record the id of the request that it belongs to."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = _current.get()
        return True


class TextFormatter(logging.Formatter):
    """One line for each record; those of a traceback follow it, marked as such."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escape_controls(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"  | {escape_controls(line)}" for line in lines)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request_id, and what `extra` holds."""

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {
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
