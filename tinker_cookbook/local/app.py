"""The ASGI application: which path goes where, who may call it, how errors are answered."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from tinker_cookbook.local.errors import ShuttingDownError, StorageError, UserError
from tinker_cookbook.local.openai_api import routes as openai_routes
from tinker_cookbook.local.openai_api.errors import openai_error_response
from tinker_cookbook.local.service.protocol.host_guard import HostGuard
from tinker_cookbook.local.service.protocol.http import HttpError, as_http_error, error_response
from tinker_cookbook.local.service.protocol.request_ids import begin_request
from tinker_cookbook.local.service.routes import futures as routes_futures
from tinker_cookbook.local.service.routes import losses as routes_losses
from tinker_cookbook.local.service.routes import operating as routes_operating
from tinker_cookbook.local.service.routes import rest as routes_rest
from tinker_cookbook.local.service.routes import sampling as routes_sampling
from tinker_cookbook.local.service.routes import sessions as routes_service
from tinker_cookbook.local.service.routes import training as routes_training
from tinker_cookbook.local.service.routes import weights as routes_weights
from tinker_cookbook.local.service.state.core import Service

__all__ = ["build_app"]

logger = logging.getLogger(__name__)

Handler = Callable[[Service, Request], Awaitable[Response]]
ErrorRenderer = Callable[[int, str, Mapping[str, str] | None], Response]

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
HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


@dataclass(frozen=True)
class _Endpoint:
    """One route and how its errors look."""

    service: Service
    path: str
    handler: Handler
    render_error: ErrorRenderer

    async def __call__(self, request: Request) -> Response:
        began = time.monotonic()
        request_id = begin_request(request.headers.get("x-request-id"))
        if self._is_allowed(request):
            response = await self._answer(request, request_id)
        else:
            response = self.render_error(
                401,
                "the key of this service is missing or wrong; set TINKER_API_KEY, or send it in "
                "the header X-API-Key or as a bearer token",
                {"www-authenticate": 'Tinker error="invalid_token"'},
            )
        response.headers["x-request-id"] = request_id
        for name, value in HEADERS.items():
            response.headers[name] = value
        self._record(request.method, response.status_code, time.monotonic() - began)
        return response

    def _is_allowed(self, request: Request) -> bool:
        if self.path in PATHS_WITHOUT_KEY:
            return True
        credential = _credential(request)
        if self.service.auth.accepts(credential):
            return True
        is_status = self.path in routes_operating.STATUS_PATHS
        return is_status and self.service.auth.accepts_status(credential)

    async def _answer(self, request: Request, request_id: str) -> Response:
        try:
            return await self.handler(self.service, request)
        except HttpError as error:
            return self.render_error(error.status, error.detail, error.headers)
        except (UserError, ShuttingDownError) as error:
            answer = as_http_error(error)
            return self.render_error(answer.status, answer.detail, answer.headers)
        except ClientDisconnect:
            return self.render_error(400, "the client went away", None)
        except StorageError as error:
            # with a 5xx the SDK would try again for minutes instead of telling its user
            logger.error("%s %s failed: %s", request.method, request.url.path, error)
            return self.render_error(400, str(error), None)
        except Exception as error:
            where = request.method, request.url.path, request_id
            logger.exception("%s %s failed (request %s)", *where)
            message = f"{type(error).__name__}: {error} (request {request_id})"
            return self.render_error(500, message, None)

    def _record(self, method: str, status: int, seconds: float) -> None:
        path = self.path.removeprefix(PREFIX)
        self.service.metrics.count_request(method, self.path, status, seconds)
        milliseconds = round(seconds * 1e3, 1)
        fields = {"method": method, "path": path, "status": status, "milliseconds": milliseconds}
        logger.info(
            *("%s %s %d %.1fms", method, path, status, milliseconds), extra={"fields": fields}
        )


def build_app(service: Service) -> ASGIApp:
    """Make the application of a service."""
    routes = [
        *_routes(service, PREFIX, ROUTES, error_response),
        *_routes(service, openai_routes.PREFIX, openai_routes.ROUTES, openai_error_response),
        *_routes(service, "", routes_operating.ROUTES, error_response),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _answer_unrouted})
    settings = service.settings
    return HostGuard(app, listens_on=settings.host, allowed=settings.allowed_hosts)


def _routes(
    service: Service,
    prefix: str,
    table: Sequence[tuple[str, str, Handler]],
    render_error: ErrorRenderer,
) -> list[Route]:
    return [
        Route(
            prefix + path,
            _endpoint_function(_Endpoint(service, prefix + path, handler, render_error)),
            methods=[method],
        )
        for method, path, handler in table
    ]


def _endpoint_function(endpoint: _Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """Starlette takes a function for an endpoint of (request) and any other object for an app."""

    async def answer(request: Request) -> Response:
        return await endpoint(request)

    return answer


def _credential(request: Request) -> str | None:
    """The key as Tinker's clients send it, or as a bearer token."""
    key = request.headers.get("x-api-key")
    if key:
        return key
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


async def _answer_unrouted(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException), error
    detail = f"{request.method} {request.url.path[:200]}: {error.detail}"
    is_openai = request.url.path.startswith(openai_routes.PREFIX)
    render = openai_error_response if is_openai else error_response
    return render(error.status_code, detail, error.headers)
