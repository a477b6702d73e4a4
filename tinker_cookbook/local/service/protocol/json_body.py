"""Parse JSON bodies within bounds: size, nesting, and only what JSON allows."""

from __future__ import annotations

import itertools
import json
import re

from tinker_cookbook.local.errors import UserError

__all__ = ["LARGE_BODY", "JsonObject", "check_depth", "parse_json_object", "show_value"]

JsonObject = dict[str, object]
MAX_VALUES = 2**21
MAX_CONTAINERS = 2**18
"""Maximum number of opening brackets in a body. A list or object takes about 20 times more memory
than its JSON text."""
MAX_DEPTH = 100
"""Maximum nesting of lists and objects. Recursive functions read messages and render templates, and
Python allows about a thousand nested calls."""
LARGE_BODY = 2**16
"""Size in bytes above which a body is parsed on another thread."""
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json_object(body: bytes) -> JsonObject:
    """Parse a request body; an empty one is an empty object.

    Raises:
        UserError: the body is not UTF-8, not JSON or not an object, contains NaN or Infinity, is
            nested too deep, has too many values, or has a text with half a surrogate pair, which
            could neither be stored nor sent back.
    """
    if not body:
        return {}
    _check_counts(body)
    # calling a Python function for each number lets other threads run in between
    hooks = {} if len(body) < LARGE_BODY else {"parse_int": _parse_int, "parse_float": _parse_float}
    try:
        text = body.decode("utf-8-sig")  # json.loads(bytes) would accept halves of pairs
        value = json.loads(text, parse_constant=_refuse_constant, **hooks)
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(f"the request body is not JSON: {error}") from error
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        check_depth(value, "the request body")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"the request body is a JSON {type(value).__name__}; expected an object")
    return value


def _check_counts(body: bytes) -> None:
    containers = body.count(b"[") + body.count(b"{")
    values = containers + body.count(b",")
    if values > MAX_VALUES or containers > MAX_CONTAINERS:
        raise UserError(
            f"the request body has up to {values} values, {containers} of them lists and objects; "
            f"at most {MAX_VALUES} and {MAX_CONTAINERS} are accepted. Send less in one request"
        )


def check_depth(value: object, name: str) -> None:
    """Refuse a value whose lists and objects are nested too deep; the error begins with `name`."""
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(MAX_DEPTH):
        inside = (outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = [item for items in inside for item in items if isinstance(item, list | dict)]
        if not level:
            return
    raise UserError(
        f"{name} nests lists and objects too deep; at most {MAX_DEPTH} levels are accepted"
    )


def _parse_int(text: str) -> int:
    return int(text)


def _parse_float(text: str) -> float:
    return float(text)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def show_value(value: object) -> str:
    """Return the beginning of a value as text, without formatting all of a large value."""
    if isinstance(value, str | bytes):
        value = value[:200]
    elif isinstance(value, list):
        value = value[:40]
    elif isinstance(value, dict):
        value = dict(itertools.islice(value.items(), 40))
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
