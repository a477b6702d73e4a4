"""Speed of required formats, and of the recording endpoint, on a local service.

    python benchmarks/agent_endpoints.py schema [NUM_SAMPLES]      # pip install llguidance
    python benchmarks/agent_endpoints.py recording [NUM_PAIRS]

`schema` samples JSON with and without its schema as the required format, in turns, and checks every
reply. `recording` sends the same calls to the service and through the recording endpoint, in turns.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import openai

from tinker_cookbook import service
from tinker_cookbook.capture import CallLog, ClientSampler, RecordingEndpoint
from tinker_cookbook.renderers import load_renderer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "color": {"enum": ["red", "green", "blue"]},
        "likes_tea": {"type": "boolean"},
    },
    "required": ["name", "age", "color", "likes_tea"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
ASK: list[Any] = [{"role": "user", "content": "Invent a person. Answer in JSON."}]
AT_ONCE = 50
NUM_PAIRS = 6
CALLS = 24
TOKENS = 32


def is_valid(text: str) -> bool:
    """Return whether a reply is JSON of the schema."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return (
        list(value) == sorted(value, key=list(SCHEMA["properties"]).index)
        and set(value) == set(SCHEMA["properties"])
        and isinstance(value["name"], str)
        and len(value["name"]) <= 8
        and type(value["age"]) is int
        and 0 <= value["age"] <= 120
        and value["color"] in ("red", "green", "blue")
        and isinstance(value["likes_tea"], bool)
    )


async def schema(client: openai.AsyncOpenAI, num_samples: int) -> None:
    """Print how many replies are valid, and the time per token with and without the schema.

    The first turns are pairs of calls with and without it.
    """
    num_valid, num_ended, total, ratios = 0, 0, 0, []
    for turn in range(num_samples // AT_ONCE):
        began = time.perf_counter()
        reply = await ask(client, turn, response_format=FORMAT, max_tokens=96)
        speed = reply.usage.completion_tokens / (time.perf_counter() - began)
        total += reply.usage.completion_tokens
        num_ended += sum(choice.finish_reason == "stop" for choice in reply.choices)
        num_valid += sum(is_valid(choice.message.content) for choice in reply.choices)
        if turn >= NUM_PAIRS:
            continue
        length = reply.usage.completion_tokens // AT_ONCE
        began = time.perf_counter()
        free = await ask(client, turn, max_tokens=length, extra_body={"stop_token_ids": []})
        free_speed = free.usage.completion_tokens / (time.perf_counter() - began)
        if turn:  # the first turn compiles and warms up
            ratios.append(free_speed / speed)
    print(f"valid {num_valid} of {num_samples}, ended {num_ended}, {total} tokens")
    ratios.sort()
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    print(f"slow-down {statistics.median(ratios):.3f}x (10% to 90%: {low:.3f} to {high:.3f})")


async def ask(client: openai.AsyncOpenAI, seed: int, **options: Any) -> Any:
    return await client.chat.completions.create(
        model=MODEL, messages=ASK, n=AT_ONCE, seed=seed, **options
    )


async def recording(plain: openai.AsyncOpenAI, connection: Any, num_pairs: int) -> None:
    """Print the tokens per second of both endpoints."""
    sampling = await connection.service_client().create_sampling_client(base_model=MODEL)
    renderer = load_renderer("smollm2", MODEL)
    with tempfile.TemporaryDirectory() as folder, CallLog(Path(folder, "calls.jsonl")) as log:
        async with RecordingEndpoint(log=log) as endpoint:
            rollout = endpoint.open(ClientSampler(sampling), renderer)
            address = rollout.address
            recorded = openai.AsyncOpenAI(
                base_url=address.base_url, api_key=address.api_key, max_retries=0
            )
            speeds: dict[str, list[float]] = {"plain": [], "recorded": []}
            for turn in range(num_pairs + 1):
                for name, client in (("plain", plain), ("recorded", recorded))[:: (-1) ** turn]:
                    speed = await calls_at_once(client, turn)
                    if turn:
                        speeds[name].append(speed)
    pairs = [b / a for a, b in zip(speeds["plain"], speeds["recorded"], strict=True)]
    for name, found in speeds.items():
        print(f"{name}: {statistics.median(found):.0f} tokens/s, {[round(s) for s in found]}")
    print(f"recorded / plain: {statistics.median(pairs):.3f}x, {[round(p, 3) for p in pairs]}")


async def calls_at_once(client: openai.AsyncOpenAI, turn: int) -> float:
    """Return the tokens per second of many calls at a time, each a poem about another number."""
    began = time.perf_counter()
    replies = await asyncio.gather(
        *(
            client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": f"Write a long poem about {number}."}],
                seed=turn * CALLS + number,
                max_tokens=TOKENS,
            )
            for number in range(CALLS)
        )
    )
    tokens = sum(reply.usage.completion_tokens for reply in replies if reply.usage is not None)
    return tokens / (time.perf_counter() - began)


async def main() -> None:
    """Run the part that the command line names."""
    with service.connect() as connection:
        client = openai.AsyncOpenAI(
            base_url=f"{connection.base_url}/oai/api/v1",
            api_key=connection.api_key,
            max_retries=0,
            timeout=600,
        )
        async with client:
            if sys.argv[1] == "schema":
                await schema(client, int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
            else:
                await recording(client, connection, int(sys.argv[2]) if len(sys.argv) > 2 else 5)


if __name__ == "__main__":
    asyncio.run(main())
