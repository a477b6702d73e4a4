"""The recording endpoint: an HTTP server at which each rollout has its own address and key.

    async with RecordingEndpoint(log=CallLog("calls.jsonl")) as endpoint:
        rollout = endpoint.open(ClientSampler(sampling_client), renderer)
        client = openai.AsyncOpenAI(
            base_url=rollout.address.base_url, api_key=rollout.address.api_key
        )
        ...
        endpoint.close(rollout)

A reply is sent after its record is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

from tinker_cookbook.capture import chat
from tinker_cookbook.capture.apis import APIS, CHAT, MESSAGES, Api
from tinker_cookbook.capture.rollout import (
    Address,
    CallLimits,
    CallRefusedError,
    Reply,
    Rollout,
    new_key,
)
from tinker_cookbook.capture.samplers import Sampler
from tinker_cookbook.capture.store import CallStore
from tinker_cookbook.dialects.anthropic import read_messages_request
from tinker_cookbook.dialects.pieces import Ending, Piece, ReplyWriter
from tinker_cookbook.exceptions import ConfigurationError, DataError, RendererError

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from tinker_cookbook.renderers.base import Renderer

__all__ = [
    "RecordingEndpoint",
    "error_response",
    "event_stream",
    "key_of",
    "make_server",
    "read_request",
]

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 32 * 2**20
MAX_ROLLOUTS = 4096
MAX_CALLS_AT_ONCE = 1024
"""Calls above this number wait before their bodies are read."""
BACKLOG = 2048
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


class _GoneError(Exception):
    """The client closed its connection."""


class RecordingEndpoint:
    """Serves agents in the APIs of `apis` and records what was sampled."""

    def __init__(
        self, *, log: CallStore | None = None, host: str = "127.0.0.1", port: int = 0
    ) -> None:
        """Set where to listen; `async with` starts and stops the server.

        Args:
            log: Where calls are recorded, in addition to `Rollout.calls`.
            host: The address to listen on. Every rollout has a secret key, but the connection is
                not encrypted.
            port: The port; 0: any free one.
        """
        self._log = log
        self._host = host
        self._port = port
        self._rollouts: dict[str, Rollout] = {}
        self._slots = asyncio.Semaphore(MAX_CALLS_AT_ONCE)
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """The address of the server, without a path."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    async def __aenter__(self) -> RecordingEndpoint:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start to listen, in the running event loop.

        Raises:
            ConfigurationError: the packages for a server are missing, or the port is in use.
        """
        app = self.app()
        try:
            listener = socket.create_server(
                (self._host, self._port),
                family=socket.AF_INET6 if ":" in self._host else socket.AF_INET,
                backlog=BACKLOG,
            )
        except OSError as error:
            raise ConfigurationError(
                f"port={self._port} of host={self._host} cannot be used ({error}); use a free "
                "port, or 0 for any."
            ) from error
        self._port = listener.getsockname()[1]
        self._server = make_server(app)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Close all rollouts and stop the server."""
        for rollout in list(self._rollouts.values()):
            self.close(rollout)
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving

    def open(
        self,
        sampler: Sampler,
        renderer: Renderer,
        *,
        name: str | None = None,
        model: str = "policy",
        limits: CallLimits | None = None,
        free_tool_choice: bool = False,
    ) -> Rollout:
        """Return a new rollout, which has its own address and key.

        Args:
            sampler: Samples the replies.
            renderer: The chat format.
            name: A name for records, which is part of the address; None: a random one.
            model: The model's name for the agent. Requests may name any model.
            limits: Limits on the calls.
            free_tool_choice: Accept requests that force a tool call and sample as for `auto`, so
                the model may reply without a call. Otherwise they are refused.

        Raises:
            ConfigurationError: the name is malformed or in use, or too many rollouts are open.
        """
        name = secrets.token_hex(8) if name is None else name
        if not _NAME.fullmatch(name) or name in self._rollouts:
            raise ConfigurationError(
                f"name={name!r} is in use or malformed; use up to 200 letters, digits, '.', '_' "
                "and '-', different for each open rollout."
            )
        if len(self._rollouts) >= MAX_ROLLOUTS:
            raise ConfigurationError(
                f"{MAX_ROLLOUTS} rollouts are open, which is the maximum; close finished ones."
            )
        address = Address(f"{self.url}/rollout/{name}/v1", new_key(), model)
        rollout = Rollout(
            sampler, renderer, address, name=name, limits=limits or CallLimits(), log=self._log
        )
        rollout.free_tool_choice = free_tool_choice
        self._rollouts[name] = rollout
        return rollout

    def close(self, rollout: Rollout) -> None:
        """Close a rollout. Its calls stay in `rollout.calls`; the endpoint drops the rest."""
        rollout.close()
        self._rollouts.pop(rollout.name, None)

    def app(self) -> Starlette:
        """Return the ASGI application, for a server of yours.

        Raises:
            ConfigurationError: the packages for a server are missing.
        """
        try:
            from starlette.applications import Starlette
            from starlette.routing import Route
        except ImportError as error:
            raise _missing_packages(error) from error
        prefix = "/rollout/{name}/v1"
        count = f"{prefix}{MESSAGES.path}/count_tokens"
        return Starlette(
            routes=[
                Route(f"{prefix}/models", self._models),
                Route(count, self._count_tokens, methods=["POST"]),
                *(Route(prefix + a.path, self._handler(a), methods=["POST"]) for a in APIS),
            ]
        )

    # ---- requests ----

    async def _models(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        rollout = self._find(request, CHAT)
        if not isinstance(rollout, Rollout):
            return rollout
        shown = {"id": rollout.address.model, "object": "model", "created": 0, "owned_by": "run"}
        return JSONResponse({"object": "list", "data": [shown]})

    def _handler(self, api: Api) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            rollout = self._find(request, api)
            if not isinstance(rollout, Rollout):
                return rollout
            async with self._slots:
                return await self._answer(request, rollout, api)

        return handle

    async def _answer(self, request: Request, rollout: Rollout, api: Api) -> Response:
        """Complete a call, or return its error."""
        try:
            return await self._complete(request, rollout, api)
        except _GoneError:
            problem = (499, "client_closed_request", "the client closed the connection.")
        except asyncio.CancelledError:
            if not rollout.is_closed:
                raise
            problem = (410, "closed", f"rollout {rollout.name} is closed.")
        except CallRefusedError as error:
            # the code that clients know for prompts that are too long
            overflow = error.reason == "context_overflow"
            problem = (400, "context_length_exceeded" if overflow else error.reason, str(error))
        except (DataError, RendererError) as error:
            problem = (400, "invalid_request", str(error))
        except Exception as error:
            logger.warning("a call of rollout %s failed: %s", rollout.name, error)
            problem = (500, "sampling_failed", str(error) or type(error).__name__)
        return error_response(api, *problem)

    async def _complete(self, request: Request, rollout: Rollout, api: Api) -> Response:
        from starlette.responses import JSONResponse

        body, asked = await read_request(request, api, free_tool_choice=rollout.free_tool_choice)
        task = rollout.start(asked.messages, asked.tools, asked.stops, asked.wishes)
        reply = await _unless_gone(request, task)
        pieces, ending = chat.reply_pieces(reply, asked, rollout.renderer)
        writer = api.new_writer(body, f"{rollout.name}-{reply.call.index}")
        if asked.stream:
            return event_stream(api, writer, pieces, ending)
        return JSONResponse(writer.whole(pieces, ending))

    async def _count_tokens(self, request: Request) -> Response:
        """Count the tokens of a prompt, as Anthropic's API does; this is not recorded."""
        from starlette.responses import JSONResponse

        rollout = self._find(request, MESSAGES)
        if not isinstance(rollout, Rollout):
            return rollout
        try:
            body = chat.read_body(await _read_body(request))
            asked = chat.read_chat_request(read_messages_request(body, counts_only=True))
            tokens = await rollout.render(asked.messages, asked.tools)
        except (DataError, RendererError) as error:
            return error_response(MESSAGES, 400, "invalid_request", str(error))
        return JSONResponse({"input_tokens": len(tokens)})

    def _find(self, request: Request, api: Api) -> Rollout | Response:
        """Return the rollout that a request names and has the key of, or the error to answer."""
        name = request.path_params["name"]
        rollout = self._rollouts.get(name)
        if rollout is None:
            return error_response(
                api, 404, "unknown_rollout", f"rollout {name} is unknown or closed."
            )
        key = key_of(request)
        if not secrets.compare_digest(key.encode(), rollout.address.api_key.encode()):
            text = (
                "the API key does not belong to this rollout; send its key as a bearer token or "
                "in the header X-API-Key."
            )
            return error_response(api, 401, "invalid_api_key", text)
        return rollout


async def _unless_gone(request: Request, task: asyncio.Task[Reply]) -> Reply:
    """Await a call, and cancel it if the client disconnects."""
    gone = asyncio.create_task(_wait_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _GoneError
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read_body(request: Request) -> bytes:
    from starlette.requests import ClientDisconnect

    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY_BYTES:
                raise DataError(f"the body has more than {MAX_BODY_BYTES} bytes; send less.")
    except ClientDisconnect as error:
        raise _GoneError from error
    return bytes(body)


async def read_request(
    request: Request, api: Api, *, free_tool_choice: bool = False
) -> tuple[dict[str, Any], chat.ChatRequest]:
    """Return the body of a request, and the call that it asks for.

    Raises:
        DataError: the body is too large, or the request cannot be read.
    """
    body = chat.read_body(await _read_body(request))
    return body, chat.read_chat_request(api.read(body), free_tool_choice=free_tool_choice)


def event_stream(api: Api, writer: ReplyWriter, pieces: list[Piece], ending: Ending) -> Response:
    """Return a complete reply as a stream."""
    from starlette.responses import StreamingResponse

    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(
        _events(api, writer, pieces, ending), headers=headers, media_type="text/event-stream"
    )


async def _events(
    api: Api, writer: ReplyWriter, pieces: list[Piece], ending: Ending
) -> AsyncIterator[bytes]:
    """Yield the events of a stream. The reply is complete and recorded before the first one."""
    for event in writer.opening(ending.prompt_tokens):
        yield api.frame(event)
    for piece in pieces:
        for event in writer.take(piece):
            yield api.frame(event)
    for event in writer.closing(ending):
        yield api.frame(event)
    if api.last_frame:
        yield api.last_frame


def key_of(request: Request) -> str:
    """Return the key as OpenAI's clients send it, or as Anthropic's do."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return request.headers.get("x-api-key", "")


def error_response(api: Api, status: int, code: str, message: str) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(api.error(status, code, message), status_code=status)


def _missing_packages(error: ImportError) -> ConfigurationError:
    return ConfigurationError(
        f"the recording endpoint needs the package {error.name}; run pip install "
        "'tinker-cookbook[local]', which contains it."
    )


def make_server(app: Starlette, **options: Any) -> uvicorn.Server:
    """Return a server that leaves signals to the program."""
    try:
        import uvicorn
    except ImportError as error:
        raise _missing_packages(error) from error

    class Server(uvicorn.Server):
        """uvicorn without its signal handlers, which belong to the program."""

        @contextlib.contextmanager
        def capture_signals(self):
            yield

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=5,
        **options,
    )
    return Server(config)
