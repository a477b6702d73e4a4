"""The names of the number formats that the engine computes in. No torch."""

from __future__ import annotations

import os

from tinker_cookbook.exceptions import ConfigurationError

__all__ = [
    "BASE_FORMATS",
    "DTYPE_NAMES",
    "FULL",
    "base_format_from_environment",
    "dtype_from_environment",
    "format_bits",
]

DTYPE_NAMES = ("float32", "bfloat16")
_DTYPE_VARIABLE = "TINKER_COOKBOOK_DTYPE"
FULL = "full"
"""The base format that keeps the numbers of the model's files."""
BASE_FORMATS = (FULL, "int8", "int4")
_BASE_FORMAT_VARIABLE = "TINKER_COOKBOOK_BASE_FORMAT"
_BITS = {FULL: 0, "int8": 8, "int4": 4}


def dtype_from_environment() -> str | None:
    """Return the number format that the environment asks for; None leaves the choice to the engine.

    Raises:
        ConfigurationError: if the format is unknown.
    """
    return _read(_DTYPE_VARIABLE, DTYPE_NAMES)


def base_format_from_environment() -> str | None:
    """Return the format of base weights that the environment asks for; None if it asks for none.

    Raises:
        ConfigurationError: if the format is unknown.
    """
    return _read(_BASE_FORMAT_VARIABLE, BASE_FORMATS)


def format_bits(name: str) -> int:
    """Return the bits per weight of a base format; 0 if weights are not quantised.

    Raises:
        ConfigurationError: if the format is unknown.
    """
    if name not in _BITS:
        raise ConfigurationError(
            f"base_format={name!r} is unknown; use one of {', '.join(BASE_FORMATS)}"
        )
    return _BITS[name]


def _read(variable: str, accepted: tuple[str, ...]) -> str | None:
    name = os.environ.get(variable) or None
    if name is not None and name not in accepted:
        raise ConfigurationError(
            f"{variable}={name!r} is unknown; use one of {', '.join(accepted)}"
        )
    return name
