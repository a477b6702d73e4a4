"""The ASGI application: which path goes to which function, and what happens around each request."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinker_cookbook.local.errors import StorageError, UnauthorizedError
from tinker_cookbook.local.openai_api import anthropic_routes
from tinker_cookbook.local.openai_api import routes as openai_routes
from tinker_cookbook.local.openai_api.anthropic_routes import render_anthropic_failure
from tinker_cookbook.local.openai_api.errors import render_openai_failure
from tinker_cookbook.local.service.protocol.auth import Authenticator
from tinker_cookbook.local.service.protocol.failures import (
    Failure,
    describe_failure,
    render_failure,
)
from tinker_cookbook.local.service.protocol.host_guard import HostGuard
from tinker_cookbook.local.service.protocol.request_ids import begin_request, current_request_id
from tinker_cookbook.local.service.routes import futures as routes_futures
from tinker_cookbook.local.service.routes import losses as routes_losses
from tinker_cookbook.local.service.routes import operating as routes_operating
from tinker_cookbook.local.service.routes import rest as routes_rest
from tinker_cookbook.local.service.routes import sampling as routes_sampling
from tinker_cookbook.local.service.routes import sessions as routes_service
from tinker_cookbook.local.service.routes import training as routes_training
from tinker_cookbook.local.service.routes import weights as routes_weights
from tinker_cookbook.local.service.state.core import Service
from tinker_cookbook.local.service.state.service_metrics import Metrics

__all__ = ["build_app"]

logger = logging.getLogger(__name__)

Handler = Callable[[Service, Request], Awaitable[Response]]
FailureRenderer = Callable[[Failure], Response]

PREFIX = "/api/v1"
ROUTES: list[tuple[str, str, Handler]] = [
    *routes_service.ROUTES,
    *routes_training.ROUTES,
    *routes_losses.ROUTES,
    *routes_weights.ROUTES,
    *routes_sampling.ROUTES,
    *routes_futures.ROUTES,
    *routes_rest.ROUTES,
]
PATHS_WITHOUT_KEY = (
    f"{PREFIX}/healthz",
    f"{PREFIX}/download/{{token}}/{{file}}",
    *routes_operating.PATHS_WITHOUT_KEY,
)


def build_app(service: Service) -> ASGIApp:
    """Build the application of a service."""
    routes = [
        *_routes(service, PREFIX, ROUTES, render_failure),
        *_routes(service, openai_routes.PREFIX, openai_routes.ROUTES, render_openai_failure),
        *_routes(
            service, anthropic_routes.PREFIX, anthropic_routes.ROUTES, render_anthropic_failure
        ),
        *_routes(service, "", routes_operating.ROUTES, render_failure),
    ]
    settings = service.settings
    guard = Middleware(HostGuard, listens_on=settings.host, allowed=settings.allowed_hosts)
    return Starlette(
        routes=routes, middleware=[guard], exception_handlers={HTTPException: _answer_unrouted}
    )


def _routes(
    service: Service,
    prefix: str,
    table: Sequence[tuple[str, str, Handler]],
    render: FailureRenderer,
) -> list[Route]:
    return [
        Route(
            prefix + path,
            partial(handler, service),
            methods=[method],
            middleware=_middleware(service, prefix + path, render),
        )
        for method, path, handler in table
    ]


def _middleware(service: Service, path: str, render: FailureRenderer) -> list[Middleware]:
    """Return what happens around the function of a route, the outermost first.

    Each layer belongs to a route, and not to the whole application, because it needs the route: its
    path without values for the metrics, whether it needs the key, and the form of its errors.
    """
    return [
        Middleware(RequestIdLayer),
        Middleware(HeaderLayer),
        Middleware(MetricsLayer, metrics=service.metrics, path=path),
        Middleware(ErrorLayer, render=render),
        Middleware(KeyLayer, auth=service.auth, path=path),
    ]


def _on_start(send: Send, react: Callable[[Message], None]) -> Send:
    """Return a `send` that calls `react` with the message that begins an answer."""

    async def send_message(message: Message) -> None:
        if message["type"] == "http.response.start":
            react(message)
        await send(message)

    return send_message


class RequestIdLayer:
    """Gives each request an id, which is in its answer and in the log lines of its work."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = begin_request(Headers(scope=scope).get("x-request-id"))

        def add_id(message: Message) -> None:
            MutableHeaders(scope=message)["x-request-id"] = request_id

        await self._app(scope, receive, _on_start(send, add_id))


class HeaderLayer:
    """Adds the headers that every answer has, for browsers."""

    headers = (("x-content-type-options", "nosniff"), ("referrer-policy", "no-referrer"))

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        def add_headers(message: Message) -> None:
            MutableHeaders(scope=message).update(dict(self.headers))

        await self._app(scope, receive, _on_start(send, add_headers))


class MetricsLayer:
    """Counts and logs each request when its answer begins."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, path: str) -> None:
        self._app = app
        self._metrics = metrics
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()

        def record(message: Message) -> None:
            self._record(scope["method"], message["status"], time.monotonic() - began)

        await self._app(scope, receive, _on_start(send, record))

    def _record(self, method: str, status: int, seconds: float) -> None:
        path = self._path.removeprefix(PREFIX)
        self._metrics.count_request(method, self._path, status, seconds)
        milliseconds = round(seconds * 1e3, 1)
        fields = {"method": method, "path": path, "status": status, "milliseconds": milliseconds}
        logger.info(
            *("%s %s %d %.1fms", method, path, status, milliseconds), extra={"fields": fields}
        )


class ErrorLayer:
    """Answers a request whose function raised an error, unless the answer has already begun."""

    def __init__(self, app: ASGIApp, *, render: FailureRenderer) -> None:
        self._app = app
        self._render = render

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started: list[Message] = []
        try:
            await self._app(scope, receive, _on_start(send, started.append))
        except Exception as error:
            if started:
                raise
            failure = describe_failure(error, current_request_id())
            where = (scope["method"], scope["path"], current_request_id())
            if failure.is_unexpected:
                logger.exception("%s %s failed (request %s)", *where)
            elif isinstance(error, StorageError):
                logger.error("%s %s failed (request %s): %s", *where, error)
            await self._render(failure)(scope, receive, send)


class KeyLayer:
    """Refuses requests without the service's key, except on the paths that need none."""

    def __init__(self, app: ASGIApp, *, auth: Authenticator, path: str) -> None:
        self._app = app
        self._auth = auth
        self._is_open = path in PATHS_WITHOUT_KEY
        self._takes_status_token = path in routes_operating.STATUS_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        credential = _credential(Headers(scope=scope))
        is_allowed = (
            self._is_open
            or self._auth.accepts(credential)
            or (self._takes_status_token and self._auth.accepts_status(credential))
        )
        if not is_allowed:
            raise UnauthorizedError(
                "the key of this service is missing or wrong; set TINKER_API_KEY, or send the key "
                "in the header X-API-Key or as a bearer token"
            )
        await self._app(scope, receive, send)


def _credential(headers: Headers) -> str | None:
    """Return the key as Tinker's clients send it, or the bearer token."""
    key = headers.get("x-api-key")
    if key:
        return key
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


async def _answer_unrouted(request: Request, error: Exception) -> Response:
    """Answer a request whose path or method has no route."""
    failure = describe_failure(error, current_request_id())
    detail = f"{request.method} {request.url.path[:200]}: {failure.detail}"
    render: FailureRenderer = render_failure
    if request.url.path.startswith(openai_routes.PREFIX):
        render = render_openai_failure
    elif request.url.path.startswith(anthropic_routes.PREFIX):
        render = render_anthropic_failure
    return render(Failure(failure.status, detail, failure.headers))
