"""Requests of the Messages API as chat requests, and replies as its events."""

from __future__ import annotations

from typing import Any

import pytest

from tinker_cookbook.dialects.anthropic import MessageWriter, error_body, read_messages_request
from tinker_cookbook.dialects.pieces import Ending, Piece
from tinker_cookbook.exceptions import DataFormatError

USER: dict[str, Any] = {"role": "user", "content": "Hello"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def read(**fields: Any) -> dict[str, Any]:
    return read_messages_request({"model": "m", "max_tokens": 9, "messages": [USER]} | fields)


def test_a_conversation_with_a_tool_becomes_chat_messages():
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    body = read(
        system=[{"type": "text", "text": "Be kind."}, {"type": "text", "text": "Be short."}],
        messages=[
            {
                "role": "user",
                "content": [{"type": "text", "text": "See"}, {"type": "image", "source": source}],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "x"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "call_1", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Well?"},
                    {"type": "tool_result", "tool_use_id": "call_1", "content": "seven"},
                ],
            },
        ],
        tools=[{"name": "f", "input_schema": {"type": "object"}}],
        stop_sequences=["END"],
        thinking={"type": "enabled", "budget_tokens": 1024},
        metadata={"user_id": "u"},
    )
    assert body["messages"] == [
        {"role": "system", "content": "Be kind.\n\nBe short."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "See"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            ],
        },
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "hm",
            "tool_calls": [CALL],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "seven"},
        {"role": "user", "content": [{"type": "text", "text": "Well?"}]},
    ]
    assert body["tools"] == [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    ]
    assert (body["stop"], body["max_tokens"], body["user"]) == (["END"], 9, "u")
    assert body["chat_template_kwargs"] == {"enable_thinking": True}


@pytest.mark.parametrize(
    ("given", "choice"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "any", "disable_parallel_tool_use": True}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_choices_of_tools(given: dict[str, Any], choice: object):
    assert read(tool_choice=given)["tool_choice"] == choice


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_tokens": None}, "^max_tokens is missing"),
        ({"messages": []}, "^messages="),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"^messages\[0\]\.role"),
        ({"messages": [USER, {"role": "assistant", "content": "I"}]}, "end with the assistant"),
        (
            {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
            r"^messages\[0\]\.content\[0\]\.type=.document",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, r"^tools\[0\]\.type"),
        ({"tool_choice": {"type": "some"}}, r"^tool_choice\.type"),
        ({"output_config": {"format": {"type": "xml"}}}, r"^output_config\.format\.type"),
        ({"mcp_servers": [{"url": "x"}]}, "^mcp_servers="),
        ({"temprature": 1}, "^temprature is not a known field"),
    ],
)
def test_what_cannot_be_done_is_named(fields: dict[str, Any], said: str):
    with pytest.raises(DataFormatError, match=said):
        read(**fields)


PIECES = [
    Piece("reasoning", "h"),
    Piece("reasoning", "m"),
    Piece("content", "I "),
    Piece("content", "look."),
    Piece("tool_call", call=CALL),
    Piece("tool_call", call=CALL | {"id": "call_2"}),
]


def test_a_stream_gives_the_blocks_of_the_whole_message():
    ending = Ending("tool_calls", prompt_tokens=20, sampled_tokens=7, cached_tokens=4)
    whole = MessageWriter("m", "r").whole(PIECES, ending)
    assert [block["type"] for block in whole["content"]] == ["thinking", "text", *["tool_use"] * 2]
    assert whole["content"][0]["thinking"] == "hm"
    assert whole["content"][3] == {
        "type": "tool_use",
        "id": "call_2",
        "name": "f",
        "input": {"a": 1},
    }
    assert (whole["stop_reason"], whole["usage"]["input_tokens"]) == ("tool_use", 16)
    writer = MessageWriter("m", "r")
    events = [*writer.opening(20), *(e for p in PIECES for e in writer.take(p))]
    events += writer.closing(ending)
    kinds = [event["type"] for event in events]
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    starts = [e["content_block"]["type"] for e in events if e["type"] == "content_block_start"]
    assert starts == [block["type"] for block in whole["content"]]
    assert [e["index"] for e in events if e["type"] == "content_block_stop"] == [0, 1, 2, 3]
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        (Ending("stop", 1, 1), "end_turn"),
        (Ending("length", 1, 1, stop_text="END"), "max_tokens"),
        (Ending("stop", 1, 1, stop_text="END"), "stop_sequence"),
    ],
)
def test_reasons_to_stop(ending: Ending, reason: str):
    message = MessageWriter("m").whole([Piece("content", "x")], ending)
    assert message["stop_reason"] == reason
    assert message["stop_sequence"] == ("END" if reason == "stop_sequence" else None)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (404, "not_found_error"), (500, "api_error")],
)
def test_errors(status: int, kind: str):
    assert error_body(status, "no")["error"] == {"type": kind, "message": "no"}
