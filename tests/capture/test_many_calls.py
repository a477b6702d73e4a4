"""A thousand calls at a time: each is recorded once, with exactly what the engine sampled."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker

from tests.capture.test_endpoint import renderer, sampling_client
from tinker_cookbook.capture import ClientSampler, RecordingEndpoint, open_calls, read_calls

__all__ = ["renderer", "sampling_client"]

NUM_CALLS, NUM_ROLLOUTS, TOKENS = 1000, 20, 5


def question(number: int) -> str:
    return f"What is {number}?"


def request(number: int) -> tuple[str, dict[str, Any]]:
    """The path and the body of a call; the calls use all three APIs."""
    messages = [{"role": "user", "content": question(number)}]
    if number % 3 == 0:
        return "chat/completions", {"messages": messages, "max_tokens": TOKENS, "seed": number}
    if number % 3 == 1:
        return "responses", {"input": messages, "max_output_tokens": TOKENS, "seed": number}
    # Anthropic's API has no seed, so the call is greedy
    return "messages", {"messages": messages, "max_tokens": TOKENS, "temperature": 0}


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.parametrize("name", ["calls.jsonl", "calls.sqlite"])
async def test_a_thousand_calls_are_what_the_engine_samples(
    sampling_client, renderer, tmp_path: Path, name: str
):
    limits = httpx.Limits(max_connections=None)
    with open_calls(tmp_path / name) as log:
        async with (
            RecordingEndpoint(log=log) as endpoint,
            httpx.AsyncClient(timeout=600, limits=limits) as client,
        ):
            rollouts = [
                endpoint.open(ClientSampler(sampling_client), renderer) for _ in range(NUM_ROLLOUTS)
            ]

            async def ask(number: int) -> dict[str, Any]:
                address = rollouts[number % NUM_ROLLOUTS].address
                path, body = request(number)
                answer = await client.post(
                    f"{address.base_url}/{path}",
                    json={"model": "m", **body},
                    headers={"authorization": f"Bearer {address.api_key}"},
                )
                assert answer.status_code == 200, answer.text
                return answer.json()

            answers = await asyncio.gather(*(ask(number) for number in range(NUM_CALLS)))
    assert len({answer["id"] for answer in answers}) == NUM_CALLS
    recorded = list(read_calls(tmp_path / name))
    assert len(recorded) == NUM_CALLS
    by_prompt = {tuple(call.new_prompt): call for call in recorded}
    assert len(by_prompt) == NUM_CALLS, "each call once, and none continues another"
    for number in range(NUM_CALLS):
        prompt = renderer.build_generation_prompt([{"role": "user", "content": question(number)}])
        _, body = request(number)
        params = tinker.SamplingParams(
            max_tokens=TOKENS,
            seed=body.get("seed"),
            temperature=body.get("temperature", 1.0),
            stop=renderer.get_stop_sequences(),
        )
        response = await sampling_client.sample(prompt, num_samples=1, sampling_params=params)
        call = by_prompt[tuple(prompt.to_ints())]
        assert call.tokens == list(response.sequences[0].tokens)
        assert call.logprobs == list(response.sequences[0].logprobs)
