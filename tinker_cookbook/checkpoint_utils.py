"""Checkpoints, under the names that programs import, and the renderer a checkpoint needs.

The code is in `runs.checkpoints` (records) and `runs.checkpoint_manager` (when to save).
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from tinker_cookbook import model_info
from tinker_cookbook.runs.checkpoint_manager import CheckpointManager
from tinker_cookbook.runs.checkpoints import (
    CHECKPOINTS_BASE_NAME,
    CheckpointRecord,
    PendingCheckpoint,
    forget_path,
    get_last_checkpoint,
    load_checkpoints_file,
    save_checkpoint,
    save_checkpoint_async,
    submit_checkpoint,
)
from tinker_cookbook.utils.sdk_compat import rest_client_of

if TYPE_CHECKING:
    import tinker

__all__ = [
    "CHECKPOINTS_BASE_NAME",
    "RENDERER_NAME_METADATA_KEY",
    "CheckpointManager",
    "CheckpointRecord",
    "PendingCheckpoint",
    "add_renderer_name_to_user_metadata",
    "check_renderer_name_for_checkpoint",
    "check_renderer_name_for_checkpoint_async",
    "forget_path",
    "get_last_checkpoint",
    "get_renderer_name_from_checkpoint",
    "get_renderer_name_from_checkpoint_async",
    "load_checkpoints_file",
    "resolve_renderer_name_from_checkpoint_or_default",
    "resolve_renderer_name_from_checkpoint_or_default_async",
    "rest_client_of",
    "save_checkpoint",
    "save_checkpoint_async",
    "submit_checkpoint",
]

logger = logging.getLogger(__name__)

RENDERER_NAME_METADATA_KEY = "renderer_name"


def add_renderer_name_to_user_metadata(
    user_metadata: dict[str, str], renderer_name: str | None
) -> None:
    """Record the renderer in a run's metadata: its checkpoints must be prompted with it."""
    if renderer_name:
        user_metadata[RENDERER_NAME_METADATA_KEY] = renderer_name


async def get_renderer_name_from_checkpoint_async(
    service_client: tinker.ServiceClient, checkpoint_path: str
) -> str | None:
    """Return the renderer that a checkpoint was trained with; None, with a warning, if unknown."""
    import tinker

    try:
        rest = rest_client_of(service_client)
        run = await rest.get_training_run_by_tinker_path(checkpoint_path)
    except (tinker.TinkerError, ValueError) as error:
        logger.warning("no metadata of %s: %s", checkpoint_path, error)
        return None
    return (run.user_metadata or {}).get(RENDERER_NAME_METADATA_KEY)


def get_renderer_name_from_checkpoint(
    service_client: tinker.ServiceClient, checkpoint_path: str
) -> str | None:
    """Run `get_renderer_name_from_checkpoint_async` from code without an event loop."""
    return asyncio.run(get_renderer_name_from_checkpoint_async(service_client, checkpoint_path))


async def check_renderer_name_for_checkpoint_async(
    service_client: tinker.ServiceClient, checkpoint_path: str, expected_renderer_name: str | None
) -> None:
    """Log a warning if a checkpoint was trained with a renderer other than the one in use."""
    found = await get_renderer_name_from_checkpoint_async(service_client, checkpoint_path)
    if found and expected_renderer_name and found != expected_renderer_name:
        logger.warning(
            "renderer_name=%s is used, but %s was trained with %s",
            expected_renderer_name,
            checkpoint_path,
            found,
        )


def check_renderer_name_for_checkpoint(
    service_client: tinker.ServiceClient, checkpoint_path: str, expected_renderer_name: str | None
) -> None:
    """Run `check_renderer_name_for_checkpoint_async` from code without an event loop."""
    asyncio.run(
        check_renderer_name_for_checkpoint_async(
            service_client, checkpoint_path, expected_renderer_name
        )
    )


async def resolve_renderer_name_from_checkpoint_or_default_async(
    *,
    model_name: str,
    explicit_renderer_name: str | None,
    load_checkpoint_path: str | None,
    base_url: str | None = None,
) -> str:
    """Return the renderer to use: the given, the checkpoint's, or the recommended one."""
    if explicit_renderer_name is not None:
        return explicit_renderer_name
    if load_checkpoint_path is not None:
        import tinker

        client = tinker.ServiceClient(base_url=base_url)
        found = await get_renderer_name_from_checkpoint_async(client, load_checkpoint_path)
        if found is not None:
            return found
    return model_info.get_recommended_renderer_name(model_name)


def resolve_renderer_name_from_checkpoint_or_default(
    *,
    model_name: str,
    explicit_renderer_name: str | None,
    load_checkpoint_path: str | None,
    base_url: str | None = None,
) -> str:
    """Run `resolve_renderer_name_from_checkpoint_or_default_async` without an event loop."""
    return asyncio.run(
        resolve_renderer_name_from_checkpoint_or_default_async(
            model_name=model_name,
            explicit_renderer_name=explicit_renderer_name,
            load_checkpoint_path=load_checkpoint_path,
            base_url=base_url,
        )
    )
