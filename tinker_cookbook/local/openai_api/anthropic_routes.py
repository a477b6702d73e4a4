"""The routes of Anthropic's Messages API: messages, streamed or whole, token counts and models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tinker_cookbook.dialects.anthropic import (
    MessageWriter,
    error_body,
    model_body,
    read_messages_request,
)
from tinker_cookbook.local.errors import UserError, shorten_message
from tinker_cookbook.local.openai_api.answers import Answer, ChatContext, WriterAnswer
from tinker_cookbook.local.openai_api.planning import plan_chat
from tinker_cookbook.local.openai_api.requests import ChatRequest, decode_chat_request
from tinker_cookbook.local.openai_api.routes import client_of, model_names
from tinker_cookbook.local.openai_api.sampling import find_target
from tinker_cookbook.local.openai_api.serving import perform
from tinker_cookbook.local.service.protocol.failures import Failure
from tinker_cookbook.local.service.protocol.http import read_json
from tinker_cookbook.local.service.protocol.json_body import JsonObject
from tinker_cookbook.local.service.protocol.request_ids import current_request_id

if TYPE_CHECKING:
    from tinker_cookbook.local.service.state.core import Service

__all__ = ["PREFIX", "ROUTES", "render_anthropic_failure"]

PREFIX = "/anthropic/v1"


async def messages(service: Service, request: Request) -> Response:
    body = await read_json(request, service.limits.max_json_bytes)
    values = read_messages_request(body.values)
    chat = await body.decode(decode_chat_request, values)
    client = client_of(request, values)
    return await perform(
        service, request, chat.sampling, lambda t: plan_chat(service, chat, t, _answer), client
    )


def _answer(context: ChatContext) -> Answer:
    return WriterAnswer(MessageWriter(context.model), context, failure=_failure_body)


async def count_tokens(service: Service, request: Request) -> Response:
    body = await read_json(request, service.limits.max_json_bytes)
    values = read_messages_request(body.values, counts_only=True)
    chat: ChatRequest = await body.decode(decode_chat_request, values)
    if chat.pictures:
        raise UserError("messages have images, whose tokens are only counted when they are sampled")
    job = await plan_chat(service, chat, find_target(service, chat.sampling.model))
    return JSONResponse({"input_tokens": len(job.specs[0].prompt)})


async def list_models(service: Service, request: Request) -> Response:
    names = [name for name, _ in await model_names(service)]
    shown = {"data": [model_body(name) for name in names], "has_more": False}
    return JSONResponse(shown | {"first_id": names[0] if names else None, "last_id": names[-1]})


async def get_model(service: Service, request: Request) -> Response:
    return JSONResponse(model_body(find_target(service, request.path_params["model"]).name))


def _failure_body(failure: Failure) -> JsonObject:
    return error_body(failure.status, shorten_message(failure.detail), current_request_id())


def render_anthropic_failure(failure: Failure) -> Response:
    """Return an answer that Anthropic's clients turn into their exception for this status."""
    headers = {**failure.headers, "request-id": current_request_id()}
    return JSONResponse(_failure_body(failure), status_code=failure.status, headers=headers)


ROUTES = [
    ("POST", "/messages", messages),
    ("POST", "/messages/count_tokens", count_tokens),
    ("GET", "/models", list_models),
    ("GET", "/models/{model:path}", get_model),
]
