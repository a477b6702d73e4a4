"""Routes that hand out results."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from tinker_cookbook.local.service.protocol.connections import unless_gone
from tinker_cookbook.local.service.protocol.fields import Fields
from tinker_cookbook.local.service.protocol.http import HttpError, read_fields
from tinker_cookbook.local.service.routes.sampling import CLONE_STRIDE, sampling_group
from tinker_cookbook.local.service.state.core import Service

__all__ = ["ROUTES"]

MAX_RETRIEVED = 100_000
"""Results that a poll may say it has."""

Result = TypeVar("Result")


async def retrieve_future(service: Service, request: Request) -> Response:
    """Hold the request until the result is there; 408 asks the client to come again at once."""
    fields = await read_fields(request, service.limits.max_json_bytes)
    request_id = fields.text("request_id")
    entry = service.futures.get(request_id)
    if entry is None:
        is_gone = service.futures.is_gone(request_id)
        detail = "is no longer kept" if is_gone else "does not exist"
        raise HttpError(410 if is_gone else 404, f"request_id={request_id[:80]!r} {detail}")
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
    """Completions of one sampling client since its cursor."""
    fields = await read_fields(request, service.limits.max_json_bytes)
    target = Fields(fields.object("target"), prefix="target.")
    target.text("type", choices=("sampling_session",))
    sampler = service.samplers.get(target.text("sampling_session_id"))
    clone = target.integer("cloned_sampler_id", 0, minimum=0, maximum=CLONE_STRIDE)
    hold = service.limits.poll_hold_seconds
    seconds = min(hold, fields.number("timeout", hold, minimum=0.0))
    service.futures.drop(fields.texts("retrieved_request_ids", [], max_items=MAX_RETRIEVED))
    hold = service.futures.wait_group(
        sampling_group(sampler.sampler_id, clone),
        fields.integer("prev_cursor", 0, minimum=0),
        seconds,
    )
    entries, cursor = await _held(service, request, sampler.row.session_id, hold)
    completions = [
        {"request_id": entry.request_id, "state": "failed" if entry.failed else "finished"}
        for entry in entries
    ]
    return JSONResponse({"completions": completions, "cursor": cursor})


async def _held(
    service: Service, request: Request, session_id: str, hold: Awaitable[Result]
) -> Result:
    """Wait for a session's results, and note it if the client goes away meanwhile."""
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
