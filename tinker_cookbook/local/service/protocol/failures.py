"""Errors -> HTTP statuses and messages: the only place that decides how a client hears of an error.

The SDK ends a call at once for the statuses 400, 404 and 413, and repeats it for minutes for 409,
429 and 5xx. A request that cannot succeed must therefore never be answered with one of those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from tinker_cookbook.exceptions import TinkerCookbookError
from tinker_cookbook.local.errors import (
    BodyTimeoutError,
    ForbiddenError,
    GoneError,
    NotFoundError,
    ShuttingDownError,
    StorageError,
    TooLargeError,
    UnauthorizedError,
    UserError,
    shorten_message,
)

__all__ = ["Failure", "describe_failure", "render_failure"]

_STATUS: dict[type[Exception], int] = {
    UserError: 400,
    UnauthorizedError: 401,
    ForbiddenError: 403,
    NotFoundError: 404,
    BodyTimeoutError: 408,
    GoneError: 410,
    TooLargeError: 413,
    ShuttingDownError: 503,  # the SDK sends the request again, to the next service
    StorageError: 400,  # with a 5xx the SDK would repeat it instead of telling its user
    TinkerCookbookError: 400,
    ClientDisconnect: 400,
}
_HEADERS: dict[int, dict[str, str]] = {
    401: {"www-authenticate": 'Tinker error="invalid_token"'},
    503: {"retry-after": "1"},
}


@dataclass(frozen=True)
class Failure:
    """The answer to a request that failed."""

    status: int
    detail: str
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_unexpected(self) -> bool:
        """Whether the service itself is at fault."""
        return self.status == 500


def describe_failure(error: Exception, request_id: str) -> Failure:
    """Return the answer to a request that failed with this error."""
    if isinstance(error, HTTPException):
        return Failure(error.status_code, error.detail, error.headers or {})
    status = next((_STATUS[cls] for cls in type(error).__mro__ if cls in _STATUS), 500)
    detail = str(error)
    if status == 500:
        detail = f"{type(error).__name__}: {error} (request {request_id})"
    elif isinstance(error, ClientDisconnect):
        detail = "the client closed the connection"
    return Failure(status, detail, _HEADERS.get(status, {}))


def render_failure(failure: Failure) -> Response:
    """Return the answer as clients of the Tinker API expect it: `{"detail": ...}`."""
    return JSONResponse(
        {"detail": shorten_message(failure.detail)},
        status_code=failure.status,
        headers=failure.headers,
    )
