"""Routes that list and search what the index holds."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.service.protocol.auth import OWNER
from tinker_cookbook.local.service.protocol.fields import Fields
from tinker_cookbook.local.service.protocol.http import HttpError, query_integer, read_fields
from tinker_cookbook.local.service.routes.rest_objects import (
    render_checkpoint,
    render_run,
    render_session_summary,
    render_time,
)
from tinker_cookbook.local.service.state.core import Service
from tinker_cookbook.local.service.storage.index import RunRow, SessionRow

__all__ = ["ROUTES"]

MAX_PAGE = 10_000
MAX_OFFSET = 2**31
SEARCH_BATCH = 200


def _page(request: Request, default_limit: int) -> tuple[int, int]:
    limit = query_integer(request, "limit", default_limit, minimum=0, maximum=MAX_PAGE)
    return limit, query_integer(request, "offset", 0, minimum=0, maximum=MAX_OFFSET)


def _run_json(service: Service, row: RunRow) -> dict[str, Any]:
    live = service.runs.get(row.run_id)
    if live is not None:
        row.last_request_at = max(row.last_request_at, live.last_request_at)
    checkpoints, _ = service.store.index.checkpoints(row.run_id)
    return render_run(row, checkpoints)


def _require_run(service: Service, run_id: str) -> RunRow:
    row = service.store.index.run(run_id)
    if row is None:
        raise HttpError(404, f"training run {run_id[:200]!r} does not exist")
    return row


async def list_runs(service: Service, request: Request) -> Response:
    limit, offset = _page(request, 20)
    project = request.query_params.get("project_id")

    def read() -> Response:
        rows, total = service.store.index.runs(limit=limit, offset=offset, project_id=project)
        return JSONResponse(
            {
                "training_runs": [_run_json(service, row) for row in rows],
                "cursor": {"offset": offset, "limit": limit, "total_count": total},
            }
        )

    return await asyncio.to_thread(read)


async def get_run(service: Service, request: Request) -> Response:
    run = _require_run(service, request.path_params["run_id"])
    return JSONResponse(await asyncio.to_thread(_run_json, service, run))


async def list_run_checkpoints(service: Service, request: Request) -> Response:
    run = _require_run(service, request.path_params["run_id"])

    def read() -> Response:
        rows, _ = service.store.index.checkpoints(run.run_id)
        return JSONResponse({"checkpoints": [render_checkpoint(row) for row in rows]})

    return await asyncio.to_thread(read)


async def list_checkpoints(service: Service, request: Request) -> Response:
    limit, offset = _page(request, 100)

    def read() -> Response:
        rows, total = service.store.index.checkpoints(limit=limit, offset=offset)
        return JSONResponse(
            {
                "checkpoints": [render_checkpoint(row) for row in rows],
                "cursor": {"offset": offset, "limit": limit, "total_count": total},
            }
        )

    return await asyncio.to_thread(read)


async def list_sessions(service: Service, request: Request) -> Response:
    limit, offset = _page(request, 20)
    index = service.store.index
    rows = await asyncio.to_thread(index.sessions, limit=limit, offset=offset)
    return JSONResponse({"sessions": [row.session_id for row in rows]})


async def get_session(service: Service, request: Request) -> Response:
    session = service.sessions.get(request.path_params["session_id"])
    index = service.store.index
    runs = index.runs_of_session(session.session_id)
    samplers = index.samplers_of_session(session.session_id)
    return JSONResponse(
        {
            "training_run_ids": [run.run_id for run in runs],
            "sampler_ids": [sampler.sampler_id for sampler in samplers],
            "user_metadata": session.row.user_metadata,
            "display_name": session.row.display_name,
        }
    )


async def search_sessions(service: Service, request: Request) -> Response:
    fields = await read_fields(request, service.limits.max_json_bytes)
    search = _SessionSearch(fields)
    limit = fields.integer("limit", 50, minimum=1, maximum=200)
    found = await asyncio.to_thread(search.run, service, limit + 1)
    page = found[:limit]
    answer: dict[str, Any] = {"sessions": [search.render(service, row) for row in page]}
    if len(found) > limit:
        last = page[-1]
        answer["next_cursor"] = {
            "last_created_at": render_time(last.created_at),
            "last_session_id": last.session_id,
        }
    return JSONResponse(answer)


class _SessionSearch:
    """One search: its filters, and the sessions that pass them, newest first."""

    def __init__(self, fields: Fields) -> None:
        self.session_id = fields.text("session_id", None)
        self.display_name = fields.text("display_name", None)
        self.project_ids = fields.texts("project_ids", None)
        self.user_metadata = fields.metadata("user_metadata") or {}
        self.owner = Fields(fields.object("owner", {"type": "own"}), prefix="owner.")
        self.owner_kind = self.owner.text("type", choices=("own", "accessible", "user"))
        self.statuses = self._read_statuses(fields.array("statuses", None))
        self.cursor = self._read_cursor(fields.object("cursor", None))

    @staticmethod
    def _read_statuses(values: list[Any] | None) -> list[tuple[str, list[str] | None]] | None:
        """Pairs of a status and the reasons that fit; None: any."""
        if values is None:
            return None
        queries = []
        for index, value in enumerate(values):
            if not isinstance(value, dict):
                raise UserError(f"statuses[{index}]={str(value)[:80]} is not an object")
            query = Fields(value, prefix=f"statuses[{index}].")
            queries.append((query.text("type"), query.texts("reasons", None)))
        return queries

    @staticmethod
    def _read_cursor(values: dict[str, Any] | None) -> tuple[float, str]:
        if values is None:
            return math.inf, ""
        cursor = Fields(values, prefix="cursor.")
        text = cursor.text("last_created_at")
        try:
            created_at = datetime.fromisoformat(text).timestamp()
        except (ValueError, OverflowError) as error:
            raise UserError(f"cursor.last_created_at={text[:40]!r} is not a time") from error
        return created_at, cursor.text("last_session_id")

    def run(self, service: Service, limit: int) -> list[SessionRow]:
        """At most `limit` sessions."""
        found: list[SessionRow] = []
        for row in self._candidates(service):
            if self._matches(row) and self._matches_status(service, row):
                found.append(row)
                if len(found) == limit:
                    break
        return found

    def _candidates(self, service: Service) -> Iterator[SessionRow]:
        position = self.cursor
        while batch := service.store.index.sessions_before(*position, limit=SEARCH_BATCH):
            yield from batch
            position = batch[-1].created_at, batch[-1].session_id

    def _matches(self, row: SessionRow) -> bool:
        metadata = row.user_metadata or {}
        return (
            self._matches_name(row)
            and self._matches_owner()
            and (self.project_ids is None or row.project_id in self.project_ids)
            and all(metadata.get(key) == value for key, value in self.user_metadata.items())
        )

    def _matches_status(self, service: Service, row: SessionRow) -> bool:
        if self.statuses is None:
            return True
        status = self.render(service, row)["status"]
        return any(_fits(status, kind, reasons) for kind, reasons in self.statuses)

    def _matches_name(self, row: SessionRow) -> bool:
        """The id or every word of the name; without either, any session."""
        if self.session_id is None and self.display_name is None:
            return True
        if self.session_id == row.session_id:
            return True
        if self.display_name is None or row.display_name is None:
            return False
        name = row.display_name.casefold()
        return all(word in name for word in self.display_name.casefold().split())

    def _matches_owner(self) -> bool:
        return self.owner_kind != "user" or OWNER in self.owner.texts("owner_urns", [])

    def render(self, service: Service, row: SessionRow) -> dict[str, Any]:
        """A SessionSummary."""
        seconds = service.limits.session_idle_seconds
        is_running = service.sessions.is_here(row.session_id) or (
            time.time() - row.last_seen_at < seconds
        )
        num_checkpoints, num_bytes = service.store.index.session_storage(row.session_id)
        return render_session_summary(
            row, is_running=is_running, num_checkpoints=num_checkpoints, num_bytes=num_bytes
        )


def _fits(status: dict[str, Any] | None, kind: str, reasons: list[str] | None) -> bool:
    if status is None or kind != status["type"]:
        return False
    return reasons is None or status.get("reason", {}).get("type") in reasons


ROUTES = [
    ("GET", "/training_runs", list_runs),
    ("GET", "/training_runs/{run_id}", get_run),
    ("GET", "/training_runs/{run_id}/checkpoints", list_run_checkpoints),
    ("GET", "/checkpoints", list_checkpoints),
    ("GET", "/sessions", list_sessions),
    ("POST", "/sessions/search", search_sessions),
    ("GET", "/sessions/{session_id}", get_session),
]
