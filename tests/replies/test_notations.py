"""The notations of calls: what is written is read, and nothing is read that was not written."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinker_cookbook.renderers.notations.xml import value_text, xml_call_text
from tinker_cookbook.renderers.types import ToolCall
from tinker_cookbook.replies.json_calls import (
    read_json_call,
    read_json_calls,
    read_whole_reply,
    write_whole_reply,
)
from tinker_cookbook.replies.json_source import ends_in_string, json_text, load_json
from tinker_cookbook.replies.loose import read_calls
from tinker_cookbook.replies.pair_calls import read_pair_text
from tinker_cookbook.replies.pieces import BadCall, Call
from tinker_cookbook.replies.schema import fit_arguments, read_texts
from tinker_cookbook.replies.tag_calls import (
    PYTHON_WORDS,
    json_source,
    read_tag_calls,
    tags_are_open,
)

_MARKS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "; "),
    *("<function=g>", "</function>", "<parameter=b>", "</parameter>", "<arg_key>", "</arg_value>"),
    *("\n", '"', "\\", "{", "}", "true", "None", "1.50", "日本"),
]
TEXTS = st.lists(st.sampled_from(_MARKS) | st.text("ab <>/=\n", max_size=4), max_size=6).map(
    "".join
)
SCALARS = TEXTS | st.integers() | st.booleans() | st.none() | st.floats(-1e9, 1e9)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)
)
ARGUMENTS = st.dictionaries(st.text("abc_", min_size=1, max_size=4), VALUES, max_size=4)
_SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)


def block(*lines: str) -> str:
    return "".join(f"{line}\n" for line in lines)


@_SETTINGS
@given(ARGUMENTS, TEXTS)
def test_json_calls_come_back_to_the_letter(arguments: dict[str, Any], name: str):
    source = json_text(arguments)
    body = f'{{"name": {json_text(name)}, "arguments": {source}}}'
    read = read_json_call(body, body)
    assert read == (Call(name, source) if name else BadCall(body, read.error))  # type: ignore[union-attr]


@_SETTINGS
@given(st.lists(ARGUMENTS, min_size=1, max_size=3))
def test_replies_that_are_calls_alone_come_back(several: list[dict[str, Any]]):
    calls = [(f"f{number}", json_text(one)) for number, one in enumerate(several)]
    text = write_whole_reply(calls, "parameters")
    assert read_whole_reply(text, is_exact=True) == [Call(*call) for call in calls]


def as_call(arguments: dict[str, Any]) -> ToolCall:
    body = ToolCall.FunctionBody(name="f", arguments=json_text(arguments))
    return ToolCall(function=body)


@pytest.mark.parametrize("words", [{}, PYTHON_WORDS])
@_SETTINGS
@given(arguments=ARGUMENTS)
def test_tags_give_the_arguments_back_or_nothing(words: dict[str, str], arguments: dict[str, Any]):
    """What stands bare loses its type, never its text; a value full of tags may be given up."""
    written = xml_call_text(as_call(arguments), words)
    calls = read_tag_calls(f"\n{written}\n", "raw", words)
    if isinstance(calls[0], BadCall) or len(calls) > 1:
        assert any(
            "<parameter=" in json.dumps(v) or "</p" in json.dumps(v) for v in arguments.values()
        )
        return
    (call,) = calls
    assert isinstance(call, Call)
    if sum(json.dumps(v).count("</parameter>") for v in arguments.values()):
        return
    read = load_json(call.arguments)
    assert list(read) == list(arguments)
    again = ToolCall(function=ToolCall.FunctionBody(name=call.name, arguments=call.arguments))
    assert xml_call_text(again, words) == written


@_SETTINGS
@given(st.one_of(TEXTS, VALUES.map(json_text)), st.sampled_from([{}, PYTHON_WORDS]))
def test_bare_values_are_written_again_as_they_were(value: str, words: dict[str, str]):
    assert value_text(json_source(value, words), words) == value


@_SETTINGS
@given(ARGUMENTS)
def test_pairs_give_the_arguments_back(arguments: dict[str, Any]):
    values = {key: value_text(json_text(value), {}) for key, value in arguments.items()}
    if any("<arg_key>" in value or "</arg_value>" in value for value in values.values()):
        return
    pairs = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n"
        for key, value in values.items()
    )
    call = read_pair_text(f"f\n{pairs}", "raw")
    assert isinstance(call, Call)
    read = {key: json_text(value) for key, value in load_json(call.arguments).items()}
    assert {key: value_text(source, {}) for key, source in read.items()}.keys() == values.keys()


@pytest.mark.parametrize(
    "body",
    [
        block("<function=f>", "<parameter=a>", "1", "</function>"),
        block("<function=f>", "<parameter=a>", "1")
        + block("<parameter=b>", "2", "</parameter>", "</function>"),
        block(
            *("<function=f>", "<parameter=a>", "1", "</function>", "<function=g>"),
            *("<parameter=b>", "2", "</parameter>", "</function>"),
        ),
        block("<function=f>", "<parameter=a>", "1", "</parameter>"),
        block("<function=f>", "1", "</function>"),
        "<function=f></function>x",
    ],
)  # fmt: skip
def test_tags_that_are_missing_make_no_call(body: str):
    for is_strict in (True, False):
        (bad,) = read_tag_calls(body, "raw", PYTHON_WORDS, is_strict=is_strict)
        assert isinstance(bad, BadCall)


def test_a_value_may_hold_the_end_of_its_function():
    inner = "x </function> y\n</function>\nz </parameter> w"
    body = block("<function=f>", "<parameter=a>", inner, "</parameter>", "</function>")
    assert read_tag_calls(body, "raw", {}) == [Call("f", json_text({"a": inner}))]
    assert not tags_are_open(body)
    assert tags_are_open(body[: body.index(" w")])


def test_two_functions_in_a_block_are_two_calls():
    first = block("<function=f>", "<parameter=a>", "1", "</parameter>", "</function>")
    second = block("<function=g>", "<parameter=b>", "x", "</parameter>", "</function>")
    for is_strict in (True, False):
        calls = read_tag_calls(f"\n{first}{second}", "raw", {}, is_strict=is_strict)
        assert calls == [Call("f", '{"a": 1}'), Call("g", '{"b": "x"}')]


@pytest.mark.parametrize(
    ("value", "words", "source"),
    [
        ("true", PYTHON_WORDS, '"true"'),
        ("null", PYTHON_WORDS, '"null"'),
        ("True", PYTHON_WORDS, "true"),
        ("true", {}, "true"),
        ("True", {}, '"True"'),
        ("[true]", PYTHON_WORDS, "[true]"),
        ("NaN", {}, '"NaN"'),
        (" 1", {}, '" 1"'),
        ("1.50", {}, "1.50"),
    ],
)
def test_words_of_the_format(value: str, words: dict[str, str], source: str):
    assert json_source(value, words) == source


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_what_is_not_json_is_no_call(constant: str):
    body = f'{{"name": "f", "arguments": {{"a": {constant}}}}}'
    assert isinstance(read_json_call(body, body), BadCall)
    assert isinstance(read_json_calls(f"[{body}]", body)[0], BadCall)
    assert read_whole_reply(body.replace("arguments", "parameters")) is None


@pytest.mark.parametrize(
    ("text", "is_open"),
    [
        ('{"a": "b', True),
        ('{"a": "b\\"', True),
        ('{"a": "b\\', True),
        ('{"a": "b"', False),
        ('{"a": "b\n', False),
        ("{", False),
    ],
)
def test_where_json_ends_in_a_string(text: str, is_open: bool):
    assert ends_in_string(text) == is_open


def test_arguments_take_the_types_that_are_declared():
    schema = {
        "properties": {
            "zip": {"type": "string"},
            "maybe": {"type": ["string", "null"]},
            "flag": {"type": "boolean"},
            "count": {"$ref": "#/$defs/count"},
            "any": {},
        },
        "$defs": {"count": {"type": "integer"}},
    }
    given = '{"zip": 90210, "maybe": null, "flag": "True", "count": "3", "any": 1, "other": 2}'
    kept = fit_arguments(given, schema, PYTHON_WORDS)
    assert kept == given.replace("90210", '"90210"')
    read = read_texts(kept, schema, PYTHON_WORDS)
    wanted = '{"zip": "90210", "maybe": null, "flag": true, "count": 3, "any": 1, "other": 2}'
    assert read == wanted
    text = '{"count": "three"}'
    assert read_texts(text, schema, {}) == text
    for odd in ({"properties": 1}, {"properties": {"a": {"enum": 3, "anyOf": 1, "type": [[]]}}}):
        assert fit_arguments('{"a": 1}', odd, {}) == '{"a": 1}'


NULLABLE = [
    {"type": ["string", "null"]},
    {"anyOf": [{"type": "string"}, {"type": "null"}]},
    {"type": "string", "nullable": True},
]
NOTATIONS = [
    "<function=f>\n<parameter=a>\n{}\n</parameter>\n</function>",
    "f\n<arg_key>a</arg_key>\n<arg_value>{}</arg_value>",
]


@pytest.mark.parametrize("notation", NOTATIONS)
@pytest.mark.parametrize(
    ("schema", "value", "source"),
    [
        # A text keeps its letters, also where they spell a truth value in JSON or in Python.
        *(({"type": "string"}, word, f'"{word}"') for word in ("true", "True", "null", "None")),
        *((schema, "null", "null") for schema in NULLABLE),
        *((schema, "true", '"true"') for schema in NULLABLE),
        *(({"type": "boolean"}, word, "true") for word in ("true", "True")),
        ({}, "true", "true"),
        ({}, "5", "5"),
        ({"type": "integer", "nullable": True}, "5", "5"),
        ({"$ref": "#/definitions/Text"}, "5", '"5"'),
        ({"$ref": "#/$defs/Text"}, "5", "5"),
        ({"allOf": [{"$ref": "#/definitions/Text"}, {"description": "A word."}]}, "5", '"5"'),
        ({"allOf": [{"description": "A word."}]}, "5", "5"),
    ],
)
def test_values_without_types_take_the_declared_ones_to_the_letter(
    notation: str, schema: dict[str, Any], value: str, source: str
):
    parameters = {"properties": {"a": schema}, "definitions": {"Text": {"type": "string"}}}
    tool = {"name": "f", "parameters": parameters}
    body = notation.format(value)
    assert read_calls(body, f"<tool_call>{body}</tool_call>", [tool]) == [
        Call("f", f'{{"a": {source}}}')
    ]
