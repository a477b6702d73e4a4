"""A rollout of chosen replies: tool calls, replies that encode differently, and branches."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tinker_cookbook.capture import CallLimits, RecordingEndpoint, Rollout
from tinker_cookbook.capture.samplers import SamplingWishes
from tinker_cookbook.completers import TokensWithLogprobs
from tinker_cookbook.exceptions import TrainingError
from tinker_cookbook.renderers import get_renderer
from tinker_cookbook.renderers.base import Renderer
from tinker_cookbook.rl.agent_env import recorded_trajectory
from tinker_cookbook.rl.data_processing import trajectory_to_data
from tinker_cookbook.tokenizer_utils import get_tokenizer

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Find a word.",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
        },
    }
]
ASK: list[Any] = [{"role": "user", "content": "What does snow mean?"}]
CALL = '<tool_call>\n{"name": "look_up", "arguments": {"word": "snow"}}\n</tool_call>'


class Script:
    """A sampler that returns given replies and keeps the prompts that it was asked to continue."""

    def __init__(self, *replies: list[int]) -> None:
        self.replies = list(replies)
        self.prompts: list[list[int]] = []

    async def __call__(self, prompt, stop, wishes: SamplingWishes) -> TokensWithLogprobs:
        self.prompts.append(prompt.to_ints())
        tokens = self.replies.pop(0)
        return TokensWithLogprobs(tokens, [-0.5 - at for at in range(len(tokens))])


@pytest.fixture(scope="module")
def renderer(tiny_model_folder: Path) -> Renderer:
    return get_renderer("qwen2_5", get_tokenizer(str(tiny_model_folder)))


def encode(renderer: Renderer, text: str, *, by_letter: bool = False) -> list[int]:
    """Encode a reply with its stop token; `by_letter` as a sampler may write it, too."""
    tokenizer = renderer.tokenizer
    pieces = list(text) if by_letter else [text]
    return [
        *(t for piece in pieces for t in tokenizer.encode(piece)),
        int(renderer.get_stop_sequences()[0]),
    ]


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


@contextlib.asynccontextmanager
async def served(
    script: Script, renderer: Renderer
) -> AsyncIterator[tuple[openai.AsyncOpenAI, Rollout]]:
    async with RecordingEndpoint() as endpoint:
        rollout = endpoint.open(script, renderer)
        address = rollout.address
        async with openai.AsyncOpenAI(
            base_url=address.base_url, api_key=address.api_key, max_retries=0
        ) as client:
            yield client, rollout


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_tool_calls_reach_the_agent_and_the_conversation_stays_one_sequence(renderer, stream):
    script = Script(encode(renderer, CALL), encode(renderer, "Frozen water."))
    async with served(script, renderer) as (client, rollout):
        call = await first_call(client, stream)
        assert call["function"] == {"name": "look_up", "arguments": '{"word": "snow"}'}
        messages: list[Any] = [
            *ASK,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": "frozen water"},
        ]
        reply = await client.chat.completions.create(model="m", messages=messages, tools=TOOLS)
    assert reply.choices[0].message.content == "Frozen water."
    assert [call.parent for call in rollout.calls] == [None, 0]
    assert script.prompts[1][: len(script.prompts[0])] == script.prompts[0]
    assert "look_up" in str(renderer.tokenizer.decode(script.prompts[0]))


async def first_call(client: openai.AsyncOpenAI, stream: bool) -> dict[str, Any]:
    asked: dict[str, Any] = {"model": "m", "messages": ASK, "tools": TOOLS}
    if not stream:
        reply = await client.chat.completions.create(**asked)
        assert reply.choices[0].finish_reason == "tool_calls"
        return reply.choices[0].message.tool_calls[0].model_dump()
    chunks = [c async for c in await client.chat.completions.create(**asked, stream=True)]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    [call] = [call for c in chunks for call in c.choices[0].delta.tool_calls or ()]
    return call.model_dump(exclude={"index"})


@pytest.mark.anyio
async def test_without_tools_a_call_is_text(renderer):
    async with served(Script(encode(renderer, CALL)), renderer) as (client, _):
        reply = await client.chat.completions.create(model="m", messages=ASK)
    assert reply.choices[0].message.content == CALL
    assert reply.choices[0].message.tool_calls is None


@pytest.mark.anyio
async def test_a_reply_keeps_its_sampled_tokens_though_its_text_encodes_differently(renderer):
    unusual = encode(renderer, "The capital is Paris.", by_letter=True)
    assert unusual != encode(renderer, "The capital is Paris.")
    script = Script(unusual, unusual, encode(renderer, "Yes."))
    async with served(script, renderer) as (client, rollout):
        messages: list[Any] = list(ASK)
        for _ in range(3):
            reply = await client.chat.completions.create(model="m", messages=messages)
            messages += [
                {"role": "assistant", "content": reply.choices[0].message.content},
                {"role": "user", "content": "Really?"},
            ]
    assert [call.parent for call in rollout.calls] == [None, 0, 1]
    first, second, third = script.prompts
    assert second[: len(first) + len(unusual)] == first + unusual
    assert third[: len(second) + len(unusual)] == second + unusual
    [datum] = trajectory_to_data(recorded_trajectory(rollout.calls, 1.0), 1.0)
    sampled = sum(len(call.tokens) for call in rollout.calls)
    assert sum(datum.loss_fn_inputs["mask"].tolist()) == sampled


@pytest.mark.anyio
async def test_a_changed_reply_starts_a_new_sequence(renderer):
    script = Script(encode(renderer, "Paris, I think."), encode(renderer, "Yes."))
    async with served(script, renderer) as (client, rollout):
        await client.chat.completions.create(model="m", messages=ASK)
        edited: list[Any] = [
            *ASK,
            {"role": "assistant", "content": "Paris."},
            {"role": "user", "content": "Really?"},
        ]
        await client.chat.completions.create(model="m", messages=edited)
    assert [call.parent for call in rollout.calls] == [None, None]
    assert rollout.num_sequences == 2
    assert len(trajectory_to_data(recorded_trajectory(rollout.calls, 1.0), 1.0)) == 2


@pytest.mark.anyio
async def test_two_branches_train_each_token_once(renderer):
    script = Script(*(encode(renderer, text) for text in ("Snow.", "One.", "Two.", "Three.")))
    async with served(script, renderer) as (client, rollout):
        await client.chat.completions.create(model="m", messages=ASK)
        start: list[Any] = [*ASK, {"role": "assistant", "content": "Snow."}]
        for question in ("First?", "Second?"):
            await client.chat.completions.create(model="m", messages=[*start, *user(question)])
        longer: list[Any] = [
            *start,
            {"role": "user", "content": "First?"},
            {"role": "assistant", "content": "One."},
            {"role": "user", "content": "Third?"},
        ]
        await client.chat.completions.create(model="m", messages=longer)
    assert [call.parent for call in rollout.calls] == [None, 0, 0, 1]
    assert [call.index for call, _ in rollout.ordered_calls()] == [0, 1, 3, 2]
    assert [prompt for _, prompt in rollout.ordered_calls()] == [
        script.prompts[at] for at in (0, 1, 3, 2)
    ]
    data = trajectory_to_data(recorded_trajectory(rollout.calls, 1.0), 1.0)
    assert len(data) == rollout.num_sequences == 2
    trained = sum(sum(datum.loss_fn_inputs["mask"].tolist()) for datum in data)
    assert trained == sum(len(call.tokens) for call in rollout.calls)


@pytest.mark.anyio
async def test_a_call_that_takes_too_long_fails_and_is_not_recorded(renderer):
    class Slow:
        async def __call__(self, prompt, stop, wishes: SamplingWishes) -> TokensWithLogprobs:
            await asyncio.sleep(60)
            return TokensWithLogprobs([], [])

    async with RecordingEndpoint() as endpoint:
        rollout = endpoint.open(Slow(), renderer, limits=CallLimits(call_timeout_seconds=0.05))
        with pytest.raises(TrainingError, match=r"call_timeout_seconds=0\.05"):
            await rollout.start([{"role": "user", "content": "x"}])
        assert isinstance(rollout.failure, TrainingError)
        assert rollout.calls == []


@pytest.mark.anyio
async def test_closing_a_rollout_ends_its_calls(renderer):
    started = asyncio.Event()

    class Waiting:
        async def __call__(self, prompt, stop, wishes: SamplingWishes) -> TokensWithLogprobs:
            started.set()
            await asyncio.sleep(60)
            return TokensWithLogprobs([], [])

    async with RecordingEndpoint() as endpoint:
        rollout = endpoint.open(Waiting(), renderer)
        address = rollout.address
        async with openai.AsyncOpenAI(
            base_url=address.base_url, api_key=address.api_key, max_retries=0
        ) as client:
            asking = asyncio.create_task(client.chat.completions.create(model="m", messages=ASK))
            await started.wait()
            endpoint.close(rollout)
            with pytest.raises(openai.APIStatusError, match="is closed"):
                await asking
    assert rollout.calls == []
