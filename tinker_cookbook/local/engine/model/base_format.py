"""The format of the base weights that a saved adapter was trained on."""

from __future__ import annotations

import logging
from pathlib import Path

from tinker_cookbook.local.engine.model.lora import read_base_format
from tinker_cookbook.local.errors import UserError

__all__ = ["check_saved_format"]

logger = logging.getLogger(__name__)


def check_saved_format(folder: Path, base_format: str, *, with_optimizer: bool) -> None:
    """Compare the base format of a saved adapter with that of this service.

    To resume training on other weights is refused: the run would silently continue on a slightly
    different model. The weights alone may be loaded, which logs a warning.

    Raises:
        UserError: if training would resume on another format; the message names both.
    """
    saved = read_base_format(folder)
    if saved == base_format:
        return
    if with_optimizer:
        raise UserError(
            f"the checkpoint was trained with base_format={saved!r} and this service uses "
            f"base_format={base_format!r}. To resume it, start the service with --base-format "
            f"{saved}; to start a new run from its weights, load it without the optimizer state"
        )
    logger.warning(
        "an adapter that was trained with base_format=%s is loaded on base_format=%s; its logprobs "
        "differ slightly from those in training",
        saved,
        base_format,
    )
