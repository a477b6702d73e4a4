"""Public agent frameworks, unmodified, call a tool through the recording endpoint."""

# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import openai
import pytest
import tinker

from tests.renderers.families import FAMILIES
from tinker_cookbook.capture import Address, RecordingEndpoint
from tinker_cookbook.capture.samplers import SamplingWishes
from tinker_cookbook.completers import StopCondition, TokensWithLogprobs
from tinker_cookbook.renderers import get_renderer

RENDERER = get_renderer("qwen3_instruct", FAMILIES["qwen3_instruct"].tokenizer)
CALL = '<tool_call>\n{"name": "count", "arguments": {"text": "bees make honey"}}\n</tool_call>'
ANSWER = "bees make honey"
# The frameworks and those that they need warn of much that is not ours.
pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("default")]


def count(text: str) -> int:
    """Count the words of a text."""
    return len(text.split())


class CallsThenAnswers:
    """Replies with a tool call first, and then with the answer."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    async def __call__(
        self, prompt: tinker.ModelInput, stop: StopCondition, wishes: SamplingWishes
    ) -> TokensWithLogprobs:
        self.prompts.append(RENDERER.tokenizer.decode(prompt.to_ints()))
        text = ANSWER if len(self.prompts) > 1 else CALL
        tokens = RENDERER.tokenizer.encode(text, add_special_tokens=False)
        tokens = [*tokens, int(RENDERER.get_stop_sequences()[0])]
        return TokensWithLogprobs(tokens, [-1.0] * len(tokens), stop_reason="stop")


def client_of(address: Address) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=address.base_url, api_key=address.api_key, max_retries=0)


async def run_openai_agents(client: Any, name: str, model_class: str, streams: bool) -> str:
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)
    model = getattr(agents, model_class)(name, client)
    agent = agents.Agent(
        name="writer", instructions="Be short.", tools=[agents.function_tool(count)], model=model
    )
    if not streams:
        return str((await agents.Runner.run(agent, "Three words.")).final_output)
    result = agents.Runner.run_streamed(agent, "Three words.")
    async for _ in result.stream_events():
        pass
    return str(result.final_output)


async def run_pydantic_ai(client: Any, name: str) -> str:
    pydantic_ai = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models.openai import (  # pyright: ignore[reportMissingImports]
        OpenAIChatModel,
    )
    from pydantic_ai.providers.openai import (  # pyright: ignore[reportMissingImports]
        OpenAIProvider,
    )

    model = OpenAIChatModel(name, provider=OpenAIProvider(openai_client=client))
    agent = pydantic_ai.Agent(model, instructions="Be short.", tools=[count])
    return str((await agent.run("Three words.")).output)


@pytest.mark.parametrize(
    "framework", ["agents_responses", "agents_chat", "agents_chat_stream", "pydantic_ai"]
)
async def test_a_tool_call_and_the_answer_are_one_sequence(framework: str):
    pytest.importorskip("pydantic_ai" if framework == "pydantic_ai" else "agents")
    sampler = CallsThenAnswers()
    async with RecordingEndpoint() as endpoint:
        rollout = endpoint.open(sampler, RENDERER)
        name = rollout.address.model
        async with client_of(rollout.address) as client:
            if framework == "pydantic_ai":
                answer = await run_pydantic_ai(client, name)
            else:
                api = "Responses" if "responses" in framework else "ChatCompletions"
                answer = await run_openai_agents(
                    client, name, f"OpenAI{api}Model", "stream" in framework
                )
        endpoint.close(rollout)
    assert answer == ANSWER
    assert [call.parent for call in rollout.calls] == [None, 0]
    assert "Count the words of a text." in sampler.prompts[0]
    assert "<tool_response>\n3\n</tool_response>" in sampler.prompts[1]
