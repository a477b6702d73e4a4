"""Find the nearest valid name, for errors about unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "nearest_name"]


def nearest_name(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known name that is most similar to `name`, ignoring case; None if none is similar.

    Args:
        name: name that was given.
        known: valid names.
        cutoff: required similarity, from 0 (any name) to 1 (equal).
    """
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=cutoff)
    return by_lower_case[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return ` Did you mean 'NAME'?` to append to a sentence, or an empty text if none is near."""
    nearest = nearest_name(name, known, cutoff=cutoff)
    return "" if nearest is None else f" Did you mean {nearest!r}?"
