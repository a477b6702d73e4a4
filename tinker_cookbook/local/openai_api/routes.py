"""The routes of the OpenAI API: models, chat completions, responses and completions."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tinker_cookbook.dialects.responses import ResponseWriter, read_responses_request
from tinker_cookbook.local.openai_api.answers import Answer, ChatContext, WriterAnswer
from tinker_cookbook.local.openai_api.errors import describe_error
from tinker_cookbook.local.openai_api.planning import plan_chat, plan_completion
from tinker_cookbook.local.openai_api.requests import (
    ChatRequest,
    decode_chat_request,
    decode_completion_request,
)
from tinker_cookbook.local.openai_api.sampling import find_target
from tinker_cookbook.local.openai_api.serving import perform
from tinker_cookbook.local.service.protocol.failures import Failure
from tinker_cookbook.local.service.protocol.http import read_json
from tinker_cookbook.local.service.protocol.json_body import JsonObject

if TYPE_CHECKING:
    from tinker_cookbook.local.service.state.core import Service

__all__ = ["PREFIX", "ROUTES", "client_of", "model_names"]

PREFIX = "/oai/api/v1"
MAX_LISTED = 10_000


async def model_names(service: Service) -> list[tuple[str, int]]:
    """Return the names of all models and checkpoints, and when they were made."""
    started = int(service.started_at)
    names = [(name, started) for name in await service.engine.offered()]
    rows, _ = await asyncio.to_thread(service.store.index.checkpoints, limit=MAX_LISTED)
    return names + [
        (row.tinker_path, int(row.created_at)) for row in rows if row.segment == "sampler_weights"
    ]


async def list_models(service: Service, request: Request) -> Response:
    models = [_model(name, created) for name, created in await model_names(service)]
    return JSONResponse({"object": "list", "data": models})


async def get_model(service: Service, request: Request) -> Response:
    target = find_target(service, request.path_params["model"])
    return JSONResponse(_model(target.name, int(service.started_at)))


def _model(name: str, created: int) -> JsonObject:
    return {"id": name, "object": "model", "created": created, "owned_by": "tinker-cookbook"}


async def chat_completions(service: Service, request: Request) -> Response:
    body = await read_json(request, service.limits.max_json_bytes)
    chat = await body.decode(decode_chat_request, body.values)
    client = client_of(request, body.values)
    return await perform(
        service, request, chat.sampling, lambda t: plan_chat(service, chat, t), client
    )


async def responses(service: Service, request: Request) -> Response:
    body = await read_json(request, service.limits.max_json_bytes)
    chat = await body.decode(decode_responses_request, body.values)
    client = client_of(request, body.values)

    def answer(context: ChatContext) -> Answer:
        writer = ResponseWriter(context.model, body.values)
        return WriterAnswer(writer, context, failure=_failed_response)

    return await perform(
        service, request, chat.sampling, lambda t: plan_chat(service, chat, t, answer), client
    )


def decode_responses_request(values: JsonObject) -> ChatRequest:
    """Read a request of the Responses API.

    Raises:
        UserError: the message names the field and the value.
    """
    return decode_chat_request(read_responses_request(values))


def _failed_response(failure: Failure) -> JsonObject:
    error = describe_error(failure)
    return {"type": "error", "code": error["code"] or error["type"], **error}


async def completions(service: Service, request: Request) -> Response:
    body = await read_json(request, service.limits.max_json_bytes)
    asked = await body.decode(decode_completion_request, body.values)
    client = client_of(request, body.values)
    return await perform(
        service, request, asked.sampling, lambda t: plan_completion(service, asked, t), client
    )


def client_of(request: Request, values: JsonObject) -> str:
    """Return whose request it is, to share the engine fairly: its `user`, or else its address."""
    user = values.get("user")
    if isinstance(user, str) and user:
        return f"user:{user[:200]}"
    return f"address:{request.client.host if request.client is not None else ''}"


ROUTES = [
    ("GET", "/models", list_models),
    ("GET", "/models/{model:path}", get_model),
    ("POST", "/chat/completions", chat_completions),
    ("POST", "/responses", responses),
    ("POST", "/completions", completions),
]
