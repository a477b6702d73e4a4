"""Rows of conversations files: what is accepted, and what each refusal says."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinker_cookbook.exceptions import DataError
from tinker_cookbook.supervised.conversations import ConversationError, SourceRow, parse_row

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "hello"}


def parse(value: object, **options):
    line = value if isinstance(value, bytes) else json.dumps(value).encode()
    return parse_row(SourceRow("chat.jsonl:12", line, **options))


def messages(*items: object) -> dict:
    return {"messages": list(items)}


def refusal(value: object) -> str:
    with pytest.raises(ConversationError) as info:
        parse(value)
    assert isinstance(info.value, DataError)
    text = str(info.value)
    assert text.startswith("chat.jsonl:12: ")
    assert info.value.kind
    return text.removeprefix("chat.jsonl:12: ")


def test_plain_conversation_comes_back_unchanged():
    assert parse(messages(USER, REPLY)).messages == [USER, REPLY]


def test_other_keys_of_the_row_are_ignored():
    row = messages(USER, REPLY) | {"id": 7, "source": "web", "messages_count": 2}
    assert parse(row).messages == [USER, REPLY]


def test_null_counts_as_absent():
    row = messages(USER | {"name": None, "tool_calls": None, "weight": None}, REPLY)
    assert parse(row).messages == [USER, REPLY]


def test_unknown_role_is_named_as_promised():
    text = refusal(messages(USER, {"role": "bot", "content": "x"}))
    assert text == "role 'bot' is unknown; use one of system, user, assistant, tool (messages[1])"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b'{"messages": [', ["not JSON", "character 15"]),
        (b'{"messages": []} trailing', ["not JSON", "Extra data"]),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', ["0xff", "position 44", "UTF-8"]),
        (b'{"messages": [{"role":"user","content":"\\ud800"}]}', ["\\ud800", "surrogate"]),
        (b"[" * 100_000, ["JSON"]),
        ([USER], ["the row is a list"]),
        ("text", ["the row is a string"]),
        ({}, ["messages is missing", "no keys"]),
        ({"conversations": []}, ["conversations is empty"]),
        ({"mesages": []}, ["rename 'mesages' to 'messages'"]),
        ({"prompt": "a"}, ["messages is missing", "as 'completion'"]),
        ({"completion": "a"}, ["messages is missing", "as 'prompt'"]),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["preference.train_dpo"]),
        ({"data": [messages(USER)]}, ["rows seem to be in 'data'"]),
        ({"messages": "hi"}, ["messages is a string ('hi')", "list of messages"]),
        ({"messages": {}}, ["messages is an object"]),
        (messages(), ["messages is empty"]),
        (messages("hi"), ["messages[0] is a string", "role and content"]),
        (messages({"content": "hi"}), ["role is missing"]),
        (messages({"role": 3, "content": "hi"}), ["role is a number (3)", "(messages[0].role)"]),
        (messages({"from": "human", "value": "hi"}), ["'from' is unknown", "rename it to 'role'"]),
        (messages({"role": "user"}), ["content is missing"]),
        (messages({"role": "user", "content": 5}), ["content is a number (5)"]),
        (messages({"role": "user", "content": True}), ["content is true or false (True)"]),
        (messages({"role": "user", "content": {}}), ["content is an object"]),
        (messages({"role": "user", "content": " \n"}), ["user message is empty"]),
        (messages(USER, {"role": "assistant", "content": ""}), ["assistant message is empty"]),
        (messages(USER, {"role": "assistant", "content": []}), ["assistant message is empty"]),
        (messages(USER | {"contnet": "x"}), ["'contnet' is unknown", "did you mean 'content'?"]),
        (messages(USER, REPLY | {"weight": 0.5}), ["weight is 0.5", "use 0 or 1", "messages[1]"]),
        (messages(USER, REPLY | {"weight": True}), ["weight is True", "use 0 or 1"]),
        (messages(USER | {"weight": 1}, REPLY), ["weight is 1 in a user message"]),
        (messages(USER, REPLY | {"loss": True}), ["'loss' is unknown", "'weight': 0 or 1"]),
        (messages(USER | {"trainable": "no"}), ["trainable is a string", "true or false"]),
        (messages(USER | {"reasoning": "x"}), ["reasoning is in a user message"]),
        (messages({"role": "user", "content": ["x"]}), ["content[0] is a string"]),
        (messages({"role": "user", "content": [{"type": "video"}]}), ["type 'video'", "image_url"]),
        (messages({"role": "user", "content": [{"type": "text"}]}), ["text is null"]),
        (
            messages({"role": "user", "content": [{"type": "image", "image": 3}]}),
            ["image is a number", "messages[0].content[0].image"],
        ),
        (messages(REPLY | {"tool_calls": "x"}), ["tool_calls is a string"]),
        (messages(REPLY | {"tool_calls": [{"function": None}]}), ["function is null"]),
        (
            messages(REPLY | {"tool_calls": [{"function": {"name": "f", "arguments": "[1"}}]}),
            ["arguments '[1' are not a JSON object"],
        ),
        (
            messages(REPLY | {"tool_calls": [{"function": {"arguments": {}}}]}),
            ["name is null", "messages[0].tool_calls[0].function.name"],
        ),
        (messages(USER, REPLY) | {"tools": {}}, ["tools is an object"]),
        (messages(USER, REPLY) | {"tools": [{"name": 1}]}, ["name is a number (1)", "tools[0]"]),
    ],
)
def test_refusals_name_the_place_the_field_and_the_value(value, words):
    text = refusal(value)
    for word in words:
        assert word in text
    assert len(text) < 400
    assert "\n" not in text


def test_long_values_are_shortened_in_errors():
    assert len(refusal(messages({"role": "x" * 100_000, "content": "a"}))) < 200


def test_reasoning_becomes_a_thinking_part():
    for key in ("reasoning_content", "reasoning", "thinking"):
        reply = parse(messages(USER, REPLY | {key: "because"})).messages[1]
        assert reply["content"] == [
            {"type": "thinking", "thinking": "because"},
            {"type": "text", "text": "hello"},
        ]


def test_tool_calls_take_arguments_as_object_or_string():
    for arguments in ({"city": "Köln"}, '{"city": "Köln"}'):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        reply = {"role": "assistant", "content": None, "tool_calls": [call]}
        message = parse(messages(USER, reply)).messages[1]
        assert message["content"] == ""
        (parsed,) = message["tool_calls"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        assert parsed.function.arguments == '{"city": "Köln"}'
        assert parsed.id == "1"


def test_tools_are_taken_bare_or_wrapped():
    bare = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    for tool in (bare, {"type": "function", "function": bare}):
        assert parse(messages(USER, REPLY) | {"tools": [tool]}).tools == [bare]


def test_empty_system_and_tool_messages_are_accepted():
    system, tool = {"role": "system", "content": ""}, {"role": "tool", "content": ""}
    assert parse(messages(system, USER, tool, REPLY)).messages == [system, USER, tool, REPLY]


def test_relative_images_are_found_beside_the_file():
    def image(path: str) -> object:
        part = {"type": "image", "image": path}
        return parse(messages({"role": "user", "content": [part]}), folder="/data").messages[0][
            "content"
        ][0]["image"]  # type: ignore[index]

    assert image("a/cat.png") == "/data/a/cat.png"
    assert image("/abs/cat.png") == "/abs/cat.png"
    assert image("https://example.org/cat.png") == "https://example.org/cat.png"
    assert image("data:image/png;base64,AA") == "data:image/png;base64,AA"


def test_image_urls_in_the_shape_of_the_openai_api():
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
    message = parse(messages({"role": "user", "content": [part]})).messages[0]
    assert message["content"] == [{"type": "image", "image": "data:image/png;base64,AA"}]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["messages", "role", "content", "type", "text", "tool_calls", "function", "name"]
            ),
            children,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json_is_parsed_or_refused_with_its_place(value):
    try:
        conversation = parse({"messages": [value]})
    except ConversationError as error:
        text = str(error)
    else:
        text = f"chat.jsonl:12: {conversation.messages[0]['role']}"
    assert text.startswith("chat.jsonl:12: ")


@given(st.binary(max_size=40))
def test_any_bytes_are_parsed_or_refused_with_their_place(line):
    with pytest.raises(ConversationError, match=r"^chat\.jsonl:12: "):
        parse(line)
