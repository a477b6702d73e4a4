"""The recording endpoint's other APIs, with the official clients: Responses and Anthropic's."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.capture.test_rollout import ASK, CALL, Script, encode, renderer
from tinker_cookbook.capture import RecordingEndpoint, Rollout
from tinker_cookbook.renderers.base import Renderer

__all__ = ["renderer"]

TOOL: dict[str, Any] = {
    "name": "look_up",
    "description": "Find a word.",
    "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
}
COMPACT_CALL = '<tool_call>\n{"name":"look_up","arguments":{"word":"snow"}}\n</tool_call>'


def check_two_turns(rollout: Rollout, script: Script) -> None:
    """The second call continues the first, with its sampled tokens."""
    assert [call.parent for call in rollout.calls] == [None, 0]
    first, second = rollout.calls
    begin = script.prompts[0] + first.tokens
    assert script.prompts[1] == begin + second.new_prompt
    assert rollout.num_sequences == 1


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", [CALL, COMPACT_CALL])
async def test_responses_with_a_tool_are_one_sequence(renderer: Renderer, stream: bool, text: str):
    script = Script(encode(renderer, text), encode(renderer, "Frozen water."))
    async with RecordingEndpoint() as endpoint:
        rollout = endpoint.open(script, renderer)
        address = rollout.address
        client = openai.AsyncOpenAI(base_url=address.base_url, api_key=address.api_key)
        asked: dict[str, Any] = {"model": "m", "tools": [{"type": "function", **TOOL}]}
        items: list[Any] = list(ASK)
        async with client:
            first = await respond(client, stream, input=items, **asked)
            [call] = first.output
            assert (call.type, call.name) == ("function_call", "look_up")
            output = {"type": "function_call_output", "call_id": call.call_id, "output": "frozen"}
            items += [call.model_dump(exclude_none=True), output]
            second = await respond(client, stream, input=items, **asked)
    assert second.output_text == "Frozen water."
    assert second.status == "completed"
    assert second.usage.output_tokens == len(rollout.calls[1].tokens)
    check_two_turns(rollout, script)


async def respond(client: openai.AsyncOpenAI, stream: bool, **fields: Any) -> Any:
    if not stream:
        return await client.responses.create(**fields)
    events = [event async for event in await client.responses.create(**fields, stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    texts = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(texts) == events[-1].response.output_text
    return events[-1].response


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", [CALL, COMPACT_CALL])
async def test_messages_with_a_tool_are_one_sequence(renderer: Renderer, stream: bool, text: str):
    anthropic = pytest.importorskip("anthropic")
    script = Script(encode(renderer, text), encode(renderer, "Frozen water."))
    tool = {"name": "look_up", "description": "Find.", "input_schema": TOOL["parameters"]}
    async with RecordingEndpoint() as endpoint:
        rollout = endpoint.open(script, renderer)
        address = rollout.address
        async with anthropic.AsyncAnthropic(
            base_url=address.anthropic_base_url, api_key=address.api_key, max_retries=0
        ) as client:
            asked: dict[str, Any] = {"model": "m", "max_tokens": 64, "tools": [tool]}
            messages: list[Any] = list(ASK)
            counted = await client.messages.count_tokens(model="m", messages=messages, tools=[tool])
            first = await write_message(client, stream, messages=messages, **asked)
            [use] = first.content
            assert (use.type, use.name, use.input) == ("tool_use", "look_up", {"word": "snow"})
            assert first.stop_reason == "tool_use"
            result = {"type": "tool_result", "tool_use_id": use.id, "content": "frozen"}
            messages += [
                {"role": "assistant", "content": [use.model_dump(exclude_none=True)]},
                {"role": "user", "content": [result]},
            ]
            second = await write_message(client, stream, messages=messages, **asked)
            with pytest.raises(anthropic.BadRequestError) as caught:
                await client.messages.create(model="m", max_tokens=8, messages=[])
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert [block.text for block in second.content] == ["Frozen water."]
    assert second.stop_reason == "end_turn"
    assert counted.input_tokens == first.usage.input_tokens == len(script.prompts[0])
    check_two_turns(rollout, script)


async def write_message(client: Any, stream: bool, **fields: Any) -> Any:
    if not stream:
        return await client.messages.create(**fields)
    async with client.messages.stream(**fields) as events:
        async for _ in events:
            pass
        return await events.get_final_message()


@pytest.mark.anyio
async def test_each_api_refuses_a_wrong_key_in_its_own_form(renderer: Renderer):
    import httpx

    async with RecordingEndpoint() as endpoint:
        address = endpoint.open(Script(), renderer).address
        async with httpx.AsyncClient() as client:
            answers = [
                await client.post(f"{address.base_url}/{path}", json={}, headers=headers)
                for path in ("chat/completions", "responses", "messages")
                for headers in ({"x-api-key": "wrong"}, {"authorization": "Bearer wrong"})
            ]
    assert {answer.status_code for answer in answers} == {401}
    errors = [answer.json()["error"] for answer in answers]
    assert [error.get("code") for error in errors[:4]] == ["invalid_api_key"] * 4
    assert [error["type"] for error in errors[4:]] == ["authentication_error"] * 2
