"""Addresses that carry the scope of a call: `/run/r1/iter/3/group/0/traj/5`."""

from __future__ import annotations

from urllib.parse import unquote

from tinker_cookbook.exceptions import DataFormatError

__all__ = ["ADDRESS_KEY_MAP", "parse_address"]

ADDRESS_KEY_MAP: dict[str, str] = {
    "run": "run_id",
    "attempt": "run_attempt",
    "split": "split",
    "iter": "iteration",
    "group": "group_idx",
    "traj": "traj_idx",
    "purpose": "purpose",
}
"""Words of an address -> the keys of the scope."""
_NUMBERS = ("run_attempt", "iteration", "group_idx", "traj_idx")


def parse_address(path: str) -> dict[str, str | int]:
    """Return the scope that the words before `/v1` of a path name.

    Raises:
        DataFormatError: a word is unknown or comes twice, a value is missing, or a number is not
            one.
    """
    words = [unquote(word) for word in path.partition("/v1")[0].strip("/").split("/") if word]
    scope: dict[str, str | int] = {}
    for at in range(0, len(words), 2):
        name = words[at]
        key = ADDRESS_KEY_MAP.get(name)
        if key is None or key in scope or at + 1 == len(words):
            raise DataFormatError(
                f"address has {name[:80]!r} without a value, twice, or as an unknown word; use "
                f"/WORD/VALUE pairs of {', '.join(ADDRESS_KEY_MAP)}."
            )
        scope[key] = _read_value(key, words[at + 1])
    return scope


def _read_value(key: str, text: str) -> str | int:
    if key not in _NUMBERS:
        return text
    if not (text.isascii() and text.isdigit()):
        raise DataFormatError(f"address has {key}={text[:80]!r}, which is not a number.")
    return int(text)
