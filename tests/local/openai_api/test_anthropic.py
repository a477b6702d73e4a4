"""The official Anthropic client against a real service: messages, streams, tools, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
TOOL: dict[str, Any] = {
    "name": "look_up",
    "description": "Find a word.",
    "input_schema": {
        "type": "object",
        "properties": {"word": {"type": "string", "maxLength": 6}},
        "required": ["word"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(local_service) -> Iterator[Any]:
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(
        base_url=f"{local_service.base_url}/anthropic", api_key=local_service.api_key, max_retries=0
    ) as client:
        yield client


def ask(client, service, **options: Any) -> Any:
    return client.messages.create(
        **({"model": service.model, "messages": HELLO, "max_tokens": 12} | options)
    )


GREEDY: Any = {"extra_body": {"temperature": 0}}
"""Newer clients do not have the parameter."""


def test_a_message_says_what_the_openai_endpoint_says(client, local_service):
    got = ask(client, local_service, **GREEDY, system="Be kind.")
    with openai.OpenAI(
        base_url=f"{local_service.base_url}/oai/api/v1", api_key=local_service.api_key
    ) as other:
        want = other.chat.completions.create(
            model=local_service.model,
            messages=[{"role": "system", "content": "Be kind."}, *HELLO],
            temperature=0,
            max_tokens=12,
        )
    assert [block.text for block in got.content] == [want.choices[0].message.content]
    assert got.stop_reason == "max_tokens"
    assert want.usage is not None
    used = got.usage.input_tokens + got.usage.cache_read_input_tokens
    assert (used, got.usage.output_tokens) == (want.usage.prompt_tokens, 12)
    assert (got.role, got.model) == ("assistant", local_service.model)


def test_a_stream_says_the_same(client, local_service):
    whole = ask(client, local_service, **GREEDY)
    with client.messages.stream(
        model=local_service.model, messages=HELLO, max_tokens=12, **GREEDY
    ) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert text == whole.content[0].text == last.content[0].text
    assert last.stop_reason == whole.stop_reason
    assert last.usage.output_tokens == whole.usage.output_tokens


def test_a_stop_sequence_is_named(client, local_service):
    text = ask(client, local_service, **GREEDY).content[0].text
    stop = text[4:6]
    got = ask(client, local_service, **GREEDY, stop_sequences=["never", stop])
    assert (got.stop_reason, got.stop_sequence) == ("stop_sequence", stop)
    assert "".join(block.text for block in got.content) == text[: text.index(stop)]


def test_tokens_are_counted_before_they_are_sampled(client, local_service):
    messages = [*HELLO, {"role": "assistant", "content": "Hi"}, *HELLO]
    counted = client.messages.count_tokens(model=local_service.model, messages=messages)
    used = ask(client, local_service, messages=messages, max_tokens=1).usage
    assert counted.input_tokens == used.input_tokens + used.cache_read_input_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_tool_is_called_and_its_result_comes_back(client, local_service, stream: bool):
    pytest.importorskip("llguidance")
    fields: dict[str, Any] = {
        "model": local_service.model,
        "messages": HELLO,
        "max_tokens": 80,
        "tools": [TOOL],
        "tool_choice": {"type": "tool", "name": "look_up"},
    }
    if stream:
        with client.messages.stream(**fields) as events:
            reply = events.get_final_message()
    else:
        reply = client.messages.create(**fields)
    [use] = reply.content
    assert (use.type, use.name, reply.stop_reason) == ("tool_use", "look_up", "tool_use")
    assert len(use.input["word"]) <= 6
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "a word"}
    messages = [
        *HELLO,
        {"role": "assistant", "content": [block.model_dump() for block in reply.content]},
        {"role": "user", "content": [result, {"type": "text", "text": "Well?"}]},
    ]
    again = ask(client, local_service, messages=messages, tools=[TOOL])
    assert again.usage.output_tokens > 0


def test_a_required_format_is_json(client, local_service):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "schema": {"enum": ["red", "blue"]}}
    got = ask(client, local_service, output_config={"format": form})
    assert got.content[0].text in ('"red"', '"blue"')


def test_models_are_listed(client, local_service):
    assert local_service.model in [model.id for model in client.models.list()]
    assert client.models.retrieve(local_service.model).id == local_service.model


def test_errors_have_the_form_of_the_api(client, local_service):
    anthropic = pytest.importorskip("anthropic")
    for options, word in (
        ({"extra_body": {"temperature": -1}}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "I"}]}, "end with the assistant"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ):
        with pytest.raises(anthropic.BadRequestError, match=word) as caught:
            ask(client, local_service, **options)
        assert caught.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError) as caught:
        ask(client, local_service, model="nothing")
    assert caught.value.body["error"]["type"] == "not_found_error"
    answer = httpx.post(f"{local_service.base_url}/anthropic/v1/messages", json={})
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"


def test_the_responses_api_shares_the_endpoint(local_service):
    with openai.OpenAI(
        base_url=f"{local_service.base_url}/oai/api/v1", api_key=local_service.api_key
    ) as client:
        asked: dict[str, Any] = {"model": local_service.model, "max_output_tokens": 8}
        whole = client.responses.create(input="Hello", temperature=0, **asked)
        events = list(client.responses.create(input="Hello", temperature=0, stream=True, **asked))
        with pytest.raises(openai.BadRequestError, match="previous_response_id"):
            client.responses.create(input="Hello", previous_response_id=whole.id, **asked)
    last: Any = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == whole.output_text
    assert whole.incomplete_details is not None
    assert whole.usage is not None
    assert whole.usage.output_tokens == 8
