"""Request bodies: what clients send and means nothing, histories as clients keep them."""

# pyright: reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

import pytest

from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.openai_api.requests import (
    decode_chat_request,
    decode_completion_request,
)

HELLO = [{"role": "user", "content": "Hello"}]


def decode(**fields: Any):
    return decode_chat_request({"model": "m", "messages": HELLO} | fields)


def decode_reply(**fields: Any) -> dict[str, Any]:
    return decode(messages=[*HELLO, {"role": "assistant", **fields}]).messages[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"prediction": None, "web_search_options": None, "audio": None, "anything": None},
        {"functions": [], "function_call": None},
        {"functions": None, "function_call": "auto"},
        {"ignore_eos": False, "skip_special_tokens": True, "echo": False, "best_of": 1},
        {"min_tokens": 0, "length_penalty": 1.0, "use_beam_search": False, "bad_words": []},
        {"presence_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"}},
        {"add_generation_prompt": True, "continue_final_message": False, "documents": []},
        {"detokenize": True, "include_reasoning": True, "add_special_tokens": False},
        {"priority": 0, "request_id": "r1"},
        {"tools": None, "tool_choice": None, "stop": None, "stream_options": None, "seed": None},
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(fields: dict[str, Any]) -> None:
    assert decode(**fields) == decode()


@pytest.mark.parametrize(
    "fields",
    [
        {"prediction": {"type": "content", "content": "x"}},
        {"functions": [{"name": "f"}]},
        {"ignore_eos": True},
        {"skip_special_tokens": False},
        {"echo": True},
        {"min_tokens": 5},
        {"include_reasoning": False},
        {"temprature": 1},
    ],
)
def test_fields_that_ask_for_something_are_refused_by_name(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(UserError, match=f"^{name}"):
        decode(**fields)


def test_completions_take_empty_fields_too() -> None:
    given = {"model": "m", "prompt": "x"}
    empty = {"suffix": None, "prediction": None, "ignore_eos": False, "echo": None}
    assert decode_completion_request(given | empty) == decode_completion_request(given)


@pytest.mark.parametrize("arguments", [None, "null", "", " ", "{}", {}])
def test_calls_without_arguments_have_an_empty_object(arguments: Any) -> None:
    message = decode_reply(tool_calls=[{"function": {"name": "f", "arguments": arguments}}])
    assert message["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize("arguments", ["[1]", "3", '"text"', "{", '{"a": NaN}', 3, [1]])
def test_arguments_that_are_no_object_are_refused_by_name(arguments: Any) -> None:
    with pytest.raises(UserError, match=r"^messages\[1\]\.tool_calls\[0\]\.function\.arguments"):
        decode_reply(tool_calls=[{"function": {"name": "f", "arguments": arguments}}])


def test_reasoning_of_a_history_has_several_names() -> None:
    assert decode_reply(content="4", reasoning="add")["reasoning_content"] == "add"
    assert decode_reply(content="4", reasoning_content="add")["reasoning_content"] == "add"
    both = decode_reply(content="4", reasoning="x", reasoning_content="add")
    assert both["reasoning_content"] == "add"
    assert decode_reply(content="4", thinking="add")["reasoning_content"] == "add"
    assert "reasoning_content" not in decode_reply(content="4", reasoning=None)
    assert decode_reply(content="<think>\nadd\n</think>\n\n4")["reasoning_content"] == "add"
    with pytest.raises(UserError, match=r"^messages\[1\]\.reasoning="):
        decode_reply(content="4", reasoning={"effort": "high"})


def test_the_number_of_choices_is_limited() -> None:
    assert decode(n=1024).sampling.n == 1024
    for n in (0, 1025):
        with pytest.raises(UserError, match=f"^n={n} .* from 1 up to 1024$"):
            decode(n=n)


@pytest.mark.parametrize("name", ["reasoning_details", "thinking_blocks"])
def test_reasoning_in_lists_is_refused_by_name_unless_it_is_sent_as_text_too(name: str) -> None:
    details = [{"type": "reasoning.text", "text": "add"}]
    with pytest.raises(UserError, match=rf"^messages\[1\]\.{name}=\["):
        decode_reply(content="4", **{name: details})
    both = decode_reply(content="4", reasoning_content="add", **{name: details})
    assert both["reasoning_content"] == "add"
    assert "reasoning_content" not in decode_reply(content="4", **{name: []})


def test_calls_of_old_clients_are_calls() -> None:
    call = {"name": "f", "arguments": '{"a": 1}'}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "f", "content": "7"},
    ]
    [_, reply, result] = decode(messages=messages).messages
    function = {"name": "f", "arguments": {"a": 1}}
    assert reply["tool_calls"] == [{"type": "function", "function": function}]
    assert result == {"role": "tool", "content": "7", "name": "f"}
    with pytest.raises(UserError, match=r"^messages\[1\]\.function_call\.function\.arguments"):
        decode_reply(content=None, function_call=call | {"arguments": "[1]"})


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_parts_of_text_have_several_names(kind: str) -> None:
    parts = [{"type": kind, "text": "4", "cache_control": {"type": "ephemeral"}}]
    assert decode_reply(content=parts)["content"] == "4"


@pytest.mark.parametrize(
    "name", ["messages", "tools", "documents", "add_generation_prompt", "self"]
)
def test_variables_that_the_request_sets_are_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=f"^chat_template_kwargs.{name} is not accepted"):
        decode(chat_template_kwargs={name: False})


def test_the_generation_prompt_may_be_asked_for() -> None:
    assert decode(
        chat_template_kwargs={"add_generation_prompt": True, "x": 1}
    ).template_options == {"x": 1}


def test_arguments_that_nest_too_deep_are_refused_by_name() -> None:
    deep = '{"a": ' * 500 + "1" + "}" * 500
    with pytest.raises(UserError, match=r"function\.arguments nests lists and objects too deep"):
        decode_reply(tool_calls=[{"function": {"name": "f", "arguments": deep}}])


def test_rules_have_their_values() -> None:
    sampling = decode(
        presence_penalty=0.5,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        min_p=0.1,
        logit_bias={"7": -100, "9": 2.5},
    ).sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -1)
    assert (sampling.repetition_penalty, sampling.min_p) == (1.1, 0.1)
    assert sampling.logit_bias == {7: -100, 9: 2.5}


@pytest.mark.parametrize("bias", [{"x": 1}, {"-1": 1}, {"7": 101}, {"7": "1"}, {"7": True}])
def test_a_wrong_bias_is_named(bias: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^logit_bias has"):
        decode(logit_bias=bias)


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("choice", "names", "must_call"),
    [
        ("auto", ["f", "g"], False),
        ("none", [], False),
        ("required", ["f", "g"], True),
        (tool("g"), ["g"], True),
        ({"type": "function", "name": "g"}, ["g"], True),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool("f")]}},
            ["f"],
            False,
        ),
        ({"type": "allowed_tools", "mode": "required", "tools": [tool("f")]}, ["f"], True),
    ],
)
def test_choices_of_tools(choice: object, names: list[str], must_call: bool) -> None:
    asked = decode(tools=[tool("f"), tool("g")], tool_choice=choice)
    assert [one["function"]["name"] for one in asked.tools] == names
    assert asked.sampling.shape.must_call is must_call


@pytest.mark.parametrize("choice", ["any", 3, {"type": "x"}, tool("h"), {"type": "function"}])
def test_a_wrong_choice_of_tools_is_named(choice: object) -> None:
    with pytest.raises(UserError, match=r"^tool_choice="):
        decode(tools=[tool("f")], tool_choice=choice)


def test_formats_of_replies() -> None:
    assert not decode(response_format={"type": "text"}).sampling.shape
    anything = decode(response_format={"type": "json_object"}).sampling.shape
    assert anything.schema == {"type": "object"}
    schema = {"enum": [1, 2]}
    given = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    shape = decode(response_format=given).sampling.shape
    assert (shape.schema, shape.schema_field) == (schema, "response_format.json_schema.schema")
    for wrong in ("json", {"type": "json"}, {"type": "json_schema", "json_schema": {"name": "n"}}):
        with pytest.raises(UserError, match=r"^response_format"):
            decode(response_format=wrong)


def test_images_are_taken_out_of_messages() -> None:
    url = "data:image/png;base64,AAEC"
    parts = [
        {"type": "text", "text": "See"},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "input_image", "image_url": url.replace("png", "jpg")},
    ]
    asked = decode(messages=[{"role": "user", "content": parts}])
    assert asked.messages[0]["content"] == [
        {"type": "text", "text": "See"},
        {"type": "image"},
        {"type": "image"},
    ]
    assert [picture.format for picture in asked.pictures] == ["png", "jpeg"]
    assert asked.pictures[0].data == b"\x00\x01\x02"


@pytest.mark.parametrize(
    "url", ["https://example.com/a.png", "data:image/gif;base64,AA==", "data:image/png;base64,?", 3]
)
def test_an_image_that_is_not_in_the_request_is_refused(url: object) -> None:
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(UserError, match=r"^messages\[0\]\.content\[0\]\.image_url"):
        decode(messages=[{"role": "user", "content": parts}])
    with pytest.raises(UserError, match=r"use text$"):
        decode_reply(content=parts)
