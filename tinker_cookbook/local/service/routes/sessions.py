"""Routes about the service and its sessions: configuration, keys, models, start and end."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tinker_cookbook.local.errors import GoneError
from tinker_cookbook.local.service.protocol.bodies import (
    AssignProject,
    CreateSession,
    FinishSession,
    Heartbeat,
)
from tinker_cookbook.local.service.protocol.http import no_content, read_json, read_request
from tinker_cookbook.local.service.state.core import Service
from tinker_cookbook.local.service.storage.rows import Reason, Status

__all__ = ["ROUTES"]

CLIENT_CONFIG: dict[str, object] = {
    "pjwt_auth_enabled": True,  # whoami reads the token's claims
    "sample_dispatch_bytes_semaphore_size": 1_000_000_000,
    "inflight_response_bytes_semaphore_size": 1_000_000_000,
    # one call = one request = one packed batch
    "fwdbwd_max_chunk_len": 65_536,
    "fwdbwd_max_chunk_bytes_count": 1_000_000_000,
    "fwdbwd_dispatch_bytes_semaphore_size": 2_000_000_000,
    "parallel_fwdbwd_chunks": False,
    "proto_compress_fwdbwd": False,  # costs CPU that the engine needs
    "sample_join_sampling_session": True,
    "custom_loss_server_side": True,
    "create_model_via_load_weights": True,  # SDKs up to 0.35
}
DYNAMIC_CONFIG = {"refresh_interval_sec": 3600, "sample_cancel_enabled": True}


async def health(service: Service, request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def client_config(service: Service, request: Request) -> Response:
    return JSONResponse(CLIENT_CONFIG)


async def dynamic_config(service: Service, request: Request) -> Response:
    return JSONResponse(DYNAMIC_CONFIG)


async def auth_token(service: Service, request: Request) -> Response:
    return JSONResponse({"jwt": service.auth.make_token()})


async def describe_key(service: Service, request: Request) -> Response:
    return JSONResponse(
        {
            "key_id": 1,
            "name": "local",
            "note": "the key of this local service",
            "details": {
                "org_details": {"name": "local"},
                "user_details": {"email": "local@localhost"},
            },
        }
    )


async def forget_key(service: Service, request: Request) -> Response:
    """Answer `tinker auth logout`: the client forgets the key; the service keeps its key."""
    return no_content()


async def capabilities(service: Service, request: Request) -> Response:
    models = []
    for name in await service.engine.offered():
        info = await service.engine.describe(name)
        models.append(
            {
                "model_name": name,
                "max_context_length": info.max_context_length,
                "trainable": True,
                "sampleable": True,
                "tokenizer_id": info.folder,
            }
        )
    return JSONResponse({"supported_models": models})


async def create_session(service: Service, request: Request) -> Response:
    service.require_open()
    asked = await read_request(request, CreateSession, service.limits.max_json_bytes)
    session = await service.sessions.create(
        display_name=asked.display_name,
        user_metadata=asked.user_metadata,
        tags=asked.tags,
        project_id=asked.project_id,
        sdk_version=asked.sdk_version,
    )
    return JSONResponse({"type": "create_session", "session_id": session.session_id})


async def heartbeat(service: Service, request: Request) -> Response:
    asked = await read_request(request, Heartbeat, service.limits.max_json_bytes)
    session = service.sessions.hear(asked.session_id)
    if not session.is_active:
        raise GoneError(f"session_id={session.session_id!r} has ended")
    return JSONResponse({"type": "session_heartbeat"})


async def telemetry(service: Service, request: Request) -> Response:
    """Accept and drop telemetry: this service collects none."""
    await read_json(request, service.limits.max_json_bytes)
    return JSONResponse({"status": "accepted"})


async def finish_session(service: Service, request: Request) -> Response:
    asked = await read_request(request, FinishSession, service.limits.max_json_bytes)
    session = service.sessions.get(request.path_params["session_id"])
    reason: Reason = {"type": asked.reason.type}
    status: Status = {"type": "client_finished", "reason": reason, "detail": asked.detail}
    await service.end_session(session, status)
    return no_content()


async def assign_project(service: Service, request: Request) -> Response:
    asked = await read_request(request, AssignProject, service.limits.max_json_bytes)
    await service.sessions.set_project(request.path_params["session_id"], asked.project_id)
    return no_content()


async def billing_events(service: Service, request: Request) -> Response:
    return JSONResponse({"data": [], "sessions": {}})


async def billing_storage(service: Service, request: Request) -> Response:
    return JSONResponse({"data": []})


async def audit(service: Service, request: Request) -> Response:
    return JSONResponse({"entries": []})


ROUTES = [
    ("GET", "/healthz", health),
    ("POST", "/client/config", client_config),
    ("POST", "/client/dynamic_config", dynamic_config),
    ("POST", "/auth/token", auth_token),
    ("GET", "/auth/apikey/me", describe_key),
    ("DELETE", "/auth/apikey/me", forget_key),
    ("GET", "/get_server_capabilities", capabilities),
    ("POST", "/create_session", create_session),
    ("POST", "/session_heartbeat", heartbeat),
    ("POST", "/telemetry", telemetry),
    ("POST", "/sessions/{session_id}/finish", finish_session),
    ("PUT", "/sessions/{session_id}/project", assign_project),
    ("GET", "/billing/usage/events", billing_events),
    ("GET", "/billing/usage/checkpoints/current", billing_storage),
    ("GET", "/audit", audit),
]
