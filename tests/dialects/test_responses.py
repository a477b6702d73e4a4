"""Requests of the Responses API as chat requests, and replies as its events."""

from __future__ import annotations

from typing import Any

import pytest

from tinker_cookbook.dialects.pieces import Ending, Piece
from tinker_cookbook.dialects.responses import ResponseWriter, read_responses_request
from tinker_cookbook.exceptions import DataFormatError

CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}


def read(**fields: Any) -> dict[str, Any]:
    return read_responses_request({"model": "m", "input": "Hello"} | fields)


def test_items_of_one_reply_are_one_message():
    text = {"type": "output_text", "text": "I look.", "annotations": []}
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "See"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [text], "status": "completed"},
        {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": '{"a":1}'},
        {"type": "function_call", "call_id": "call_2", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "seven"},
        {"type": "function_call_output", "call_id": "call_2", "output": "none"},
        {"type": "message", "role": "assistant", "content": "Seven."},
        {"type": "message", "role": "assistant", "content": "Really."},
    ]
    body = read(input=items, instructions="Be kind.")
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "tool", "assistant", "assistant"]
    reply = body["messages"][2]
    assert (reply["content"], reply["reasoning_content"]) == ("I look.", "hm")
    assert [call["id"] for call in reply["tool_calls"]] == ["call_1", "call_2"]
    assert reply["tool_calls"][0] == CALL


def test_settings_have_the_names_of_a_chat_request():
    schema = {"type": "object"}
    body = read(
        max_output_tokens=5,
        tools=[{"type": "function", "name": "f", "parameters": schema, "strict": True}],
        tool_choice={"type": "function", "name": "f"},
        text={"format": {"type": "json_schema", "name": "n", "schema": schema}},
        reasoning={"effort": "low"},
        store=True,
        metadata={"a": "b"},
    )
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_completion_tokens": 5,
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
        ],
        "tool_choice": {"type": "function", "name": "f"},
        "response_format": {"type": "json_schema", "json_schema": {"schema": schema}},
        "reasoning_effort": "low",
    }


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"input": []}, "^input is empty"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, r"^input\[0\]\.type=.item_reference"),
        ({"input": [{"role": "tool", "content": "x"}]}, r"^input\[0\]\.role"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input_file"),
        ({"previous_response_id": "resp_1"}, "^previous_response_id .* input items"),
        ({"background": True}, "^background=true"),
        ({"tools": [{"type": "web_search"}]}, r"^tools\[0\]\.type"),
        ({"temprature": 1}, "^temprature is not a known field"),
    ],
)
def test_what_cannot_be_done_is_named(fields: dict[str, Any], said: str):
    with pytest.raises(DataFormatError, match=said):
        read(**fields)


def test_a_stream_gives_the_items_of_the_whole_response():
    pieces = [
        Piece("reasoning", "hm"),
        Piece("content", "I "),
        Piece("content", "look."),
        Piece("tool_call", call=CALL),
    ]
    ending = Ending("tool_calls", prompt_tokens=20, sampled_tokens=7)
    whole = ResponseWriter("m", {"metadata": {"a": "b"}}, "r").whole(pieces, ending)
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call"]
    assert whole["output"][1]["content"][0]["text"] == "I look."
    assert whole["output"][2]["arguments"] == '{"a":1}'
    assert (whole["id"], whole["status"], whole["metadata"]) == ("resp_r", "completed", {"a": "b"})
    writer = ResponseWriter("m", {}, "r")
    events = [*writer.opening(20), *(e for p in pieces for e in writer.take(p))]
    events += writer.closing(ending)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    last = events[-1]
    assert last["type"] == "response.completed"
    for mine, other in zip(last["response"]["output"], whole["output"], strict=True):
        assert {**mine, "id": ""} == {**other, "id": ""}
    done = [
        event["item"]["type"] for event in events if event["type"] == "response.output_item.done"
    ]
    assert done == ["reasoning", "message", "function_call"]


def test_a_reply_that_was_cut_is_incomplete():
    response = ResponseWriter("m", {}).whole([Piece("content", "x")], Ending("length", 1, 1))
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
