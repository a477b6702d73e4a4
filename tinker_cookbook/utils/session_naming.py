"""Names of runs and sessions on the service."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tinker_cookbook.utils.git_rev import recipe_user_metadata

__all__ = [
    "RUN_NAME_METADATA_KEY",
    "default_cookbook_session_name",
    "describe_session",
    "name_run",
    "resolve_session_display_name",
    "slugify",
]

LONGEST_NAME = 120
RUN_NAME_METADATA_KEY = "run_name"
"""Metadata key of a run's name; lists of runs do not show the name of the session."""


def name_run(recipe_name: str, log_path: str | Path, learning_rate: float | None) -> str:
    """Return the name of a run, which is the same for every start of the run.

    Args:
        recipe_name: The recipe.
        log_path: The run directory; its default name contains the data and the model.
        learning_rate: The peak learning rate.
    """
    words = [recipe_name, Path(log_path).name]
    if learning_rate is not None:
        words.append(f"lr={learning_rate:g}")
    return " ".join(filter(None, words))[:LONGEST_NAME]


def describe_session(
    recipe_name: str, log_path: str | Path, learning_rate: float | None
) -> dict[str, Any]:
    """Return name and metadata of a run's session, for `Connection.service_client`."""
    return {
        "display_name": name_run(recipe_name, log_path, learning_rate),
        "user_metadata": recipe_user_metadata(recipe_name),
    }


def resolve_session_display_name(*, session_name: str | None, wandb_name: str | None) -> str | None:
    """Return the session's display name: `session_name` if given, else the W&B run's name."""
    return session_name or wandb_name


def slugify(text: str) -> str:
    """Reduce text to lower-case letters, digits, dots and single hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def default_cookbook_session_name(*parts: str | None, wandb_name: str | None = None) -> str:
    """Return `wandb_name`, or the parts as a name such as `sl-basic-smollm2-135m-instruct`."""
    return wandb_name or "-".join(slugify(part) for part in parts if part)
