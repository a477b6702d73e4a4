"""Rows of the index -> JSON objects of the REST routes."""

from __future__ import annotations

from datetime import UTC, datetime

from tinker_cookbook.local.service.protocol.auth import OWNER
from tinker_cookbook.local.service.protocol.paths import SEGMENT_TYPES
from tinker_cookbook.local.service.storage.rows import CheckpointRow, RunRow, SessionRow, Status

__all__ = ["render_checkpoint", "render_run", "render_session_summary", "render_time"]


def render_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def render_checkpoint(row: CheckpointRow) -> dict[str, object]:
    return {
        "checkpoint_id": f"{row.segment}/{row.name}",
        "checkpoint_type": SEGMENT_TYPES[row.segment],
        "time": render_time(row.created_at),
        "tinker_path": row.tinker_path,
        "size_bytes": row.size_bytes,
        "public": row.is_public,
        "user_metadata": row.user_metadata,
        "expires_at": None if row.expires_at is None else render_time(row.expires_at),
    }


def render_run(row: RunRow, checkpoints: list[CheckpointRow]) -> dict[str, object]:
    """Return a TrainingRun; `checkpoints` are all of the run's checkpoints, newest first."""

    def last(segment: str) -> dict[str, object] | None:
        found = next((item for item in checkpoints if item.segment == segment), None)
        return None if found is None else render_checkpoint(found)

    return {
        "training_run_id": row.run_id,
        "base_model": row.base_model,
        "model_owner": OWNER,
        "is_lora": True,
        "corrupted": False,
        "lora_rank": row.lora["rank"],
        "last_request_time": render_time(row.last_request_at),
        "last_checkpoint": last("weights"),
        "last_sampler_checkpoint": last("sampler_weights"),
        "user_metadata": row.user_metadata,
    }


def render_session_summary(
    row: SessionRow, *, status: Status | None, num_checkpoints: int, num_bytes: int
) -> dict[str, object]:
    return {
        "session_id": row.session_id,
        "created_at": render_time(row.created_at),
        "owner": OWNER,
        "project_id": row.project_id,
        "status": status,
        "checkpoints_count": num_checkpoints,
        "display_name": row.display_name,
        "user_metadata": row.user_metadata,
        "checkpoint_storage_bytes": num_bytes,
    }
