"""The file of `--html`."""

from __future__ import annotations

from pathlib import Path

from tinker_cookbook.exceptions import ConfigurationError

__all__ = ["write_page"]


def write_page(path: str, page: str) -> None:
    """Write an HTML page to the path that the user gave.

    Raises:
        ConfigurationError: if the file cannot be written.
    """
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"--html={path} cannot be written ({error.strerror}); give a file in a folder that "
            "exists."
        ) from error
