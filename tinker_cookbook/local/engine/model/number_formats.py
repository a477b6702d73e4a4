"""The names of the number formats that the engine computes in. No torch."""

from __future__ import annotations

import os

from tinker_cookbook.exceptions import ConfigurationError

__all__ = ["DTYPE_NAMES", "dtype_from_environment"]

DTYPE_NAMES = ("float32", "bfloat16")
_DTYPE_VARIABLE = "TINKER_COOKBOOK_DTYPE"


def dtype_from_environment() -> str | None:
    """Return the number format that the environment asks for; None leaves the choice to the engine.

    Raises:
        ConfigurationError: if the format is unknown.
    """
    name = os.environ.get(_DTYPE_VARIABLE) or None
    if name is not None and name not in DTYPE_NAMES:
        raise ConfigurationError(
            f"{_DTYPE_VARIABLE}={name!r} is unknown; use one of {', '.join(DTYPE_NAMES)}"
        )
    return name
