"""Routes that list and search runs, checkpoints and sessions."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from datetime import datetime

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tinker_cookbook.local.errors import NotFoundError, UserError
from tinker_cookbook.local.limits import Range
from tinker_cookbook.local.service.protocol.auth import OWNER
from tinker_cookbook.local.service.protocol.bodies import (
    SearchCursor,
    SearchSessions,
    StatusQuery,
)
from tinker_cookbook.local.service.protocol.http import query_integer, read_request
from tinker_cookbook.local.service.routes.rest_objects import (
    render_checkpoint,
    render_run,
    render_session_summary,
    render_time,
)
from tinker_cookbook.local.service.state.core import Service
from tinker_cookbook.local.service.storage.rows import RunRow, SessionRow, Status

__all__ = ["ROUTES"]

LIMITS = Range(0, 10_000)
OFFSETS = Range(0, 2**31)
SEARCH_BATCH = 200


def _page(request: Request, default_limit: int) -> tuple[int, int]:
    limit = query_integer(request, "limit", default_limit, LIMITS)
    return limit, query_integer(request, "offset", 0, OFFSETS)


def _run_json(service: Service, row: RunRow) -> dict[str, object]:
    live = service.runs.get(row.run_id)
    if live is not None:
        row.last_request_at = max(row.last_request_at, live.last_request_at)
    checkpoints, _ = service.store.index.checkpoints(row.run_id)
    return render_run(row, checkpoints)


def _require_run(service: Service, run_id: str) -> RunRow:
    row = service.store.index.run(run_id)
    if row is None:
        raise NotFoundError(f"training run {run_id[:200]!r} does not exist")
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
    asked = await read_request(request, SearchSessions, service.limits.max_json_bytes)
    search = _SessionSearch(asked)
    limit = asked.limit
    found = await asyncio.to_thread(search.run, service, limit + 1)
    page = found[:limit]
    answer: dict[str, object] = {"sessions": [search.render(service, row) for row in page]}
    if len(found) > limit:
        last = page[-1]
        answer["next_cursor"] = {
            "last_created_at": render_time(last.created_at),
            "last_session_id": last.session_id,
        }
    return JSONResponse(answer)


class _SessionSearch:
    """One search: its filters, and the sessions that match them, newest first."""

    def __init__(self, asked: SearchSessions) -> None:
        self._asked = asked
        self._position = _read_cursor(asked.cursor)

    def run(self, service: Service, limit: int) -> list[SessionRow]:
        """Return at most `limit` sessions."""
        found: list[SessionRow] = []
        for row in self._candidates(service):
            if self._matches(row) and self._matches_status(service, row):
                found.append(row)
                if len(found) == limit:
                    break
        return found

    def _candidates(self, service: Service) -> Iterator[SessionRow]:
        position = self._position
        while batch := service.store.index.sessions_before(*position, limit=SEARCH_BATCH):
            yield from batch
            position = batch[-1].created_at, batch[-1].session_id

    def _matches(self, row: SessionRow) -> bool:
        asked, metadata = self._asked, row.user_metadata or {}
        return (
            self._matches_name(row)
            and (asked.owner.type != "user" or OWNER in asked.owner.owner_urns)
            and (asked.project_ids is None or row.project_id in asked.project_ids)
            and all(metadata.get(key) == value for key, value in asked.user_metadata.items())
        )

    def _matches_status(self, service: Service, row: SessionRow) -> bool:
        if self._asked.statuses is None:
            return True
        status = self._find_status(service, row)
        return any(_fits(status, query) for query in self._asked.statuses)

    def _matches_name(self, row: SessionRow) -> bool:
        """Compare the id, or search every word of the name; without either, any session matches."""
        session_id, display_name = self._asked.session_id, self._asked.display_name
        if session_id is None and display_name is None:
            return True
        if session_id == row.session_id:
            return True
        if display_name is None or row.display_name is None:
            return False
        name = row.display_name.casefold()
        return all(word in name for word in display_name.casefold().split())

    @staticmethod
    def _find_status(service: Service, row: SessionRow) -> Status | None:
        """Return a session's status; None if it was active and its client has vanished."""
        seconds = service.limits.session_idle_seconds
        is_running = service.sessions.is_here(row.session_id) or (
            time.time() - row.last_seen_at < seconds
        )
        return None if row.status["type"] == "active" and not is_running else row.status

    def render(self, service: Service, row: SessionRow) -> dict[str, object]:
        """Return a SessionSummary."""
        status = self._find_status(service, row)
        num_checkpoints, num_bytes = service.store.index.session_storage(row.session_id)
        return render_session_summary(
            row, status=status, num_checkpoints=num_checkpoints, num_bytes=num_bytes
        )


def _read_cursor(cursor: SearchCursor | None) -> tuple[float, str]:
    """Return the time and the id of the last session of the page before."""
    if cursor is None:
        return math.inf, ""
    text = cursor.last_created_at
    try:
        created_at = datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError) as error:
        raise UserError(f"cursor.last_created_at={text[:40]!r} is not a time") from error
    return created_at, cursor.last_session_id


def _fits(status: Status | None, query: StatusQuery) -> bool:
    if status is None or query.type != status["type"]:
        return False
    reason = status.get("reason")
    kind = None if reason is None else reason.get("type")
    return query.reasons is None or kind in query.reasons


ROUTES = [
    ("GET", "/training_runs", list_runs),
    ("GET", "/training_runs/{run_id}", get_run),
    ("GET", "/training_runs/{run_id}/checkpoints", list_run_checkpoints),
    ("GET", "/checkpoints", list_checkpoints),
    ("GET", "/sessions", list_sessions),
    ("POST", "/sessions/search", search_sessions),
    ("GET", "/sessions/{session_id}", get_session),
]
