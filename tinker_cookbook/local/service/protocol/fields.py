"""Read typed values out of a JSON object; every refusal names the field and the value."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Collection
from typing import Any

from tinker_cookbook.local.errors import UserError

__all__ = ["LARGE_BODY", "Fields", "check_depth", "parse_json_object", "show_value"]

MAX_TEXT = 4096
MAX_METADATA_ITEMS = 256
MAX_VALUES = 2**21
MAX_CONTAINERS = 2**18
"""Lists and objects in a body, or brackets in its texts: each takes 20 times what it is sent as."""
MAX_DEPTH = 100
"""Of lists and objects in each other: templates and messages are walked by functions that call
themselves, and Python allows a thousand calls in each other."""
LARGE_BODY = 2**16
"""Bytes; what is larger is read on another thread."""
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Parse a request body; an empty one is an empty object.

    Raises:
        UserError: not UTF-8, not JSON, not an object, NaN or Infinity literals, nested too deep,
            too many values, or with half a surrogate pair in a text, which could be neither stored
            nor sent back.
    """
    if not body:
        return {}
    _check_counts(body)
    # a number that goes through Python lets other threads run
    hooks = {} if len(body) < LARGE_BODY else {"parse_int": _whole, "parse_float": _real}
    try:
        text = body.decode("utf-8-sig")  # json.loads itself would let halves of pairs pass
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
            f"the request body holds up to {values} values, {containers} of them lists and "
            f"objects; at most {MAX_VALUES} and {MAX_CONTAINERS} are read. Send less at once"
        )


def check_depth(value: Any, name: str) -> None:
    """Refuse lists and objects that nest too deep; the refusal begins with `name`."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inside = (outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = [item for items in inside for item in items if isinstance(item, list | dict)]
        if not level:
            return
    raise UserError(f"{name} nests lists and objects too deep; at most {MAX_DEPTH} levels are read")


def _whole(text: str) -> int:
    return int(text)


def _real(text: str) -> float:
    return float(text)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def show_value(value: Any) -> str:
    """The beginning of a value; of large ones not all is written first."""
    if isinstance(value, str | bytes):
        value = value[:200]
    elif isinstance(value, list):
        value = value[:40]
    elif isinstance(value, dict):
        value = dict(itertools.islice(value.items(), 40))
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


class Fields:
    """Typed access to one JSON object. A missing or null field without default is refused."""

    _REQUIRED: Any = object()

    def __init__(self, values: dict[str, Any], *, prefix: str = "", is_large: bool = False) -> None:
        """`is_large` says that whoever reads all of it should do so on another thread."""
        self.values = values
        self.prefix = prefix
        self.is_large = is_large

    def _refuse(self, name: str, value: Any, expected: str) -> UserError:
        return UserError(
            f"{self.prefix}{name}={show_value(value)} is not accepted; expected {expected}"
        )

    def _get(self, name: str, default: Any, expected: str) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is Fields._REQUIRED:
            raise UserError(f"{self.prefix}{name} is missing; expected {expected}")
        return None

    def only(self, *names: str) -> None:
        """Refuse fields that are not listed."""
        for name in self.values:
            if name not in names:
                raise UserError(
                    f"{self.prefix}{name[:80]} is not a known field; use one of {', '.join(names)}"
                )

    def text(self, name: str, default: Any = _REQUIRED, *, choices: Collection[str] = ()) -> Any:
        expected = f"one of {', '.join(choices)}" if choices else "a text"
        value = self._get(name, default, expected)
        if value is None:
            return default
        if not isinstance(value, str) or len(value) > MAX_TEXT or "\0" in value:
            raise self._refuse(name, value, f"{expected} of at most {MAX_TEXT} characters")
        if choices and value not in choices:
            raise self._refuse(name, value, expected)
        return value

    def integer(
        self,
        name: str,
        default: Any = _REQUIRED,
        *,
        minimum: int = -(2**63),
        maximum: int = 2**63 - 1,
    ) -> Any:
        expected = f"a whole number from {minimum} to {maximum}"
        value = self._get(name, default, expected)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self._refuse(name, value, expected)
        return value

    def number(
        self,
        name: str,
        default: Any = _REQUIRED,
        *,
        minimum: float = -math.inf,
        maximum: float = math.inf,
        below: float = math.inf,
    ) -> Any:
        """A finite float in [minimum, maximum], and less than `below` where that is given."""
        upper = f" and less than {below:g}" if math.isfinite(below) else ""
        upper = f" up to {maximum:g}" if math.isfinite(maximum) else upper
        lower = f" of at least {minimum:g}" if math.isfinite(minimum) else ""
        expected = f"a finite number{lower}{upper}"
        if name in self.values and self.values[name] is None:
            raise self._refuse(name, None, f"{expected} (NaN and infinity arrive as null)")
        value = self._get(name, default, expected)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._refuse(name, value, expected)
        try:
            number = float(value)
        except OverflowError as error:
            raise self._refuse(name, value, expected) from error
        if not math.isfinite(number) or not minimum <= number <= maximum or number >= below:
            raise self._refuse(name, value, expected)
        return number

    def flag(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self._get(name, default, "true or false")
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._refuse(name, value, "true or false")
        return value

    def object(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self._get(name, default, "an object")
        if value is None:
            return default
        if not isinstance(value, dict):
            raise self._refuse(name, value, "an object")
        return value

    def array(self, name: str, default: Any = _REQUIRED, *, max_items: int = 2**24) -> Any:
        value = self._get(name, default, "a list")
        if value is None:
            return default
        if not isinstance(value, list) or len(value) > max_items:
            raise self._refuse(name, value, f"a list of at most {max_items} items")
        return value

    def texts(self, name: str, default: Any = _REQUIRED, *, max_items: int = 1024) -> Any:
        value = self.array(name, default, max_items=max_items)
        if value is default:
            return default
        for item in value:
            if not isinstance(item, str) or len(item) > MAX_TEXT:
                raise self._refuse(name, item, f"texts of at most {MAX_TEXT} characters")
        return value

    def metadata(self, name: str) -> dict[str, str] | None:
        """A flat object of texts. Numbers and flags are kept as their JSON text."""
        value = self.object(name, None)
        if value is None:
            return None
        if len(value) > MAX_METADATA_ITEMS:
            raise self._refuse(name, value, f"at most {MAX_METADATA_ITEMS} entries")
        for key, item in value.items():
            if len(key) > MAX_TEXT or (isinstance(item, str) and len(item) > 16 * MAX_TEXT):
                raise self._refuse(f"{name}.{key[:40]}", item, "shorter keys and values")
        return {
            key: item if isinstance(item, str) else json.dumps(item) for key, item in value.items()
        }
