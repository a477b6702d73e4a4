"""The recording endpoint with the official `openai` client, over the real local service."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import tinker

from tinker_cookbook.capture import (
    CallLimits,
    CallLog,
    ClientSampler,
    RecordingEndpoint,
    Rollout,
    read_calls,
)
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.renderers import get_renderer
from tinker_cookbook.renderers.base import Renderer
from tinker_cookbook.rl.agent_env import recorded_trajectory
from tinker_cookbook.rl.data_processing import trajectory_to_data
from tinker_cookbook.tokenizer_utils import get_tokenizer
from tinker_cookbook.utils.sdk_compat import wait_for_client

ASK: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Find a word.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def renderer(tiny_model_folder: Path) -> Renderer:
    return get_renderer("qwen2_5", get_tokenizer(str(tiny_model_folder)))


@pytest.fixture(scope="module")
def sampling_client(local_service, shared_client) -> tinker.SamplingClient:
    return wait_for_client(shared_client.create_sampling_client(base_model=local_service.model))


@contextlib.asynccontextmanager
async def served(
    sampling_client, renderer, log: CallLog | None = None, **options
) -> AsyncIterator[tuple[openai.AsyncOpenAI, Rollout, RecordingEndpoint]]:
    async with RecordingEndpoint(log=log) as endpoint:
        rollout = endpoint.open(ClientSampler(sampling_client, 8), renderer, **options)
        address = rollout.address
        async with openai.AsyncOpenAI(
            base_url=address.base_url, api_key=address.api_key, max_retries=0
        ) as client:
            yield client, rollout, endpoint


@pytest.mark.anyio
async def test_a_recorded_call_is_what_the_engine_sampled(sampling_client, renderer, tmp_path):
    with CallLog(tmp_path / "calls.jsonl") as log:
        async with served(sampling_client, renderer, log) as (client, rollout, _):
            shown = await client.chat.completions.create(
                model="any", messages=ASK, seed=5, max_tokens=6, temperature=0.9
            )
    [call] = rollout.calls
    prompt = renderer.build_generation_prompt(ASK)
    params = tinker.SamplingParams(
        max_tokens=6, seed=5, temperature=0.9, stop=renderer.get_stop_sequences()
    )
    direct = sampling_client.sample(prompt, num_samples=1, sampling_params=params).result()
    assert call.new_prompt == prompt.to_ints()
    assert call.tokens == list(direct.sequences[0].tokens)
    assert call.logprobs == list(direct.sequences[0].logprobs)
    assert shown.choices[0].message.content == renderer.tokenizer.decode(call.tokens)
    assert shown.choices[0].finish_reason == "length"
    assert shown.usage is not None
    assert shown.usage.prompt_tokens == len(call.new_prompt)
    assert shown.usage.completion_tokens == len(call.tokens) == 6
    assert list(read_calls(tmp_path / "calls.jsonl")) == [call]


@pytest.mark.anyio
async def test_a_stream_says_the_same(sampling_client, renderer):
    async with served(sampling_client, renderer) as (client, rollout, _):
        whole = await client.chat.completions.create(model="m", messages=ASK, seed=7)
        stream = await client.chat.completions.create(
            model="m", messages=ASK, seed=7, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert rollout.calls[0].tokens == rollout.calls[1].tokens


@pytest.mark.anyio
async def test_a_conversation_merges_into_one_datum_with_the_sampled_tokens(
    sampling_client, renderer
):
    async with served(sampling_client, renderer) as (client, rollout, _):
        messages: list[Any] = list(ASK)
        for seed in range(4):
            reply = await client.chat.completions.create(
                model="m", messages=messages, seed=seed, max_tokens=16
            )
            messages += [
                {"role": "assistant", "content": reply.choices[0].message.content},
                {"role": "user", "content": "Continue."},
            ]
    for call, prompt in rollout.ordered_calls():
        if call.parent is not None:
            before = rollout.calls[call.parent]
            end = len(prompt) - len(call.new_prompt)
            assert prompt[end - len(before.tokens) : end] == before.tokens
    data = trajectory_to_data(recorded_trajectory(rollout.calls, 1.0), 1.0)
    assert len(data) == rollout.num_sequences
    trained = [
        float(logprob)
        for datum in data
        for logprob, kept in zip(
            datum.loss_fn_inputs["logprobs"].tolist(),
            datum.loss_fn_inputs["mask"].tolist(),
            strict=True,
        )
        if kept
    ]
    recorded = [logprob for call, _ in rollout.ordered_calls() for logprob in call.logprobs]
    assert trained == pytest.approx(recorded, abs=1e-6)


@pytest.mark.anyio
async def test_concurrent_calls_are_recorded_once_each(sampling_client, renderer, tmp_path):
    path = tmp_path / "calls.jsonl"
    with CallLog(path) as log:
        async with RecordingEndpoint(log=log) as endpoint:
            rollouts = [
                endpoint.open(ClientSampler(sampling_client, 4), renderer) for _ in range(8)
            ]

            async def ask(rollout: Rollout, number: int) -> str:
                address = rollout.address
                async with openai.AsyncOpenAI(
                    base_url=address.base_url, api_key=address.api_key
                ) as client:
                    reply = await client.chat.completions.create(
                        model="m", messages=[{"role": "user", "content": f"Number {number}"}]
                    )
                return reply.id

            numbered = [(rollout, n) for rollout in rollouts for n in range(8)]
            ids = await asyncio.gather(*(ask(*pair) for pair in numbered))
    recorded = list(read_calls(path))
    assert {f"chatcmpl-{call.rollout}-{call.index}" for call in recorded} == set(ids)
    assert len(recorded) == len(set(ids)) == 64
    for rollout in rollouts:
        assert [c for c in recorded if c.rollout == rollout.name] == rollout.calls
        prompts = {tuple(call.new_prompt) for call in rollout.calls}
        assert len(prompts) == 8


@pytest.mark.anyio
async def test_the_key_of_another_rollout_is_refused(sampling_client, renderer):
    async with served(sampling_client, renderer) as (client, rollout, endpoint):
        other = endpoint.open(ClientSampler(sampling_client), renderer)
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key=other.address.api_key).chat.completions.create(
                model="m", messages=ASK
            )
        endpoint.close(rollout)
        with pytest.raises(openai.NotFoundError, match="unknown or closed"):
            await client.chat.completions.create(model="m", messages=ASK)
    assert rollout.calls == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n": 2}, "n=2 is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format="),
        ({"tool_choice": "required", "tools": [TOOL]}, "tool_choice="),
        ({"messages": [{"role": "king", "content": "x"}]}, r"messages\[0\].role='king'"),
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
async def test_what_cannot_be_done_is_refused(sampling_client, renderer, fields, said):
    async with served(sampling_client, renderer) as (client, rollout, _):
        with pytest.raises(openai.BadRequestError, match=said):
            await client.chat.completions.create(**{"model": "m", "messages": ASK} | fields)
    assert rollout.calls == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": TOOL["function"]["name"]}}]
)
async def test_a_forced_tool_is_sampled_freely_on_request(sampling_client, renderer, choice):
    fields = {"model": "m", "messages": ASK, "tools": [TOOL], "seed": 3, "max_tokens": 4}
    async with served(sampling_client, renderer, free_tool_choice=True) as (client, rollout, _):
        await client.chat.completions.create(**fields, tool_choice=choice)
        await client.chat.completions.create(**fields, tool_choice="auto")
    forced, free = rollout.calls
    assert forced.tokens == free.tokens


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (CallLimits(max_calls=1), "max_turns"),
        (CallLimits(max_sampled_tokens=3), "max_sampled_tokens"),
    ],
)
async def test_limits_refuse_further_calls(sampling_client, renderer, limits, reason):
    async with served(sampling_client, renderer, limits=limits) as (client, rollout, _):
        await client.chat.completions.create(model="m", messages=ASK, seed=1)
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model="m", messages=ASK)
    assert refused.value.code == rollout.refused == reason
    assert len(rollout.calls) == 1
    assert len(rollout.calls[0].tokens) <= (limits.max_sampled_tokens or 8)


@pytest.mark.anyio
async def test_a_prompt_that_is_too_long_has_the_code_that_clients_know(sampling_client, renderer):
    limits = CallLimits(max_sequence_tokens=4)
    async with served(sampling_client, renderer, limits=limits) as (client, rollout, _):
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model="m", messages=ASK)
    assert refused.value.code == "context_length_exceeded"
    assert rollout.refused == "context_overflow"


@pytest.mark.anyio
async def test_a_client_that_leaves_cancels_its_call(sampling_client, renderer):
    async with served(sampling_client, renderer) as (client, rollout, _):
        with pytest.raises(openai.APITimeoutError):
            await client.with_options(timeout=0.15).chat.completions.create(
                model="m", messages=ASK, max_tokens=900, extra_body={"top_k": 1}
            )
        await asyncio.sleep(0.1)
        reply = await client.chat.completions.create(model="m", messages=ASK, max_tokens=2)
    assert [f"chatcmpl-{call.rollout}-{call.index}" for call in rollout.calls] == [reply.id]


@pytest.mark.anyio
async def test_text_stops_end_a_reply_and_are_not_shown(sampling_client, renderer):
    async with served(sampling_client, renderer) as (client, rollout, _):
        whole = await client.chat.completions.create(model="m", messages=ASK, seed=3, max_tokens=16)
        text = str(whole.choices[0].message.content)
        stop = text[len(text) // 2 :][:1]
        cut = await client.chat.completions.create(
            model="m", messages=ASK, seed=3, max_tokens=16, stop=[stop]
        )
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    tokens = rollout.calls[1].tokens
    assert tokens == rollout.calls[0].tokens[: len(tokens)]


def test_without_the_packages_of_a_server_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'tinker-cookbook\[local\]'"):
        RecordingEndpoint().app()


def test_names_and_ports_in_use_are_refused():
    async def go() -> None:
        async with RecordingEndpoint() as endpoint:
            endpoint.open(ClientSampler, None, name="iter-3")  # pyright: ignore
            for name in ("iter-3", "a/b", ""):
                with pytest.raises(ConfigurationError, match="name="):
                    endpoint.open(ClientSampler, None, name=name)  # pyright: ignore
            port = int(endpoint.url.rpartition(":")[2])
            with pytest.raises(ConfigurationError, match=f"port={port}"):
                await RecordingEndpoint(port=port).start()

    asyncio.run(go())
