"""The rows of the index: their tables, and their conversion from and to SQLite's values."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import NotRequired, TypedDict, TypeVar, cast

__all__ = [
    "SCHEMA",
    "TABLES",
    "AnyRow",
    "CheckpointRow",
    "Lora",
    "Parameters",
    "Reason",
    "Row",
    "RunRow",
    "SamplerRow",
    "SessionRow",
    "SqlValue",
    "Status",
    "to_record",
    "to_row",
]

LAST_SECOND = 253402300799
"""Last second of the year 9999, the last year that a date can have."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    session_id TEXT PRIMARY KEY, created_at REAL NOT NULL, last_seen_at REAL NOT NULL,
    display_name TEXT, user_metadata TEXT, tags TEXT, project_id TEXT NOT NULL, sdk_version TEXT,
    status TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS sessions_by_time ON sessions (created_at DESC, session_id DESC);
CREATE TABLE IF NOT EXISTS runs (
    run_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, base_model TEXT NOT NULL, lora TEXT NOT NULL,
    user_metadata TEXT, created_at REAL NOT NULL, last_request_at REAL NOT NULL,
    is_trainable INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS runs_by_time ON runs (created_at DESC, run_id DESC);
CREATE INDEX IF NOT EXISTS runs_by_session ON runs (session_id);
CREATE TABLE IF NOT EXISTS samplers (
    sampler_id TEXT PRIMARY KEY, session_id TEXT NOT NULL, base_model TEXT NOT NULL,
    model_path TEXT, run_id TEXT, created_at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS samplers_by_session ON samplers (session_id);
CREATE TABLE IF NOT EXISTS checkpoints (
    folder TEXT PRIMARY KEY, run_id TEXT NOT NULL, segment TEXT NOT NULL, name TEXT NOT NULL,
    created_at REAL NOT NULL, size_bytes INTEGER NOT NULL, has_optimizer INTEGER NOT NULL,
    is_public INTEGER NOT NULL, user_metadata TEXT, expires_at REAL,
    UNIQUE (run_id, segment, name));
CREATE INDEX IF NOT EXISTS checkpoints_by_time ON checkpoints (created_at DESC, folder DESC);
CREATE TABLE IF NOT EXISTS copies (idempotency_key TEXT PRIMARY KEY, tinker_path TEXT NOT NULL);
"""
_JSON_COLUMNS = ("user_metadata", "tags", "status", "lora")
SqlValue = str | int | float | bool | None
Parameters = tuple[SqlValue, ...] | Mapping[str, SqlValue]
AnyRow = TypeVar("AnyRow", "SessionRow", "RunRow", "SamplerRow", "CheckpointRow")


class Reason(TypedDict):
    """Why a client ended its session."""

    type: str


class Status(TypedDict):
    """The state of a session, as the wire's SessionStatus has it."""

    type: str
    reason: NotRequired[Reason]
    detail: NotRequired[str | None]


class Lora(TypedDict):
    """The fields of LoraSpec."""

    rank: int
    seed: NotRequired[int | None]
    train_mlp: NotRequired[bool]
    train_attn: NotRequired[bool]
    train_unembed: NotRequired[bool]
    alpha: NotRequired[float]
    dropout: NotRequired[float]


@dataclass
class SessionRow:
    """A client's session."""

    session_id: str
    created_at: float
    last_seen_at: float
    display_name: str | None
    user_metadata: dict[str, str] | None
    tags: list[str]
    project_id: str
    sdk_version: str | None
    status: Status


@dataclass
class RunRow:
    """A training run."""

    run_id: str
    session_id: str
    base_model: str
    lora: Lora
    user_metadata: dict[str, str] | None
    created_at: float
    last_request_at: float
    is_trainable: bool
    """False for a run that only has a copied checkpoint."""


@dataclass
class SamplerRow:
    """A sampling session. It has a `run_id` only if its weights were not saved under a name."""

    sampler_id: str
    session_id: str
    base_model: str
    model_path: str | None
    run_id: str | None
    created_at: float


@dataclass
class CheckpointRow:
    """A saved checkpoint; `folder` is the name of its folder in the store."""

    folder: str
    run_id: str
    segment: str
    name: str
    created_at: float
    size_bytes: int
    has_optimizer: bool
    is_public: bool
    user_metadata: dict[str, str] | None
    expires_at: float | None

    @property
    def tinker_path(self) -> str:
        return f"tinker://{self.run_id}/{self.segment}/{self.name}"


Row = SessionRow | RunRow | SamplerRow | CheckpointRow
TABLES: dict[type, str] = {
    SessionRow: "sessions",
    RunRow: "runs",
    SamplerRow: "samplers",
    CheckpointRow: "checkpoints",
}


_COLUMN_TYPES: dict[str, type | tuple[type, ...]] = {
    "user_metadata": dict,
    "tags": list,
    "status": dict,
    "lora": dict,
    "size_bytes": int,
}
_REQUIRED_KEYS = {"status": ("type",), "lora": ("rank",)}


def to_row(cls: type[AnyRow], record: sqlite3.Row) -> AnyRow:
    """Build a row; ValueError or TypeError if the record is damaged."""
    values: dict[str, object] = dict(record)
    for key, value in values.items():
        if key in _JSON_COLUMNS and isinstance(value, str | bytes):
            values[key] = json.loads(value)
        elif key.startswith(("is_", "has_")):
            values[key] = bool(value)
        _check_column(key, values[key])
    return cast(Callable[..., AnyRow], cls)(**values)


def _check_column(name: str, value: object) -> None:
    if value is None or name.startswith(("is_", "has_")):
        return
    if name.endswith("_at"):
        if not isinstance(value, int | float) or not math.fabs(value) <= LAST_SECOND:
            raise ValueError(f"{name}={value!r} is not a time")
    elif not isinstance(value, _COLUMN_TYPES.get(name, str)):
        raise ValueError(f"{name} holds a {type(value).__name__}")
    elif isinstance(value, dict) and not set(_REQUIRED_KEYS.get(name, ())) <= set(value):
        raise ValueError(f"{name} lacks {_REQUIRED_KEYS[name]}")


def to_record(row: Row) -> dict[str, SqlValue]:
    record = asdict(row)
    for key in _JSON_COLUMNS:
        if record.get(key) is not None:
            record[key] = json.dumps(record[key])
    return record
