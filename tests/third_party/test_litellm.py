"""LiteLLM calls a sampling client of the real local service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tinker

from tinker_cookbook.renderers import get_renderer
from tinker_cookbook.tokenizer_utils import get_tokenizer
from tinker_cookbook.utils.sdk_compat import wait_for_client

# The package and those it needs warn of much that is not ours.
pytestmark = pytest.mark.filterwarnings("default")
litellm: Any = pytest.importorskip("litellm")

ASK: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
OPTIONS: dict[str, Any] = {"max_tokens": 6, "seed": 5, "temperature": 0.9}


@pytest.fixture(scope="module")
def sampling_client(local_service, shared_client) -> tinker.SamplingClient:
    return wait_for_client(shared_client.create_sampling_client(base_model=local_service.model))


@pytest.fixture
def model(sampling_client) -> str:
    from tinker_cookbook.third_party.litellm.provider import register_litellm_provider

    register_litellm_provider().set_client(sampling_client)
    return "tinker/any"


@pytest.fixture
def direct(sampling_client, tiny_model_folder: Path):
    renderer = get_renderer("qwen2_5", get_tokenizer(str(tiny_model_folder)))
    prompt = renderer.build_generation_prompt(ASK)
    params = tinker.SamplingParams(**OPTIONS, stop=renderer.get_stop_sequences())
    sampled = sampling_client.sample(prompt, num_samples=1, sampling_params=params).result()
    return renderer, prompt, sampled.sequences[0]


def test_a_completion_is_what_the_service_sampled(model, direct):
    renderer, prompt, sequence = direct
    shown = litellm.completion(model, ASK, renderer_name="qwen2_5", **OPTIONS)
    [choice] = shown.choices
    assert choice.message.content == renderer.tokenizer.decode(list(sequence.tokens))
    assert choice.finish_reason == "length"
    fields = choice.provider_specific_fields
    assert fields["prompt_tokens"] == prompt.to_ints()
    assert fields["tokens"] == list(sequence.tokens)
    assert fields["logprobs"] == list(sequence.logprobs)
    assert (shown.usage.prompt_tokens, shown.usage.completion_tokens) == (prompt.length, 6)


@pytest.mark.anyio
async def test_a_stream_and_calls_in_a_running_loop_say_the_same(model, direct):
    renderer, _, sequence = direct
    text = renderer.tokenizer.decode(list(sequence.tokens))
    whole = await litellm.acompletion(model, ASK, renderer_name="qwen2_5", **OPTIONS)
    assert whole.choices[0].message.content == text
    blocking = litellm.completion(model, ASK, renderer_name="qwen2_5", **OPTIONS)
    assert blocking.choices[0].message.content == text
    stream = await litellm.acompletion(model, ASK, renderer_name="qwen2_5", stream=True, **OPTIONS)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_request_that_cannot_be_used_names_its_field(model):
    with pytest.raises(Exception, match="response_format"):
        litellm.completion(
            model, ASK, renderer_name="qwen2_5", response_format={"type": "json_object"}
        )
