"""Bodies become dataclasses with types and limits checked; errors name the field and the value."""

# pyright: reportArgumentType=false

from __future__ import annotations

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import pytest

from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.limits import Range
from tinker_cookbook.local.service.protocol import bodies
from tinker_cookbook.local.service.protocol.json_body import parse_json_object
from tinker_cookbook.local.service.protocol.token_arrays import INTEGERS, TOKEN_IDS
from tinker_cookbook.local.service.protocol.typed_body import AtMost, read_as


@dataclass(frozen=True, kw_only=True)
class Inner:
    refuses_unknown: ClassVar[bool] = True
    flag: bool
    words: Annotated[list[str], AtMost(2)] | None = None


def check_even(number: int) -> int:
    if number % 2:
        raise UserError(f"even={number} is odd; use an even number")
    return number


@dataclass(frozen=True, kw_only=True)
class Outer:
    """One field of every kind."""

    count: Annotated[int, Range(0, 9)] = 3
    any_int: int | None = None
    share: Annotated[float, Range(0, 1, excludes_highest=True)] = 0.5
    text: str | None = None
    short: Annotated[str, AtMost(3)] = ""
    kind: Literal["snapshot", "inflight"] = "snapshot"
    even: Annotated[int, check_even] = 0
    inner: Inner | None = None
    inners: list[Inner] = dataclasses.field(default_factory=list)
    user_metadata: dict[str, str] | None = None
    values: dict[str, object] = dataclasses.field(default_factory=dict)
    items: list[object] = dataclasses.field(default_factory=list)
    tokens: Annotated[np.ndarray, TOKEN_IDS] | None = None
    numbers: Annotated[np.ndarray, INTEGERS] | None = None


@dataclass(frozen=True, kw_only=True)
class Required:
    name: str


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"{", "not JSON"),
        (b"[1]", "JSON list"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (rb'{"a": "\ud800"}', "surrogates not allowed"),
        (rb'{"a": {"\uDC00": 1}}', "surrogates not allowed"),
        (b'{"a": "\xed\xa0\x80"}', "not JSON"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "too deep; at most 100 levels"),
        (b'{"a": ' * 500 + b"1" + b"}" * 500, "too deep; at most 100 levels"),
    ],
)
def test_bodies_that_are_no_object_are_refused(body: bytes, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        parse_json_object(body)


@pytest.mark.parametrize("body", [b"", b"null", b"{}"])
def test_empty_bodies_are_empty_objects(body: bytes) -> None:
    assert parse_json_object(body) == {}


def test_whole_surrogate_pairs_are_text() -> None:
    assert parse_json_object(rb'{"a": "\ud83d\ude00"}') == {"a": "\U0001f600"}


def test_fields_have_their_values_or_their_defaults() -> None:
    assert read_as(Outer, {}) == Outer()
    assert read_as(Outer, {"count": None, "text": None, "unknown": 1}) == Outer()
    read = read_as(
        Outer,
        {"count": 4.0, "share": 0, "text": "x", "kind": "inflight", "even": 2, "items": [1, "a"]}
        | {"inner": {"flag": True, "words": ["a"]}, "inners": [{"flag": False}], "values": {"a": 1}}
        | {"user_metadata": {"a": "b", "n": 3, "nested": {"x": 1}}},
    )
    assert read == Outer(
        count=4,
        share=0.0,
        text="x",
        kind="inflight",
        even=2,
        items=[1, "a"],
        inner=Inner(flag=True, words=["a"]),
        inners=[Inner(flag=False)],
        values={"a": 1},
        user_metadata={"a": "b", "n": "3", "nested": '{"x": 1}'},
    )
    assert type(read.share) is float


def test_arrays_are_converted_at_once() -> None:
    read = read_as(Outer, {"tokens": [1, 2], "numbers": [-1, 2**40]})
    assert read.tokens is not None
    assert read.numbers is not None
    assert (read.tokens.dtype, read.numbers.dtype) == (np.int32, np.int64)
    assert (read.tokens.tolist(), read.numbers.tolist()) == ([1, 2], [-1, 2**40])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": True}, r"p.count=True is not accepted; expected a whole number from 0 up to 9"),
        ({"count": 1.5}, "p.count=1.5"),
        ({"count": "1"}, "p.count='1'"),
        ({"count": -1}, "p.count=-1"),
        ({"any_int": 2**63}, "p.any_int=9223372036854775808"),
        ({"share": None}, "p.share=None.*arrive as null"),
        ({"share": 10**400}, "p.share=1000"),
        ({"share": 1.0}, "p.share=1.0.*a finite number from 0 to less than 1"),
        ({"text": "a\0b"}, "p.text="),
        ({"text": "x" * 5000}, "at most 4096 characters"),
        ({"short": "abcd"}, "at most 3 characters"),
        ({"kind": "c"}, "p.kind='c' is not accepted; expected one of snapshot, inflight$"),
        ({"kind": "inflght"}, "Did you mean 'inflight'"),
        ({"kind": ["snapshot"]}, "p.kind="),
        ({"even": 3}, "even=3 is odd"),
        ({"inner": {}}, "p.inner.flag is missing; expected true or false"),
        ({"inner": {"flag": 1}}, "p.inner.flag=1.*true or false"),
        ({"inner": {"flag": True, "wrods": []}}, "p.inner.wrods is not a known.*mean 'words'"),
        ({"inner": {"flag": True, "words": [1]}}, r"p.inner.words\[0\]=1.*a text"),
        ({"inner": {"flag": True, "words": ["a"] * 3}}, "at most 2 items"),
        ({"inners": [{"flag": True}, 3]}, r"p.inners\[1\]=3.*an object"),
        ({"user_metadata": {str(n): "" for n in range(300)}}, "at most 256 entries"),
        ({"user_metadata": {"a": "x" * 70_000}}, "p.user_metadata.a='xxx"),
        ({"tokens": [1, -1]}, r"p.tokens\[1\]=-1 is not a token id"),
        ({"tokens": [True]}, r"p.tokens\[0\]=True"),
        ({"tokens": "x"}, "p.tokens='x'.*a list of token ids"),
        ({"numbers": [1, 2**63]}, r"p.numbers\[1\]="),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_as(Outer, values, prefix="p.")


def test_fields_without_a_default_are_required() -> None:
    for values in ({}, {"name": None}):
        with pytest.raises(UserError, match=r"^name is missing; expected a text"):
            read_as(Required, values)


def test_every_declared_body_can_be_read() -> None:
    """A type that the reader does not know would fail at the first request only."""
    declared = [getattr(bodies, name) for name in bodies.__all__]
    for cls in filter(dataclasses.is_dataclass, declared):
        with suppress(UserError):  # a required field
            read_as(cls, {})


def test_values_may_nest_a_hundred_levels_beside_many_brackets_in_texts() -> None:
    body = b'{"text": "' + b"[" * 1000 + b'", "a": ' + b"[" * 99 + b"]" * 99 + b"}"
    assert parse_json_object(body)["text"] == "[" * 1000


def test_a_long_name_is_not_repeated() -> None:
    with pytest.raises(UserError, match=r"^x{80} is not a known field") as caught:
        read_as(Inner, {"x" * 10**6: 1})
    assert len(str(caught.value)) < 200
