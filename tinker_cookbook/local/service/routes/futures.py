"""Routes that return the results of operations."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from tinker_cookbook.local.errors import GoneError, NotFoundError
from tinker_cookbook.local.service.protocol.bodies import RetrieveFuture, RetrieveFutures
from tinker_cookbook.local.service.protocol.connections import unless_gone
from tinker_cookbook.local.service.protocol.http import read_request
from tinker_cookbook.local.service.routes.sampling import sampling_group
from tinker_cookbook.local.service.state.core import Service

__all__ = ["ROUTES"]

Result = TypeVar("Result")


async def retrieve_future(service: Service, request: Request) -> Response:
    """Hold the request until the result is ready; status 408 tells the client to poll again."""
    asked = await read_request(request, RetrieveFuture, service.limits.max_json_bytes)
    request_id = asked.request_id
    entry = service.futures.get(request_id)
    if entry is None:
        named = f"request_id={request_id[:80]!r}"
        if service.futures.is_gone(request_id):
            raise GoneError(f"{named} is no longer kept")
        raise NotFoundError(f"{named} does not exist")
    hold = service.futures.wait(entry, service.limits.poll_hold_seconds)
    if not entry.done.is_set():
        hold = _held(service, request, entry.session_id, hold)
    if not await hold:
        return JSONResponse(
            {"type": "try_again", "request_id": request_id, "queue_state": "active"},
            status_code=408,
        )
    payload = entry.payload
    assert payload is not None, "a finished entry has a payload"
    return Response(payload.body, media_type=payload.content_type)


async def retrieve_futures(service: Service, request: Request) -> Response:
    """Return which samples of one sampling client have finished since its cursor."""
    asked = await read_request(request, RetrieveFutures, service.limits.max_json_bytes)
    sampler = service.samplers.get(asked.target.sampling_session_id)
    group = sampling_group(sampler.sampler_id, asked.target.cloned_sampler_id)
    seconds = min(service.limits.poll_hold_seconds, asked.timeout)
    service.futures.drop(asked.retrieved_request_ids)
    hold = service.futures.wait_group(group, asked.prev_cursor, seconds)
    entries, cursor = await _held(service, request, sampler.row.session_id, hold)
    completions = [
        {"request_id": entry.request_id, "state": "failed" if entry.failed else "finished"}
        for entry in entries
    ]
    return JSONResponse({"completions": completions, "cursor": cursor})


async def _held(
    service: Service, request: Request, session_id: str, hold: Awaitable[Result]
) -> Result:
    """Wait for a session's results. If the client closes its connection meanwhile, note that."""
    presence = service.sessions.presence
    with presence.poll(session_id):
        try:
            return await unless_gone(request, hold)
        except ClientDisconnect:
            presence.cut(session_id)
            raise


ROUTES = [
    ("POST", "/retrieve_future", retrieve_future),
    ("POST", "/retrieve_futures", retrieve_futures),
]
