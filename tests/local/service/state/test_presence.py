"""Who is still there to fetch results, and connections that take nothing."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
import uvicorn

from tinker_cookbook.local.process.lifecycle import bind
from tinker_cookbook.local.service.protocol.connections import HttpProtocol
from tinker_cookbook.local.service.settings import Patience
from tinker_cookbook.local.service.state.presence import Presence

NEVER = 1000.0


def presence(cut: float = NEVER, silent: float = NEVER, ended: float = NEVER) -> Presence:
    found = Presence(Patience(cut_seconds=cut, silent_seconds=silent, ended_seconds=ended))
    found.hear("s")
    return found


def pass_some_time() -> None:
    time.sleep(0.01)


def test_a_silent_client_is_lost_in_time() -> None:
    for seconds, is_lost in ((0.0, True), (NEVER, False)):
        clients = presence(silent=seconds)
        pass_some_time()
        assert clients.is_lost("s") is is_lost


def test_a_client_that_holds_a_request_is_there_however_long_it_takes() -> None:
    clients = presence(cut=0.0, silent=0.0)
    with clients.poll("s"), clients.poll("s"):
        pass_some_time()
        assert not clients.is_lost("s")
    pass_some_time()
    assert clients.is_lost("s")


def test_an_ended_connection_counts_until_something_is_heard() -> None:
    clients = presence(cut=0.0)
    clients.cut("s")
    pass_some_time()
    assert clients.is_lost("s")
    clients.hear("s")
    pass_some_time()
    assert not clients.is_lost("s")


def test_a_closed_session_takes_no_results_even_if_a_request_is_held() -> None:
    clients = presence(ended=0.0)
    assert not clients.is_lost("s")
    clients.end("s")
    with clients.poll("s"):
        pass_some_time()
        assert clients.is_lost("s")


def test_what_was_heard_long_ago_is_forgotten() -> None:
    clients = presence(silent=0.0)
    pass_some_time()
    with clients.poll("held"):
        pass_some_time()
        clients.forget_silent(0.0)
        assert set(clients._clients) == {"held"}


class _Impatient(HttpProtocol):
    write_seconds = 0.3


@pytest.mark.anyio
@pytest.mark.parametrize("reads", [False, True])
async def test_a_client_that_takes_nothing_is_cut_off_and_a_slow_one_is_not(reads: bool) -> None:
    """The client that reads takes a piece more often than the service wants to see one."""
    outcome: list[int] = []

    async def app(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(300):
            await send(
                {"type": "http.response.body", "body": b"x" * 65536, "more_body": number < 299}
            )
        received = await receive()
        while received["type"] != "http.disconnect":
            received = await receive()
        outcome.append(1)

    listener = bind("127.0.0.1", 0)
    config = uvicorn.Config(app, http=_Impatient, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    client = socket.create_connection(listener.getsockname())
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    size = 0
    if reads:
        while piece := await loop.sock_recv(client, 2**20):
            size += len(piece)
            await asyncio.sleep(0.05)
        assert size > 300 * 65536
    else:
        async with asyncio.timeout(30):
            while not outcome:
                await asyncio.sleep(0.05)
    client.close()
    server.should_exit = True
    await serving
    listener.close()
