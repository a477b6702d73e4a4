"""Routes for the operator of the service: dashboard, status, metrics."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import re
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from tinker_cookbook.local.engine.memory import available_bytes
from tinker_cookbook.local.errors import ForbiddenError, NotFoundError
from tinker_cookbook.local.limits import Range
from tinker_cookbook.local.service.protocol.bodies import ExchangeTicket
from tinker_cookbook.local.service.protocol.http import query_integer, read_request
from tinker_cookbook.local.service.routes.metrics_page import (
    CONTENT_TYPE,
    VERSION,
    render_metrics,
)
from tinker_cookbook.local.service.routes.rest_objects import render_checkpoint, render_time
from tinker_cookbook.local.service.state.core import Service
from tinker_cookbook.local.service.storage.loss_curves import COLUMNS, losses_agree
from tinker_cookbook.local.service.storage.rows import CheckpointRow, RunRow
from tinker_cookbook.local.service.storage.run_facts import Origin
from tinker_cookbook.utils.page_parts import fill_page
from tinker_cookbook.utils.session_naming import RUN_NAME_METADATA_KEY

__all__ = ["PATHS_WITHOUT_KEY", "ROUTES", "STATUS_PATHS"]

PAGE, TICKET = "/", "/dashboard/token"
STATUS, METRICS = "/api/v1/local/status", "/metrics"
CURVE = "/api/v1/local/curves/{run_id}"
PATHS_WITHOUT_KEY = (PAGE, TICKET)
STATUS_PATHS = (STATUS, METRICS)
LIMITS = Range(0, 500)
MAX_TICKET_BYTES = 1024


async def page(service: Service, request: Request) -> Response:
    """Return the dashboard. It has no secrets: its script asks for the key and fetches the data."""
    text, policy = _page()
    return HTMLResponse(
        text, headers={"content-security-policy": policy, "cache-control": "no-cache"}
    )


@cache
def _page() -> tuple[str, str]:
    """Return the page and its policy: it may run its own script and talk only to this service."""
    text = fill_page(Path(__file__).with_name("dashboard.html").read_text(encoding="utf-8"))
    script = _hash_of(text, "script")
    style = _hash_of(text, "style")
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _hash_of(text: str, tag: str) -> str:
    found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    assert found is not None, f"the page has one <{tag}>"
    digest = hashlib.sha256(found[1].encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


async def exchange_ticket(service: Service, request: Request) -> Response:
    """Exchange the ticket in the link that `serve` prints for a token."""
    asked = await read_request(request, ExchangeTicket, MAX_TICKET_BYTES)
    if not service.auth.tickets.take(asked.ticket):
        raise ForbiddenError("ticket was used or has expired; sign in with the service's key")
    return JSONResponse({"token": service.auth.make_token()})


async def metrics(service: Service, request: Request) -> Response:
    return Response(render_metrics(service), headers={"content-type": CONTENT_TYPE})


async def status(service: Service, request: Request) -> Response:
    limit = query_integer(request, "limit", 100, LIMITS)
    return JSONResponse(await asyncio.to_thread(_describe, service, limit))


def _describe(service: Service, limit: int) -> dict[str, object]:
    """Return everything that `tinker-cookbook status` and the dashboard show."""
    index = service.store.index
    runs, num_runs = index.runs(limit=limit, offset=0, project_id=None)
    checkpoints, num_checkpoints = index.checkpoints(limit=limit)
    engine = service.engine_stats()
    return {
        "version": VERSION,
        "pid": os.getpid(),
        "state_dir": str(service.settings.state_dir),
        "started": render_time(service.started_at),
        "uptime_seconds": time.time() - service.started_at,
        "is_stopping": service.is_draining,
        "models": _describe_models(service),
        "queue": {
            "operations": engine.get("queued_operations", 0.0),
            "unfinished": service.futures.stats()["futures_unfinished"],
            "sampling_running": engine.get("running_sequences", 0.0),
            "sampling_waiting": engine.get("waiting_requests", 0.0),
        },
        "totals": {
            "optimizer_steps": service.progress.num_steps,
            "trained_tokens": service.progress.num_trained_tokens,
            "sampled_tokens": engine.get("sampled_tokens", 0.0),
            "sampled_tokens_per_second": engine.get("sampled_tokens_per_second", 0.0),
        },
        "memory": {
            "resident_bytes": service.resident_bytes(),
            "available_bytes": available_bytes(),
            "kv_cache_bytes": engine.get("kv_cache_bytes", 0.0),
        },
        "num_sessions": len(service.sessions),
        "num_samplers": len(service.samplers),
        "num_runs": num_runs,
        "num_checkpoints": num_checkpoints,
        "runs": _describe_runs(service, runs),
        "checkpoints": [_describe_checkpoint(row) for row in checkpoints],
    }


def _describe_models(service: Service) -> list[dict[str, object]]:
    """Return the models that the owner named, and the models from folders that are in use."""
    loaded = service.engine.loaded_models()
    names = dict.fromkeys([*service.engine.models, *loaded])
    return [
        {
            "name": name,
            "is_loaded": name in loaded,
            "dtype": loaded[name].dtype if name in loaded else None,
            "base_format": loaded[name].base_format if name in loaded else None,
            "device": loaded[name].device if name in loaded else None,
        }
        for name in names
    ]


@dataclass
class _RunView:
    """A run as the dashboard shows it."""

    run_id: str
    name: str | None
    base_model: str
    lora_rank: int
    is_live: bool
    is_busy: bool
    loss_fn: str | None
    num_steps: int
    first_step: int
    origin: Origin | None
    continued_by: str | None
    """Id of the newer run that was resumed from this one after its end."""
    created: str
    last_request: str


def _describe_runs(service: Service, rows: list[RunRow]) -> list[dict[str, object]]:
    described = [_describe_run(service, row) for row in rows]
    _join_parts(described)
    return [asdict(run) for run in described]


def _describe_run(service: Service, row: RunRow) -> _RunView:
    live = service.runs.get(row.run_id)
    facts = service.progress.facts(row.run_id)
    last_request_at = row.last_request_at if live is None else live.last_request_at
    return _RunView(
        run_id=row.run_id,
        name=_name_of(service, row),
        base_model=row.base_model,
        lora_rank=row.lora["rank"],
        is_live=live is not None,
        is_busy=live is not None and live.num_running > 0,
        loss_fn=facts.loss_fn,
        num_steps=facts.num_steps,
        first_step=facts.first_step,
        origin=facts.origin,
        continued_by=None,
        created=render_time(row.created_at),
        last_request=render_time(last_request_at),
    )


def _name_of(service: Service, row: RunRow) -> str | None:
    """Return the name of the session, or else the name that the client gave the run."""
    session = service.store.index.session(row.session_id)
    if session is not None and session.display_name:
        return session.display_name
    name = (row.user_metadata or {}).get(RUN_NAME_METADATA_KEY)
    return name if isinstance(name, str) else None


def _join_parts(described: list[_RunView]) -> None:
    """Set `continued_by` of each run that a newer one continues.

    Args:
        described: runs, newest first.
    """
    by_id = {run.run_id: run for run in described}
    for run in described:
        origin = run.origin
        earlier = by_id.get(origin.run_id) if origin is not None and origin.is_resumed else None
        if (
            earlier is not None
            and earlier.continued_by is None
            and earlier.last_request <= run.created
            and losses_agree(earlier.loss_fn, run.loss_fn)
        ):
            earlier.continued_by = run.run_id


def _describe_checkpoint(row: CheckpointRow) -> dict[str, object]:
    return render_checkpoint(row) | {"run_id": row.run_id}


async def curve(service: Service, request: Request) -> Response:
    run_id = request.path_params["run_id"]
    if service.store.index.run(run_id) is None:
        raise NotFoundError(f"run {run_id[:200]!r} does not exist")
    points = await asyncio.to_thread(service.progress.curve, run_id)
    return JSONResponse({"columns": COLUMNS, "points": points})


ROUTES = [
    ("GET", PAGE, page),
    ("POST", TICKET, exchange_ticket),
    ("GET", METRICS, metrics),
    ("GET", STATUS, status),
    ("GET", CURVE, curve),
]
