"""Serving a planned request: sample, and send the answer whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, TypeVar, cast

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tinker_cookbook.local.errors import ShuttingDownError
from tinker_cookbook.local.openai_api.planning import Job
from tinker_cookbook.local.openai_api.requests import SamplingChoice
from tinker_cookbook.local.openai_api.sampling import Drawn, Sampling, Target, find_target
from tinker_cookbook.local.service.protocol.connections import wait_until_gone
from tinker_cookbook.local.service.protocol.failures import describe_failure
from tinker_cookbook.local.service.protocol.json_body import JsonObject
from tinker_cookbook.local.service.protocol.request_ids import current_request_id
from tinker_cookbook.local.service.threads import TEXTS

if TYPE_CHECKING:
    from tinker_cookbook.local.engine.types import SampleResult
    from tinker_cookbook.local.service.state.core import Service

__all__ = ["perform"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


async def perform(
    service: Service,
    request: Request,
    choice: SamplingChoice,
    plan: Callable[[Target], Awaitable[Job]],
    client: str,
) -> Response:
    """Plan and sample a request, and return its answer.

    Args:
        service: the service.
        request: the HTTP request; if its client disconnects, sampling stops.
        choice: how to sample.
        plan: plans the request for the model that it names.
        client: whose request it is; clients share the engine evenly.
    """
    service.require_open()
    target = find_target(service, choice.model)
    if not choice.stream:
        return await _unless_gone(service, request, _answer_whole(service, target, plan, client))
    stack = contextlib.AsyncExitStack()
    try:
        opening = _open(service, target, plan, stack, client)
        job, sampling, first = await _unless_gone(service, request, opening)
    except BaseException:
        await stack.aclose()
        raise
    return _EventStream(_events(job, sampling, first), stack)


async def _answer_whole(
    service: Service, target: Target, plan: Callable[[Target], Awaitable[Job]], client: str
) -> Response:
    job = await plan(target)
    started = Sampling.start(service, target, job.specs, watch=False, client=client)
    async with started as sampling:
        results = await sampling.results()
    body = await TEXTS.run(_whole_body, job, results)
    return Response(body, media_type="application/json")


def _whole_body(job: Job, results: list[SampleResult]) -> bytes:
    """Return the answer as JSON, written choice by choice, so that other threads run in between."""
    shown = job.answer.whole(job.specs, results)
    if "choices" not in shown:
        return _json(shown, allow_nan=False).encode()
    written = cast(list[JsonObject], shown.pop("choices"))
    choices = ",".join(_json(choice, allow_nan=False) for choice in written)
    return f'{_json(shown)[:-1]},"choices":[{choices}]}}'.encode()


async def _open(
    service: Service,
    target: Target,
    plan: Callable[[Target], Awaitable[Job]],
    stack: contextlib.AsyncExitStack,
    client: str,
) -> tuple[Job, Sampling, list[Drawn]]:
    """Start to sample and wait for the first token. Until then, an error is an ordinary answer."""
    job = await plan(target)
    started = Sampling.start(service, target, job.specs, watch=True, client=client)
    sampling = await stack.enter_async_context(started)
    return job, sampling, await sampling.next_draws()


async def _events(job: Job, sampling: Sampling, first: list[Drawn]) -> AsyncIterator[bytes]:
    """Yield server-sent events. An error becomes an event, too."""
    answer = job.answer
    try:
        for event in answer.opening(job.specs):
            yield answer.frame(event)
        async for drawn in sampling.draws(first):
            events = [event for one in drawn for event in answer.take(one)]
            if events:
                yield b"".join(map(answer.frame, events))
        for event in answer.closing(job.specs, await sampling.results()):
            yield answer.frame(event)
    except Exception as error:
        failure = describe_failure(error, current_request_id())
        if failure.is_unexpected:
            logger.exception("a streamed answer failed (request %s)", current_request_id())
        yield answer.frame(answer.failure(failure))
    if answer.last_frame:
        yield answer.last_frame


def _json(value: JsonObject, *, allow_nan: bool = True) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=allow_nan)


class _EventStream(StreamingResponse):
    """A stream that cancels its sampling when it ends, even before its first event."""

    def __init__(self, events: AsyncIterator[bytes], holding: contextlib.AsyncExitStack) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._holding = holding

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._holding.aclose()
            logger.info("stream closed after %.1fms", (time.monotonic() - began) * 1e3)


async def _unless_gone(service: Service, request: Request, work: Coroutine[object, object, T]) -> T:
    """Await work, and cancel it if the client disconnects.

    Raises:
        ClientDisconnect: the client disconnected first.
        ShuttingDownError: the service stopped first.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(wait_until_gone(request))
    try:
        with service.in_flight(task):
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        if task.cancelled():
            raise ShuttingDownError("the service stopped before the answer ended")
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
