"""Read request bodies and query strings within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import zstandard
from starlette.requests import Request
from starlette.responses import Response

from tinker_cookbook.local.errors import BodyTimeoutError, TooLargeError, UserError
from tinker_cookbook.local.limits import Range
from tinker_cookbook.local.service.protocol.json_body import (
    LARGE_BODY,
    JsonObject,
    parse_json_object,
)
from tinker_cookbook.local.service.protocol.typed_body import read_as
from tinker_cookbook.local.service.threads import READING

__all__ = [
    "JsonBody",
    "no_content",
    "query_integer",
    "read_batch",
    "read_body",
    "read_json",
    "read_request",
]


BODY_SECONDS = 600.0
"""Time limit for a request's whole body."""
BODY_PAUSE_SECONDS = 60.0
"""Time limit for the next part of it."""


MAX_DIGITS = 18
FREE_BYTES = 8 * 2**20
MAX_RATIO = 100
"""Maximum compression ratio of a body that becomes larger than `FREE_BYTES`."""
MAX_WINDOW = 128 * 2**20
PART_BYTES = 2**20
T = TypeVar("T")
P = ParamSpec("P")


def no_content() -> Response:
    return Response(status_code=204)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read the body.

    Raises:
        TooLargeError: as soon as it is known to be too long.
        BodyTimeoutError: the body took longer than BODY_SECONDS, or a part of it longer than
            BODY_PAUSE_SECONDS.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and (len(declared) > MAX_DIGITS or int(declared) > max_bytes):
        raise TooLargeError(f"the body has {declared[:40]} bytes; at most {max_bytes} are accepted")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _gather_body(request, max_bytes)
    except TimeoutError as error:
        raise BodyTimeoutError(
            f"the body did not arrive within {BODY_SECONDS:g} s, or no part of it arrived for "
            f"{BODY_PAUSE_SECONDS:g} s"
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
            raise TooLargeError(f"the body has more than the {max_bytes} bytes that are accepted")
        parts.append(part)
    return b"".join(parts)


@dataclass(frozen=True)
class JsonBody:
    """The JSON object of a request."""

    values: JsonObject
    is_large: bool

    def read_as(self, cls: type[T]) -> T:
        """Build the dataclass that declares the body; UserError if it does not fit."""
        return read_as(cls, self.values)

    async def decode(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that looks at all of the body; for a large body, on another thread."""
        if self.is_large:
            return await READING.run(function, *args, **kwargs)
        return function(*args, **kwargs)


async def read_json(request: Request, max_bytes: int) -> JsonBody:
    """Read a JSON object."""
    body = await read_body(request, max_bytes)
    if len(body) < LARGE_BODY:
        return JsonBody(parse_json_object(body), is_large=False)
    return JsonBody(await READING.run(parse_json_object, body), is_large=True)


async def read_request(request: Request, cls: type[T], max_bytes: int) -> T:
    """Read a JSON object into the dataclass that declares it."""
    return (await read_json(request, max_bytes)).read_as(cls)


async def read_batch(request: Request, max_bytes: int) -> bytes:
    """Read a protobuf body, and decompress it if its encoding says so."""
    body = await read_body(request, max_bytes)
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding == "identity":
        return body
    if encoding != "zstd":
        raise UserError(f"Content-Encoding {encoding!r} is not supported; use zstd or none")
    return await READING.run(_decompress, body, max_bytes)


def _decompress(body: bytes, max_bytes: int) -> bytes:
    """Decompress a body. The ratio is bounded, so that few bytes do not become gigabytes."""
    limit = min(max_bytes, max(FREE_BYTES, MAX_RATIO * len(body)))
    parts: list[bytes] = []
    size = 0
    try:
        with zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).stream_reader(body) as reader:
            while part := reader.read(PART_BYTES):
                size += len(part)
                if size > limit:
                    raise TooLargeError(
                        f"the decompressed body has more than {limit} bytes, the limit for a body "
                        f"of {len(body)} compressed bytes; send less in one request, or do not "
                        "compress it"
                    )
                parts.append(part)
    except zstandard.ZstdError as error:
        raise UserError(f"the body is not valid zstd: {error}") from error
    return b"".join(parts)


def query_integer(request: Request, name: str, default: int, accepted: Range) -> int:
    """Return a whole number of the query string."""
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or value not in accepted:
        raise UserError(f"{name}={text[:40]!r} is not accepted; expected a whole number{accepted}")
    return value
