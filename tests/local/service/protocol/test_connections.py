"""Whoever connects must send a request's head soon; what comes after the head has other times."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest
import uvicorn

from tinker_cookbook.local.service.protocol.connections import HttpProtocol

pytestmark = pytest.mark.anyio

HEAD_SECONDS = 0.5
PATIENCE = 30.0
HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


class _Hurried(HttpProtocol):
    head_seconds = HEAD_SECONDS


async def answer_slowly(scope, receive, send) -> None:
    """Twice as slow as a head may be, after reading the body."""
    assert scope["type"] == "http"
    while (await receive()).get("more_body"):
        pass
    await asyncio.sleep(2 * HEAD_SECONDS)
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
async def port() -> AsyncIterator[int]:
    config = uvicorn.Config(answer_slowly, port=0, http=_Hurried, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await running


@pytest.mark.parametrize("begun", [b"", b"G", HEAD, HEAD + b"X: "])
async def test_a_head_that_does_not_come_ends_the_connection(port: int, begun: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(begun)
    assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
    writer.close()


async def test_a_head_that_drips_does_not_begin_the_time_anew(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(HEAD)
    closed = asyncio.create_task(reader.read())
    began = time.monotonic()
    while not closed.done() and time.monotonic() - began < PATIENCE:
        writer.write(b"X: y\r\n")
        await asyncio.sleep(HEAD_SECONDS / 5)
    assert closed.done()
    writer.close()


async def test_slow_answers_slow_bodies_and_second_requests_are_served(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(2):
        writer.write(HEAD + b"Content-Length: 6\r\n\r\n")
        for _ in range(3):
            await asyncio.sleep(HEAD_SECONDS / 2)
            writer.write(b"xx")
        answer = await asyncio.wait_for(reader.readuntil(b"ok"), PATIENCE)
        assert answer.startswith(b"HTTP/1.1 200")
        await asyncio.sleep(2 * HEAD_SECONDS)  # idle, which is another time
    writer.write(HEAD)
    assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
    writer.close()
