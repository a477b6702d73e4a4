"""JSON values are read with their types checked, and refusals name the field and the value."""

import pytest

from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.service.protocol.fields import Fields, parse_json_object


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


def test_values_come_back_with_their_defaults() -> None:
    fields = Fields({"n": 3, "x": 2, "s": "text", "b": True, "f": 4.0, "none": None})
    assert fields.integer("n") == 3
    assert fields.integer("f") == 4
    assert fields.number("x") == 2.0
    assert fields.text("s") == "text"
    assert fields.flag("b") is True
    assert fields.integer("missing", 7) == 7
    assert fields.text("none", None) is None


@pytest.mark.parametrize(
    ("values", "read", "message"),
    [
        ({"n": True}, lambda f: f.integer("n"), "p.n=True"),
        ({"n": 1.5}, lambda f: f.integer("n"), "p.n=1.5"),
        ({"n": "1"}, lambda f: f.integer("n"), "p.n='1'"),
        ({"n": -1}, lambda f: f.integer("n", minimum=0), "p.n=-1"),
        ({}, lambda f: f.integer("n"), "p.n is missing"),
        ({"x": None}, lambda f: f.number("x", 1.0), "arrive as null"),
        ({"x": 10**400}, lambda f: f.number("x"), "p.x=1000"),
        ({"x": 1.0}, lambda f: f.number("x", below=1.0), "less than 1"),
        ({"s": "a\0b"}, lambda f: f.text("s"), "p.s="),
        ({"s": "x" * 5000}, lambda f: f.text("s"), "4096"),
        ({"s": "c"}, lambda f: f.text("s", choices=("a", "b")), "one of a, b"),
        ({"b": 1}, lambda f: f.flag("b"), "true or false"),
        ({"typo": 1}, lambda f: f.only("known"), "p.typo is not a known field"),
        ({"l": [1]}, lambda f: f.texts("l"), "texts"),
    ],
)
def test_wrong_values_are_refused_by_name(values, read, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(Fields(values, prefix="p."))


def test_metadata_values_become_texts() -> None:
    fields = Fields({"user_metadata": {"a": "b", "n": 3, "nested": {"x": 1}}})
    assert fields.metadata("user_metadata") == {"a": "b", "n": "3", "nested": '{"x": 1}'}


def test_values_may_nest_a_hundred_levels_beside_many_brackets_in_texts() -> None:
    body = b'{"text": "' + b"[" * 1000 + b'", "a": ' + b"[" * 99 + b"]" * 99 + b"}"
    assert parse_json_object(body)["text"] == "[" * 1000


def test_a_long_name_is_not_repeated() -> None:
    with pytest.raises(UserError, match=r"^x{80} is not a known field") as caught:
        Fields({"x" * 10**6: 1}).only("a", "b")
    assert len(str(caught.value)) < 200
