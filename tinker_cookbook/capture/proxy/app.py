"""An application that serves one model to many agents; the address of a call becomes its scope.

The proxy keeps nothing itself: with `instrument_tinker`, every sample that it draws is recorded in
that scope. `RecordingEndpoint` is the endpoint for training, which keeps whole conversations.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tinker_cookbook.capture import chat
from tinker_cookbook.capture.apis import APIS, CHAT, Api
from tinker_cookbook.capture.calls import RecordedCall
from tinker_cookbook.capture.endpoint import error_response, event_stream, key_of, read_request
from tinker_cookbook.capture.proxy.address import parse_address
from tinker_cookbook.capture.rollout import Reply, stop_condition
from tinker_cookbook.capture.samplers import ClientSampler
from tinker_cookbook.capture.scope import replace_scope
from tinker_cookbook.exceptions import DataError, RendererError, TinkerCookbookError

if TYPE_CHECKING:
    import tinker
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from tinker_cookbook.renderers.base import Renderer

__all__ = [
    "ProxyDeps",
    "SampleResponseLike",
    "SampledSequenceLike",
    "SamplingClientLike",
    "make_app",
]


class SampledSequenceLike(Protocol):
    """A sampled sequence, as the SDK returns it."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def stop_reason(self) -> str | None: ...


class SampleResponseLike(Protocol):
    """A response to a sampling request, as the SDK returns it."""

    @property
    def sequences(self) -> Sequence[SampledSequenceLike]: ...


class SamplingClientLike(Protocol):
    """What the proxy uses of a sampling client."""

    def sample(
        self, prompt: tinker.ModelInput, num_samples: int, sampling_params: tinker.SamplingParams
    ) -> Awaitable[SampleResponseLike]: ...


@dataclass
class ProxyDeps:
    """What the proxy serves."""

    renderer: Renderer
    sampling_client: SamplingClientLike
    model_label: str
    """The model's name for agents. Requests may name any model."""
    default_max_tokens: int = 1024
    """Maximum tokens of a reply whose request does not name a limit."""


def make_app(deps: ProxyDeps, *, auth_token: str | None = None) -> Starlette:
    """Return the application.

    Args:
        deps: What it serves.
        auth_token: The key that every request must have; None: no key is needed.
    """
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def models(request: Request) -> Response:
        if not _is_allowed(request, auth_token):
            return error_response(CHAT, 401, "invalid_api_key", _WRONG_KEY)
        shown = {"id": deps.model_label, "object": "model", "created": 0, "owned_by": "proxy"}
        return JSONResponse({"object": "list", "data": [shown]})

    def handler(api: Api) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            if not _is_allowed(request, auth_token):
                return error_response(api, 401, "invalid_api_key", _WRONG_KEY)
            try:
                with replace_scope(parse_address(request.url.path)):
                    return await _answer(request, deps, api)
            except (DataError, RendererError) as error:
                return error_response(api, 400, "invalid_request", str(error))
            except TinkerCookbookError as error:
                return error_response(api, 500, "sampling_failed", str(error))

        return handle

    address = "{address:path}/v1"
    return Starlette(
        routes=[
            *(Route(f"/{address}{a.path}", handler(a), methods=["POST"]) for a in APIS),
            *(Route(f"/v1{a.path}", handler(a), methods=["POST"]) for a in APIS),
            Route(f"/{address}/models", models),
            Route("/v1/models", models),
        ]
    )


_WRONG_KEY = "the API key is missing or wrong; send it as a bearer token or in X-API-Key."


def _is_allowed(request: Request, auth_token: str | None) -> bool:
    return auth_token is None or secrets.compare_digest(
        key_of(request).encode(), auth_token.encode()
    )


async def _answer(request: Request, deps: ProxyDeps, api: Api) -> Response:
    from starlette.responses import JSONResponse

    body, asked = await read_request(request, api)
    renderer = deps.renderer
    prompt = renderer.build_generation_prompt(renderer.declare_tools(asked.messages, asked.tools))
    # the proxy needs less of a client than the SDK's has
    sampler = ClientSampler(deps.sampling_client, deps.default_max_tokens)  # pyright: ignore[reportArgumentType]
    sampled = await sampler(prompt, stop_condition(renderer, asked.stops), asked.wishes)
    message = renderer.fit_tool_calls(renderer.parse_response(sampled.tokens)[0], asked.tools)
    call = RecordedCall(
        *("", 0, None, [], sampled.tokens, sampled.maybe_logprobs or [], sampled.stop_reason)
    )
    pieces, ending = chat.reply_pieces(Reply(call, message, prompt.length), asked, renderer)
    writer = api.new_writer(body, secrets.token_hex(12))
    if asked.stream:
        return event_stream(api, writer, pieces, ending)
    return JSONResponse(writer.whole(pieces, ending))
