"""Grammar and limits of the names and paths that clients send: `tinker://<run>/<segment>/<name>`.

None of these strings becomes part of a file path: the service chooses the names of its folders.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

from tinker_cookbook.local.errors import NotFoundError, UserError
from tinker_cookbook.utils.shared_limits import MAX_TTL_SECONDS, MIN_TTL_SECONDS

__all__ = [
    "MAX_NAME_LENGTH",
    "SEGMENT_TYPES",
    "CheckpointPath",
    "Segment",
    "check_name",
    "check_ttl",
    "missing_checkpoint",
    "parse_tinker_path",
]

Segment = Literal["weights", "sampler_weights", "external_weights"]

SEGMENT_TYPES: dict[str, str] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}

MAX_NAME_LENGTH = 200

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-+=@,~:]*")
_RUN_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-:]*")


@dataclass(frozen=True)
class CheckpointPath:
    """A parsed `tinker://` path."""

    run_id: str
    segment: Segment
    name: str

    def __str__(self) -> str:
        return f"tinker://{self.run_id}/{self.segment}/{self.name}"


def check_name(name: str, *, field: str = "path") -> str:
    """Return a checkpoint name unchanged, or raise UserError."""
    if not _NAME.fullmatch(name) or ".." in name or len(name) > MAX_NAME_LENGTH:
        raise UserError(
            f"{field}={name[:80]!r} is not a checkpoint name; use 1 to {MAX_NAME_LENGTH} letters, "
            "digits and _ . - + = @ , ~ : starting with a letter, digit or underscore, without '..'"
        )
    return name


def parse_tinker_path(path: str, *, field: str = "path") -> CheckpointPath:
    """Parse `tinker://<run>/<segment>/<name>`, or raise UserError."""
    scheme, separator, rest = path.partition("://")
    parts = rest.split("/")
    if scheme != "tinker" or not separator or len(parts) != 3 or parts[1] not in SEGMENT_TYPES:
        raise UserError(
            f"{field}={path[:200]!r} is not a checkpoint path; expected "
            f"tinker://RUN/{'|'.join(SEGMENT_TYPES)}/NAME"
        )
    run_id, segment, name = parts
    if not _RUN_ID.fullmatch(run_id) or ".." in run_id or len(run_id) > MAX_NAME_LENGTH:
        raise UserError(f"{field}={path[:200]!r} has no valid run id")
    check_name(name, field=field)
    return CheckpointPath(run_id, cast(Segment, segment), name)


def missing_checkpoint(field: str, path: str) -> NotFoundError:
    """Return the error for a path without a checkpoint."""
    return NotFoundError(f"{field}={path!r} does not exist; it may have expired or been deleted")


def check_ttl(ttl_seconds: int | None) -> int | None:
    """Return a time to live unchanged, or raise UserError. None: never expires."""
    if ttl_seconds is not None and not MIN_TTL_SECONDS <= ttl_seconds <= MAX_TTL_SECONDS:
        raise UserError(
            f"ttl_seconds={ttl_seconds} is out of range; use {MIN_TTL_SECONDS} (an hour) to "
            f"{MAX_TTL_SECONDS} (ten years), or null to keep the checkpoint"
        )
    return ttl_seconds
