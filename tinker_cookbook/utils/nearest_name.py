"""The nearest valid name, for errors about unknown ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "nearest_name"]


def nearest_name(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known name that is most like `name`, whatever the case; None if none is.

    Args:
        name: what was given.
        known: the valid names.
        cutoff: how alike they must be, from 0 (anything) to 1 (the same).
    """
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=cutoff)
    return by_lower_case[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return ` Did you mean 'NAME'?` to put behind a sentence, or nothing if none is near."""
    nearest = nearest_name(name, known, cutoff=cutoff)
    return "" if nearest is None else f" Did you mean {nearest!r}?"
