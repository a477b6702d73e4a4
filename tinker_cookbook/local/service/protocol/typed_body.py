"""Read a JSON object into the dataclass that declares it, with types, limits and names checked.

    @dataclass(frozen=True, kw_only=True)
    class SaveRequest:
        path: Annotated[str, check_name]
        seq_id: Annotated[int, Range(1, 100)]
        overwrite: bool = False

    read_as(SaveRequest, {"path": "final", "seq_id": 3})

A field that is missing or null takes its default; without a default it is refused. Unknown fields
are ignored, unless the class sets `refuses_unknown = True`. These types can be declared:

- `str`, `bool`, `Literal["a", "b"]` (one of the texts), and `dict[str, str]` (metadata);
- `int` and `float`, with an optional `Range`. A `float` must be finite, and null is refused,
  because clients write NaN and infinity as null;
- another such dataclass, `list[TYPE]`, and `JsonObject` for any object;
- `object` and `list[object]`: any values, which are not looked at. Large arrays are declared like
  this and converted by numpy at once;
- `TYPE | None`, and `Annotated[TYPE, ...]` with an `AtMost` number of characters or items, a
  `Reader`, or a function that checks the value and returns it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.limits import INT64, Range
from tinker_cookbook.local.service.protocol.json_body import show_value
from tinker_cookbook.utils.nearest_name import did_you_mean

__all__ = ["AtMost", "NotAcceptedError", "Reader", "read_as"]

MAX_TEXT = 4096
MAX_LIST = 2**24
MAX_TEXTS = 1024
MAX_METADATA_ITEMS = 256
MAX_METADATA_TEXT = 16 * MAX_TEXT

Body = TypeVar("Body")
Check = Callable[[object], object]


class NotAcceptedError(Exception):
    """A value does not have the declared type or limits; the message may hold a hint."""


@dataclass(frozen=True)
class AtMost:
    """Maximum number of characters of a text or items of a list."""

    number: int


@dataclass(frozen=True)
class Reader:
    """How a value of one type is checked and converted."""

    expected: str
    """What is accepted, in words."""
    convert: Callable[[object, str], object]
    """Return the value of the field, given the JSON value and the name of its place in the request.

    It raises NotAcceptedError, or a UserError that says more.
    """
    refuses_null: bool = False

    def read(self, value: object, where: str) -> object:
        try:
            return self.convert(value, where)
        except NotAcceptedError as error:
            hint = f".{error}" if str(error) else ""
            raise UserError(
                f"{where}={show_value(value)} is not accepted; expected {self.expected}{hint}"
            ) from None


def read_as(cls: type[Body], values: Mapping[str, object], *, prefix: str = "") -> Body:
    """Build a dataclass from a JSON object.

    Args:
        prefix: the path of the object in the request, such as `lora_config.`, for error messages.

    Raises:
        UserError: a field is missing, unknown or not accepted. The message names its path, its
            value and what is accepted.
    """
    declared = _fields_of(cls)
    if getattr(cls, "refuses_unknown", False):
        refuse_unknown(values, [field.name for field in declared], prefix=prefix)
    found: dict[str, object] = {}
    for field in declared:
        where, value = prefix + field.name, values.get(field.name)
        if value is not None:
            found[field.name] = field.reader.read(value, where)
        elif field.reader.refuses_null and field.name in values:
            raise UserError(
                f"{where}=None is not accepted; expected {field.reader.expected} (NaN and infinity "
                "arrive as null)"
            )
        elif field.is_required:
            raise UserError(f"{where} is missing; expected {field.reader.expected}")
    return cast(Callable[..., Body], cls)(**found)


def refuse_unknown(values: Mapping[str, object], known: list[str], *, prefix: str = "") -> None:
    """Raise UserError for the first unknown field; the message suggests the nearest known name."""
    for name in values:
        if name not in known:
            raise UserError(
                f"{prefix}{name[:80]} is not a known field; use one of {', '.join(known)}."
                f"{did_you_mean(name[:80], known)}"
            )


@dataclass(frozen=True)
class _Field:
    name: str
    reader: Reader
    is_required: bool


@cache
def _fields_of(cls: type) -> tuple[_Field, ...]:
    assert is_dataclass(cls), f"{cls} is not a dataclass"
    types = get_type_hints(cls, include_extras=True)
    return tuple(
        _Field(
            field.name,
            _reader_of(types[field.name], ()),
            is_required=field.default is MISSING and field.default_factory is MISSING,
        )
        for field in fields(cls)
    )


def _reader_of(kind: object, marks: tuple[object, ...]) -> Reader:
    """Return the reader of a declared type; `marks` are the arguments of `Annotated` around it."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _reader_of(inner[0], (*inner[1:], *marks))
    given = next((mark for mark in marks if isinstance(mark, Reader)), None)
    if given is None and origin in (Union, UnionType):
        (only,) = (part for part in inner if part is not NoneType)
        return _reader_of(only, marks)
    reader = given or _plain_reader(kind, marks)
    for mark in marks:
        if not isinstance(mark, Reader | Range | AtMost):
            reader = _checked(reader, cast(Check, mark))
    return reader


def _plain_reader(kind: object, marks: tuple[object, ...]) -> Reader:
    origin, inner = get_origin(kind), get_args(kind)
    accepted = next((mark for mark in marks if isinstance(mark, Range)), None)
    limit = next((mark.number for mark in marks if isinstance(mark, AtMost)), None)
    if origin is Literal:
        return _choice(cast(tuple[str, ...], inner))
    if origin is list:
        default = MAX_TEXTS if inner[0] is str else MAX_LIST
        return _list(_reader_of(inner[0], ()), limit or default)
    if origin is dict:
        return _METADATA if inner[1] is str else _OBJECT
    if kind is str:
        return _text(limit or MAX_TEXT)
    if kind is int:
        return _whole(accepted or INT64)
    if kind is float:
        return _number(accepted or Range())
    if isinstance(kind, type) and is_dataclass(kind):
        return _nested(kind)
    readers: dict[object, Reader] = {bool: _FLAG, object: _ANYTHING}
    return readers[kind]


def _checked(reader: Reader, check: Check) -> Reader:
    def convert(value: object, where: str) -> object:
        return check(reader.convert(value, where))

    return Reader(reader.expected, convert, reader.refuses_null)


def _text(limit: int) -> Reader:
    def convert(value: object, where: str) -> str:
        if not isinstance(value, str) or len(value) > limit or "\0" in value:
            raise NotAcceptedError
        return value

    return Reader(f"a text of at most {limit} characters", convert)


def _choice(choices: tuple[str, ...]) -> Reader:
    def convert(value: object, where: str) -> str:
        if value not in choices or not isinstance(value, str):
            raise NotAcceptedError(
                did_you_mean(value[:80], choices) if isinstance(value, str) else ""
            )
        return value

    return Reader(f"one of {', '.join(choices)}", convert)


def _whole(accepted: Range) -> Reader:
    def convert(value: object, where: str) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value not in accepted:
            raise NotAcceptedError
        return value

    return Reader(f"a whole number{accepted}", convert)


def _number(accepted: Range) -> Reader:
    def convert(value: object, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise NotAcceptedError
        try:
            number = float(value)
        except OverflowError as error:
            raise NotAcceptedError from error
        if not math.isfinite(number) or number not in accepted:
            raise NotAcceptedError
        return number

    return Reader(f"a finite number{accepted}", convert, refuses_null=True)


def _list(items: Reader, limit: int) -> Reader:
    def convert(value: object, where: str) -> list[object]:
        if not isinstance(value, list) or len(value) > limit:
            raise NotAcceptedError
        if items is _ANYTHING:
            return value
        return [items.read(item, f"{where}[{index}]") for index, item in enumerate(value)]

    return Reader(f"a list of at most {limit} items", convert)


def _nested(cls: type) -> Reader:
    def convert(value: object, where: str) -> object:
        if not isinstance(value, dict):
            raise NotAcceptedError
        return read_as(cls, value, prefix=f"{where}.")

    return Reader("an object", convert)


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise NotAcceptedError
    return value


def _object(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise NotAcceptedError
    return value


def _metadata(value: object, where: str) -> dict[str, str]:
    """Read a flat object of texts. Other values are kept as their JSON text."""
    if not isinstance(value, dict) or len(value) > MAX_METADATA_ITEMS:
        raise NotAcceptedError
    for key, item in value.items():
        is_long = isinstance(item, str) and len(item) > MAX_METADATA_TEXT
        if len(key) > MAX_TEXT or is_long:
            raise UserError(
                f"{where}.{key[:40]}={show_value(item)} is not accepted; expected a key of at most "
                f"{MAX_TEXT} and a value of at most {MAX_METADATA_TEXT} characters"
            )
    return {key: item if isinstance(item, str) else json.dumps(item) for key, item in value.items()}


def _anything(value: object, where: str) -> object:
    return value


_FLAG = Reader("true or false", _flag)
_OBJECT = Reader("an object", _object)
_METADATA = Reader(f"an object of at most {MAX_METADATA_ITEMS} entries", _metadata)
_ANYTHING = Reader("a value", _anything)
