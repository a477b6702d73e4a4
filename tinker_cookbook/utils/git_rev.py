"""The git commit that a run was started from."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["git_output", "recipe_user_metadata"]


def git_output(*arguments: str, folder: Path) -> str | None:
    """Return the output of a git command in `folder`; None without git or a repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", errors="replace")


def recipe_user_metadata(recipe_name: str) -> dict[str, str]:
    """Return the metadata of a session: the recipe and, if known, the git commit."""
    metadata = {"recipe_name": recipe_name}
    revision = git_output("rev-parse", "HEAD", folder=Path.cwd())
    if revision:
        metadata["git_rev"] = revision.strip()
    return metadata
