"""Tool calls as GLM writes them: the name, then `<arg_key>` and `<arg_value>` in turn."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tinker_cookbook.replies.json_source import object_text
from tinker_cookbook.replies.pieces import BadCall, Call, ReadCall
from tinker_cookbook.replies.tag_calls import json_source

__all__ = ["PAIR_MARKS", "read_pair_call", "read_pair_text"]

PAIR_MARKS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_PAIR = re.compile(
    r"\s*<arg_key>(?>(.*?)</arg_key>)\s*<arg_value>(.*?)</arg_value>(?=\s*<arg_key>|\s*\Z)",
    re.DOTALL,
)


def read_pair_text(body: str, raw_text: str) -> ReadCall:
    """Read one call whose marks are text.

    A value ends where the next key or the end of the call follows.
    """
    name, found, _ = body.partition(PAIR_MARKS[0])
    position = len(name)
    parts: list[str | int] = [name]
    while found and (pair := _PAIR.match(body, position)) is not None:
        parts += [0, pair[1], 1, 2, pair[2], 3]
        position = pair.end()
    if body[position:].strip() and found:
        return BadCall(raw_text, "an argument is not closed")
    return read_pair_call(parts, raw_text, range(4))


def read_pair_call(parts: Sequence[str | int], raw_text: str, marks: Sequence[int]) -> ReadCall:
    """Read one call; anything that is not exactly one comes back with the reason.

    Args:
        parts: the texts and marks between the marks of the call.
        raw_text: the whole call.
        marks: the representation of the four `PAIR_MARKS` in parts.
    """
    start = next((i for i, part in enumerate(parts) if not isinstance(part, str)), len(parts))
    name = "".join(str(part) for part in parts[:start]).strip()
    if not name:
        return BadCall(raw_text, "the function has no name")
    members: dict[str, str] = {}
    rest = _without_gaps(parts[start:], marks)
    rest.reverse()
    while rest:
        taken: list[str] = []
        for mark, after in (marks[:2], marks[2:]):
            if not rest or rest.pop() != mark:
                return BadCall(
                    raw_text, "expected <arg_key>KEY</arg_key><arg_value>VALUE</arg_value>"
                )
            taken.append(str(rest.pop()) if rest and isinstance(rest[-1], str) else "")
            if not rest or rest.pop() != after:
                return BadCall(raw_text, "an argument is not closed")
        if taken[0] in members:
            return BadCall(raw_text, f"argument {taken[0]!r} is given twice")
        members[taken[0]] = taken[1]
    return Call(name, object_text([(key, json_source(v, {})) for key, v in members.items()]))


def _without_gaps(parts: Sequence[str | int], marks: Sequence[int]) -> list[str | int]:
    """Return the parts without white space after a closing mark."""
    closing = (marks[1], marks[3])
    gaps = {
        i
        for i, part in enumerate(parts)
        if i and parts[i - 1] in closing and isinstance(part, str) and not part.strip()
    }
    return [part for i, part in enumerate(parts) if i not in gaps]
