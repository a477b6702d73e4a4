"""Lists of whole numbers in JSON -> arrays. They may be long, so numpy converts them at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.limits import INT32, INT64
from tinker_cookbook.local.service.protocol.typed_body import NotAcceptedError, Reader

__all__ = ["INTEGERS", "TOKEN_IDS", "read_token_ids"]


def read_token_ids(value: object, where: str) -> np.ndarray:
    """Return int32 [N].

    Raises:
        NotAcceptedError: it is not a list.
        UserError: the message names the first item that is not a token id.
    """
    values = _as_list(value)
    found = _as_integers(values)
    if found is not None and (not found.size or (found.min() >= 0 and found.max() in INT32)):
        return found.astype(np.int32)
    for index, item in enumerate(values):
        if type(item) is not int or item not in INT32:
            raise UserError(f"{where}[{index}]={str(item)[:40]} is not a token id")
    raise AssertionError("at least one item is not a token id")


def _read_integers(value: object, where: str) -> np.ndarray:
    """Return int64 [N]."""
    values = _as_list(value)
    found = _as_integers(values)
    if found is not None:
        return found
    for index, item in enumerate(values):
        if type(item) is not int or item not in INT64:
            raise UserError(
                f"{where}[{index}]={str(item)[:40]} is not accepted; expected a whole number of 64 "
                "bits"
            )
    raise AssertionError("at least one item is not a whole number of 64 bits")


def _as_list(value: object) -> Sequence[object]:
    if not isinstance(value, list):
        raise NotAcceptedError
    return value


def _as_integers(values: Sequence[object]) -> np.ndarray | None:
    """Return int64 [N], or None if an item is something else. A bool is not a whole number here."""
    if not set(map(type, values)) <= {int}:
        return None
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError:
        return None


TOKEN_IDS = Reader("a list of token ids", read_token_ids)
INTEGERS = Reader("a list of whole numbers", _read_integers)
