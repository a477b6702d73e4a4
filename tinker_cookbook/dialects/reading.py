"""Helpers to read request bodies; every error names its field."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from tinker_cookbook.exceptions import DataFormatError

__all__ = [
    "keep",
    "read_list",
    "read_object",
    "read_text",
    "refuse_all_but",
    "refuse_unknown",
    "shown",
]


def shown(value: object) -> str:
    """Return the beginning of a value, for an error."""
    return json.dumps(value, ensure_ascii=False, default=str)[:80]


def read_object(value: object, where: str) -> Mapping[str, Any]:
    """Return an object.

    Raises:
        DataFormatError: it is something else.
    """
    if not isinstance(value, Mapping):
        raise DataFormatError(f"{where}={shown(value)} is not accepted; expected an object")
    return value


def read_list(value: object, where: str) -> list[Any]:
    """Return a list; an empty one for a missing value.

    Raises:
        DataFormatError: it is something else.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataFormatError(f"{where}={shown(value)} is not accepted; expected a list")
    return value


def read_text(value: object, where: str) -> str:
    """Return a text.

    Raises:
        DataFormatError: it is something else.
    """
    if not isinstance(value, str):
        raise DataFormatError(f"{where}={shown(value)} is not accepted; expected a text")
    return value


def keep(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields that are given and not null, under their new names."""
    return {new: values[name] for name, new in names.items() if values.get(name) is not None}


def refuse_unknown(values: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse a request that has an unknown field.

    Raises:
        DataFormatError: the message names the field.
    """
    for name in values:
        if name not in known:
            raise DataFormatError(
                f"{name[:80]} is not a known field; use one of {', '.join(sorted(known))}"
            )


def refuse_all_but(values: Mapping[str, Any], accepted: Mapping[str, Iterable[object]]) -> None:
    """Refuse fields that are not implemented, unless their values ask for nothing.

    Raises:
        DataFormatError: the message names the field and its value.
    """
    for name, neutral in accepted.items():
        value = values.get(name)
        if value is not None and value not in tuple(neutral):
            raise DataFormatError(f"{name}={shown(value)} is not available here; leave it out")
