"""The routes: models, chat completions and completions, streamed or whole."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tinker_cookbook.local.errors import ShuttingDownError, UserError
from tinker_cookbook.local.openai_api.answers import ChatAnswer, CompletionAnswer
from tinker_cookbook.local.openai_api.codec import TextCodec
from tinker_cookbook.local.openai_api.errors import describe_error
from tinker_cookbook.local.openai_api.requests import (
    ChatRequest,
    CompletionRequest,
    SamplingChoice,
    decode_chat_request,
    decode_completion_request,
)
from tinker_cookbook.local.openai_api.sampling import (
    Drawn,
    Sampling,
    Target,
    build_spec,
    codecs_of,
    end_token_ids,
    find_target,
    with_prompt_scores,
)
from tinker_cookbook.local.service.protocol.connections import wait_until_gone
from tinker_cookbook.local.service.protocol.failures import describe_failure
from tinker_cookbook.local.service.protocol.http import read_json
from tinker_cookbook.local.service.protocol.json_body import JsonObject
from tinker_cookbook.local.service.protocol.request_ids import current_request_id
from tinker_cookbook.local.service.threads import TEXTS

if TYPE_CHECKING:
    from tinker_cookbook.local.engine.types import ModelInfo, SampleResult, SampleSpec
    from tinker_cookbook.local.service.state.core import Service

__all__ = ["PREFIX", "ROUTES"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

PREFIX = "/oai/api/v1"
MAX_LISTED = 10_000
Answer = ChatAnswer | CompletionAnswer


@dataclass(frozen=True)
class _Job:
    """A request that is ready to be sampled."""

    target: Target
    choice: SamplingChoice
    specs: list[SampleSpec]
    answer: Answer


async def list_models(service: Service, request: Request) -> Response:
    started = int(service.started_at)
    models = [_model(name, started) for name in await service.engine.offered()]
    rows, _ = await asyncio.to_thread(service.store.index.checkpoints, limit=MAX_LISTED)
    models += [
        _model(row.tinker_path, int(row.created_at))
        for row in rows
        if row.segment == "sampler_weights"
    ]
    return JSONResponse({"object": "list", "data": models})


async def get_model(service: Service, request: Request) -> Response:
    target = find_target(service, request.path_params["model"])
    return JSONResponse(_model(target.name, int(service.started_at)))


def _model(name: str, created: int) -> JsonObject:
    return {"id": name, "object": "model", "created": created, "owned_by": "tinker-cookbook"}


async def chat_completions(service: Service, request: Request) -> Response:
    body = await read_json(request, service.limits.max_json_bytes)
    chat = await body.decode(decode_chat_request, body.values)
    client = _client_of(request, body.values)
    return await _perform(
        service, request, chat.sampling, lambda t: _plan_chat(service, chat, t), client
    )


async def completions(service: Service, request: Request) -> Response:
    body = await read_json(request, service.limits.max_json_bytes)
    asked = await body.decode(decode_completion_request, body.values)
    client = _client_of(request, body.values)
    return await _perform(
        service, request, asked.sampling, lambda t: _plan_completion(service, asked, t), client
    )


def _client_of(request: Request, values: JsonObject) -> str:
    """Return whose request it is, to share the engine fairly: its `user`, or else its address."""
    user = values.get("user")
    if isinstance(user, str) and user:
        return f"user:{user[:200]}"
    return f"address:{request.client.host if request.client is not None else ''}"


async def _load(service: Service, target: Target) -> tuple[ModelInfo, TextCodec]:
    info = await service.engine.load(target.base_model)
    return info, await codecs_of(service).get(info.folder)


async def _plan_chat(service: Service, chat: ChatRequest, target: Target) -> _Job:
    info, codec = await _load(service, target)
    template = codec.tool_template if chat.tools else codec.template
    if template is None:
        raise UserError(
            f"model={target.base_model!r} has no chat template; use /completions with a "
            "complete prompt"
        )

    def render() -> tuple[str, list[int]]:
        given = (chat.messages, chat.tools, chat.template_options)
        codec.check_length(_count_characters(given), info.max_context_length, "messages")
        text = template.render(chat.messages, tools=chat.tools, options=chat.template_options)
        codec.check_length(len(template.reveal(text)), info.max_context_length, "messages")
        return text, template.encode(text)

    text, prompt = await TEXTS.run(render)
    ends = end_token_ids(chat.sampling, info.eos_token_ids, template.turn_end_ids)
    spec = build_spec(chat.sampling, prompt, ends, codec)
    answer = ChatAnswer(
        target.name,
        codec,
        choice=chat.sampling,
        end_ids=ends,
        tools=chat.tools,
        starts_in_thinking=text.rstrip().endswith("<think>"),
    )
    return _Job(target, chat.sampling, [spec], answer)


def _count_characters(value: object) -> int:
    """Return the number of characters of all texts in objects and lists."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(key) + _count_characters(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(map(_count_characters, value))
    return 0


async def _plan_completion(service: Service, asked: CompletionRequest, target: Target) -> _Job:
    info, codec = await _load(service, target)

    def encode(prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        codec.check_length(len(prompt), info.max_context_length, "prompt")
        return codec.encode_text(prompt)

    prompts = await TEXTS.run(lambda: [encode(prompt) for prompt in asked.prompts])
    ends = end_token_ids(asked.sampling, info.eos_token_ids, ())
    specs = [build_spec(asked.sampling, prompt, ends, codec) for prompt in prompts]
    if asked.echo and asked.sampling.top_logprobs is not None:
        specs = [with_prompt_scores(spec, asked.sampling.top_logprobs) for spec in specs]
    answer = CompletionAnswer(
        target.name,
        codec,
        choice=asked.sampling,
        end_ids=ends,
        prompts=prompts,
        echo=asked.echo,
    )
    return _Job(target, asked.sampling, specs, answer)


async def _perform(
    service: Service,
    request: Request,
    choice: SamplingChoice,
    plan: Callable[[Target], Awaitable[_Job]],
    client: str,
) -> Response:
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
    service: Service, target: Target, plan: Callable[[Target], Awaitable[_Job]], client: str
) -> Response:
    job = await plan(target)
    started = Sampling.start(service, target, job.specs, watch=False, client=client)
    async with started as sampling:
        results = await sampling.results()
    body = await TEXTS.run(_whole_body, job, results)
    return Response(body, media_type="application/json")


def _whole_body(job: _Job, results: list[SampleResult]) -> bytes:
    """Return the answer as JSON, written choice by choice, so that other threads run in between."""
    shown = job.answer.whole(job.specs, results)
    written = cast(list[JsonObject], shown.pop("choices"))
    choices = ",".join(_json(choice, allow_nan=False) for choice in written)
    return f'{_json(shown)[:-1]},"choices":[{choices}]}}'.encode()


async def _open(
    service: Service,
    target: Target,
    plan: Callable[[Target], Awaitable[_Job]],
    stack: contextlib.AsyncExitStack,
    client: str,
) -> tuple[_Job, Sampling, list[Drawn]]:
    """Start to sample and wait for the first token. Until then, an error is an ordinary answer."""
    job = await plan(target)
    started = Sampling.start(service, target, job.specs, watch=True, client=client)
    sampling = await stack.enter_async_context(started)
    return job, sampling, await sampling.next_draws()


async def _events(job: _Job, sampling: Sampling, first: list[Drawn]) -> AsyncIterator[bytes]:
    """Yield server-sent events; the last is `[DONE]`. An error becomes an event, too."""
    answer = job.answer
    try:
        for chunk in answer.opening(len(job.specs) * job.choice.n):
            yield _event(chunk)
        async for drawn in sampling.draws(first):
            chunks = [chunk for one in drawn for chunk in answer.take(one)]
            if chunks:
                yield b"".join(map(_event, chunks))
        for chunk in answer.closing(job.specs, await sampling.results()):
            yield _event(chunk)
    except Exception as error:
        failure = describe_failure(error, current_request_id())
        if failure.is_unexpected:
            logger.exception("a streamed answer failed (request %s)", current_request_id())
        yield _event({"error": describe_error(failure)})
    yield b"data: [DONE]\n\n"


def _event(value: JsonObject) -> bytes:
    return b"data: " + _json(value).encode() + b"\n\n"


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


ROUTES = [
    ("GET", "/models", list_models),
    ("GET", "/models/{model:path}", get_model),
    ("POST", "/chat/completions", chat_completions),
    ("POST", "/completions", completions),
]
