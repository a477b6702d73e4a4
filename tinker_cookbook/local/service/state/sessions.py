"""Sessions: which are active, when their client last sent a request, and how they ended."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field

from tinker_cookbook.local.errors import NotFoundError, UserError
from tinker_cookbook.local.service.state.presence import Presence
from tinker_cookbook.local.service.storage.checkpoint_index import Index
from tinker_cookbook.local.service.storage.rows import SessionRow, Status
from tinker_cookbook.local.service.threads import STORING

__all__ = ["ACTIVE", "DEFAULT_PROJECT", "Session", "SessionTable"]

ACTIVE: Status = {"type": "active"}
DEFAULT_PROJECT = "default"


@dataclass(eq=False)
class Session:
    """A session that this process serves."""

    row: SessionRow
    last_seen: float = field(default_factory=time.monotonic)

    @property
    def session_id(self) -> str:
        return self.row.session_id

    @property
    def is_active(self) -> bool:
        return self.row.status["type"] == "active"

    def touch(self) -> None:
        self.last_seen = time.monotonic()


class SessionTable:
    """Active sessions of this process. Use it only on the event loop's thread."""

    def __init__(self, index: Index, presence: Presence) -> None:
        self._index = index
        self.presence = presence
        self._sessions: dict[str, Session] = {}

    async def create(
        self,
        *,
        display_name: str | None,
        user_metadata: dict[str, str] | None,
        tags: list[str],
        project_id: str | None,
        sdk_version: str | None,
    ) -> Session:
        now = round(time.time(), 6)  # search cursors carry microseconds
        row = SessionRow(
            session_id=str(uuid.uuid4()),
            created_at=now,
            last_seen_at=now,
            display_name=display_name,
            user_metadata=user_metadata,
            tags=tags,
            project_id=project_id or DEFAULT_PROJECT,
            sdk_version=sdk_version,
            status=ACTIVE,
        )
        await STORING.run(self._index.insert, row)
        session = self._sessions[row.session_id] = Session(row)
        return session

    def get(self, session_id: str) -> Session:
        """Return a session, active or ended, of any process; NotFoundError if it does not exist."""
        session = self._sessions.get(session_id)
        if session is not None:
            return session
        row = self._index.session(session_id)
        if row is None:
            raise NotFoundError(f"session_id={session_id[:80]!r} does not exist")
        return Session(row)

    def get_active(self, session_id: str) -> Session:
        """Return a session that accepts work, or raise UserError.

        An active session from before a restart of the service continues.
        """
        session = self.hear(session_id)
        if not session.is_active:
            raise UserError(
                f"session_id={session_id!r} has ended ({describe_status(session.row.status)}); "
                "create a new ServiceClient",
            )
        return session

    def hear(self, session_id: str) -> Session:
        """Record a request of a session; NotFoundError if the session does not exist."""
        session = self.get(session_id)
        session.touch()
        self.presence.hear(session_id)
        if session.is_active:
            self._sessions[session_id] = session
        return session

    async def end(self, session: Session, status: Status) -> bool:
        """Record how a session ended; returns False if it had ended before."""
        if not session.is_active:
            return False
        session.row.status = status
        self.presence.end(session.session_id)
        self._sessions.pop(session.session_id, None)
        await STORING.run(self._index.update_session, session.session_id, status=status)
        return True

    async def set_project(self, session_id: str, project_id: str) -> None:
        self.get(session_id).row.project_id = project_id
        await STORING.run(self._index.update_session, session_id, project_id=project_id)

    def idle(self, seconds: float) -> list[Session]:
        """Return the active sessions without a request for this time."""
        limit = time.monotonic() - seconds
        return [session for session in self._sessions.values() if session.last_seen < limit]

    def is_elsewhere(self, session: Session, seconds: float) -> bool:
        """Return whether another service on the same state folder serves this session."""
        row = self._index.session(session.session_id)
        return row is not None and time.time() - row.last_seen_at < seconds

    def forget(self, session: Session) -> None:
        """Leave a session to the other service that serves it."""
        self._sessions.pop(session.session_id, None)

    async def record_seen(self) -> None:
        """Write the time of the last request of each session to the index."""
        offset = time.time() - time.monotonic()
        seen = {key: session.last_seen + offset for key, session in self._sessions.items()}
        await STORING.run(self._index.touch_sessions, seen)

    def is_here(self, session_id: str) -> bool:
        return session_id in self._sessions

    def __len__(self) -> int:
        return len(self._sessions)


def describe_status(status: Status) -> str:
    """Return a status in words."""
    detail = status.get("detail")
    reason = status.get("reason")
    kind = None if reason is None else reason.get("type")
    words = [status["type"].replace("_", " "), *([kind] if kind else [])]
    return ": ".join(words + ([detail] if detail else []))
