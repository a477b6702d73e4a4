"""Small HTTP pieces: bodies read with a bound, JSON answers with a length, errors with a status.

Status rules of the SDK: 400/404/413 end a call at once; 409, 429 and 5xx are retried for minutes,
so they are never used for a request that cannot succeed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import zstandard
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tinker_cookbook.local.errors import (
    GoneError,
    NotFoundError,
    ShuttingDownError,
    UserError,
    shorten_message,
)
from tinker_cookbook.local.service.protocol.fields import LARGE_BODY, Fields, parse_json_object
from tinker_cookbook.local.service.threads import READING

__all__ = [
    "HttpError",
    "decode",
    "error_response",
    "no_content",
    "query_integer",
    "read_batch",
    "read_body",
    "read_fields",
]


BODY_SECONDS = 600.0
"""How long a request's body may take to arrive."""
BODY_PAUSE_SECONDS = 60.0
"""How long nothing of it may arrive."""


MAX_DIGITS = 18
FREE_BYTES = 8 * 2**20
MAX_RATIO = 100
"""How often a compressed body may hold its own length, beyond `FREE_BYTES`."""
MAX_WINDOW = 128 * 2**20
PART_BYTES = 2**20
T = TypeVar("T")


_STATUS: dict[type[Exception], int] = {NotFoundError: 404, GoneError: 410, ShuttingDownError: 503}


def as_http_error(error: UserError | ShuttingDownError) -> HttpError:
    """How a client hears of an error of the service's state."""
    status = _STATUS.get(type(error), 400)
    # a service that is about to stop: the SDK sends the request again to the next one
    headers = {"retry-after": "1"} if status == 503 else None
    return HttpError(status, str(error), headers)


class HttpError(Exception):
    """An answer with this status and `{"detail": ...}`."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers


def error_response(
    status: int, detail: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return JSONResponse({"detail": shorten_message(detail)}, status_code=status, headers=headers)


def no_content() -> Response:
    return Response(status_code=204)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read the body.

    Raises:
        HttpError: 413 as soon as it is too long, 408 if it has not arrived in BODY_SECONDS, or
            nothing of it in BODY_PAUSE_SECONDS.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and (len(declared) > MAX_DIGITS or int(declared) > max_bytes):
        raise HttpError(
            413, f"the body has {declared[:40]} bytes; at most {max_bytes} are accepted"
        )
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _gather_body(request, max_bytes)
    except TimeoutError as error:
        raise HttpError(
            408,
            f"the body did not arrive within {BODY_SECONDS:g} s, or nothing of it for "
            f"{BODY_PAUSE_SECONDS:g} s",
        ) from error


async def _gather_body(request: Request, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    stream = request.stream()
    while True:
        async with asyncio.timeout(BODY_PAUSE_SECONDS):
            part = await anext(stream, None)
        if part is None:
            break
        size += len(part)
        if size > max_bytes:
            raise HttpError(413, f"the body has more than the {max_bytes} bytes that are accepted")
        parts.append(part)
    return b"".join(parts)


async def read_fields(request: Request, max_bytes: int) -> Fields:
    """Read a JSON object."""
    body = await read_body(request, max_bytes)
    if len(body) < LARGE_BODY:
        return Fields(parse_json_object(body))
    return Fields(await READING.run(parse_json_object, body), is_large=True)


async def decode(fields: Fields, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """The result of a function that goes through a whole request; a large one is for a thread."""
    if fields.is_large:
        return await READING.run(function, *args, **kwargs)
    return function(*args, **kwargs)


async def read_batch(request: Request, max_bytes: int) -> bytes:
    """Read a protobuf body, decompressed where its encoding says so."""
    body = await read_body(request, max_bytes)
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding == "identity":
        return body
    if encoding != "zstd":
        raise HttpError(400, f"Content-Encoding {encoding!r} is not supported; use zstd or none")
    return await READING.run(_decompress, body, max_bytes)


def _decompress(body: bytes, max_bytes: int) -> bytes:
    """Bounded also by what was sent: a few bytes do not become gigabytes."""
    limit = min(max_bytes, max(FREE_BYTES, MAX_RATIO * len(body)))
    parts: list[bytes] = []
    size = 0
    try:
        with zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(body) as reader:
            while part := reader.read(PART_BYTES):
                size += len(part)
                if size > limit:
                    raise HttpError(
                        413,
                        f"the decompressed body has more than {limit} bytes, which is all that "
                        f"{len(body)} compressed ones may become; send less at once, or do not "
                        "compress it",
                    )
                parts.append(part)
    except zstandard.ZstdError as error:
        raise HttpError(400, f"the body is not valid zstd: {error}") from error
    return b"".join(parts)


def query_integer(request: Request, name: str, default: int, *, minimum: int, maximum: int) -> int:
    """A whole number from the query string."""
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        value: Any = int(text)
    except ValueError:
        value = text[:40]
    if not isinstance(value, int) or not minimum <= value <= maximum:
        raise UserError(
            f"{name}={value!r} is not accepted; use a number from {minimum} to {maximum}"
        )
    return value
