"""The official OpenAI client against a real service: answers, streams, errors, cancellation."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportReturnType=false

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest
import tinker

from tests.e2e.sdk import batch, train_step
from tinker_cookbook.local.openai_api.codec import TextCodec

HELLO = [{"role": "user", "content": "Hello"}]


def base_url(service) -> str:
    return f"{service.base_url}/oai/api/v1"


@pytest.fixture(scope="module")
def client(local_service):
    import openai

    with openai.OpenAI(
        base_url=base_url(local_service), api_key=local_service.api_key, max_retries=0
    ) as client:
        yield client


@pytest.fixture(scope="module")
def checkpoint(shared_client, local_service) -> str:
    run = shared_client.create_lora_training_client(base_model=local_service.model, rank=4)
    run = run.result()
    for _ in range(3):
        train_step(run, batch(), tinker.AdamParams(learning_rate=1e-2))
    return run.save_weights_for_sampler("for-openai").result().path


def ask(client, service, **options):
    defaults = {"model": service.model, "messages": HELLO, "max_tokens": 12}
    return client.chat.completions.create(**(defaults | options))


def test_models_are_listed_with_checkpoints(client, local_service, checkpoint) -> None:
    import openai

    names = [model.id for model in client.models.list()]
    assert names[0] == local_service.model
    assert checkpoint in names
    assert client.models.retrieve(checkpoint).id == checkpoint
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_an_answer_is_what_the_sdk_samples(client, local_service, shared_client) -> None:
    got = ask(client, local_service, temperature=0, logprobs=True, top_logprobs=2)
    codec = TextCodec(Path(local_service.model))
    assert codec.template is not None
    prompt = codec.template.encode(codec.template.render(HELLO))
    sampler = shared_client.create_sampling_client(base_model=local_service.model).result()
    params = tinker.SamplingParams(max_tokens=12, temperature=0)
    want = sampler.sample(tinker.ModelInput.from_ints(prompt), 1, params).result().sequences[0]
    choice = got.choices[0]
    tokens = [token for token in want.tokens if token not in codec.hidden_ids]
    assert choice.message.content == codec.decode(tokens)
    assert choice.finish_reason == want.stop_reason
    assert got.usage.prompt_tokens == len(prompt)
    assert got.usage.completion_tokens == len(want.tokens)
    shown = choice.logprobs.content
    assert [entry.logprob for entry in shown] == pytest.approx(
        want.logprobs[: len(shown)], abs=1e-4
    )
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in shown), "greedy"
    text = b"".join(bytes(entry.bytes) for entry in shown).decode(errors="replace")
    assert text == choice.message.content


def test_a_stream_says_the_same(client, local_service, checkpoint) -> None:
    options = {"model": checkpoint, "n": 3, "seed": 5, "max_tokens": 25, "logprobs": True}
    whole = ask(client, local_service, **options)
    texts, reasons, logprobs = [""] * 3, [""] * 3, [[], [], []]
    usage = None
    stream = ask(
        client, local_service, **options, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] += choice.finish_reason or ""
            logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) > 1
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert [len(items) for items in logprobs] == [
        len(choice.logprobs.content) for choice in whole.choices
    ]
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_stop_strings_end_the_text(client, local_service) -> None:
    free = ask(client, local_service, temperature=0, max_tokens=30).choices[0].message.content
    stop = free[8:10]
    for stream in (False, True):
        got = ask(
            client, local_service, temperature=0, max_tokens=30, stop=[stop, "never"], stream=stream
        )
        if stream:
            chunks = [chunk.choices[0] for chunk in got]
            text = "".join(choice.delta.content or "" for choice in chunks)
            reason = chunks[-1].finish_reason
        else:
            text, reason = got.choices[0].message.content, got.choices[0].finish_reason
        assert text == free[: free.index(stop)]
        assert reason == "stop"


def test_completions_with_texts_tokens_and_echo(client, local_service) -> None:
    got = client.completions.create(
        model=local_service.model, prompt=["The quick", "Call me"], max_tokens=4, n=2, seed=1
    )
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    scored = client.completions.create(
        model=local_service.model, prompt="The quick", max_tokens=0, echo=True, logprobs=1
    )
    choice = scored.choices[0]
    assert choice.text == "The quick"
    assert len(choice.logprobs.tokens) == scored.usage.prompt_tokens
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    assert "".join(choice.logprobs.tokens) == "The quick"
    assert scored.usage.completion_tokens == 0
    by_ids = client.completions.create(
        model=local_service.model,
        prompt=[5, 6, 7],
        max_tokens=3,
        extra_body={"return_token_ids": True, "stop_token_ids": []},
    )
    assert len(by_ids.choices[0].token_ids) == 3


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAEC"}}
REFUSED = [
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"max_tokens": 100_000}, "max_tokens"),
    ({"stop": [""]}, "stop"),
    ({"presence_penalty": 3.0}, "presence_penalty"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"response_format": {"type": "grammar"}}, "response_format.type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"extra_body": {"temprature": 1}}, "temprature"),
    ({"messages": [{"role": "user", "content": "x" * 4000}]}, None),
    ({"messages": [{"role": "user", "content": [PICTURE]}]}, None),
]


@pytest.mark.parametrize(("options", "param"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes_are_named(client, local_service, options, param, stream) -> None:
    import openai

    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, local_service, **options, stream=stream)
    assert caught.value.body["param"] == param or param is None
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize("num_bytes", [200_000, 4 * 2**20])
@pytest.mark.parametrize("kind", ["prompt", "prompts", "message", "parts", "tools", "options"])
def test_texts_that_cannot_fit_are_not_tokenized(client, local_service, kind, num_bytes) -> None:
    """Their characters are counted; counting their tokens would take memory and minutes."""
    import openai

    text = "x " * (num_bytes // 2)
    parts = [{"type": "text", "text": text[:100_000]}] * (len(text) // 100_000)
    tool = {"type": "function", "function": {"name": "f", "description": text}}
    asked = {
        "prompt": {"prompt": text},
        "prompts": {"prompt": ["short", text]},
        "message": {"messages": [{"role": "user", "content": text}]},
        "parts": {"messages": [{"role": "user", "content": parts}]},
        "tools": {"messages": HELLO, "tools": [tool]},
        "options": {"messages": HELLO, "extra_body": {"chat_template_kwargs": {"x": [text]}}},
    }[kind]
    create = (client if "prompt" in asked else client.chat).completions.create
    with pytest.raises(openai.BadRequestError, match=r"has \d+ characters; the context") as caught:
        create(model=local_service.model, **asked)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == ("prompt" if kind.startswith("prompt") else "messages")


def test_too_many_completions_of_one_request(client, local_service) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="n=1024 with 5 prompts") as caught:
        client.completions.create(model=local_service.model, prompt=["x"] * 5, n=1024)
    assert caught.value.param == "n"


def test_other_threads_run_while_a_text_is_tokenized(tiny_model_folder) -> None:
    codec = TextCodec(tiny_model_folder)
    text = "The quick brown fox jumps over the lazy dog. " * 10_000
    for encode in (codec.encode_text, codec.template.encode):
        thread = threading.Thread(target=encode, args=[text])
        thread.start()
        num_turns = 0
        while thread.is_alive():
            time.sleep(0.001)
            num_turns += 1
        assert num_turns > 20


def test_keys_models_and_paths_that_are_wrong(client, local_service) -> None:
    import openai

    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, local_service, model="gpt-5")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        ask(client, local_service, model="tinker://nothing:train:0/sampler_weights/x")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="x", input="y")
    stranger = openai.OpenAI(
        base_url=base_url(local_service), api_key="tml-wrong-0123456789", max_retries=0
    )
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    stranger.close()


def test_half_a_surrogate_pair_is_refused(local_service) -> None:
    body = {"model": local_service.model, "messages": [{"role": "user", "content": "x\ud83d"}]}
    answer = httpx.post(
        f"{base_url(local_service)}/chat/completions",
        content=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {local_service.api_key}"},
    )
    assert answer.status_code == 400, answer.text


@pytest.mark.anyio
async def test_many_streams_at_once(local_service, checkpoint) -> None:
    import openai

    async with openai.AsyncOpenAI(
        base_url=base_url(local_service), api_key=local_service.api_key, max_retries=0
    ) as client:

        async def one(number: int) -> str:
            model = checkpoint if number % 2 else local_service.model
            stream = await client.chat.completions.create(
                model=model, messages=HELLO, seed=number, max_tokens=20, stream=True
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

        texts = await asyncio.gather(*map(one, range(12)))
    assert len(set(texts)) == 12


def sampled_tokens(service) -> float:
    answer = httpx.get(
        f"{service.base_url}/api/v1/local/status", headers={"X-API-Key": service.api_key}
    )
    status = answer.json()
    return status["totals"]["sampled_tokens"], status["queue"]["sampling_running"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_sampling(local_service, stream) -> None:
    before, _ = sampled_tokens(local_service)
    body = {"model": local_service.model, "prompt": "x", "max_tokens": 1000, "n": 8}
    body |= {"stream": stream, "stop_token_ids": []}
    headers = {"Authorization": f"Bearer {local_service.api_key}"}
    url = f"{base_url(local_service)}/completions"
    if stream:
        with httpx.stream("POST", url, json=body, headers=headers) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, headers=headers, timeout=0.3)
    deadline = time.monotonic() + 5
    while sampled_tokens(local_service)[1] and time.monotonic() < deadline:
        time.sleep(0.05)
    after, running = sampled_tokens(local_service)
    assert not running
    assert 0 < after - before < 8 * 1000


def test_a_shutdown_lets_a_stream_end(service_factory, tiny_model_folder) -> None:
    import openai

    service = service_factory(tiny_model_folder)
    client = openai.OpenAI(base_url=base_url(service), api_key=service.api_key, max_retries=0)
    stream = client.completions.create(
        model=service.model,
        prompt="x",
        max_tokens=600,
        stream=True,
        seed=1,
        extra_body={"stop_token_ids": [], "return_token_ids": True},
    )
    tokens = list(next(stream).choices[0].token_ids or [])
    threading.Timer(0.05, lambda: service.process.send_signal(signal.SIGTERM)).start()
    reason = None
    for chunk in stream:
        tokens += getattr(chunk.choices[0], "token_ids", None) or []
        reason = chunk.choices[0].finish_reason or reason
    assert (reason, len(tokens)) == ("length", 600)
    assert service.process.wait(30) == 0
    client.close()


def test_rules_change_the_tokens_and_not_their_logprobs(client, local_service) -> None:
    def sample(**options):
        extra = {"return_token_ids": True} | options.pop("extra", {})
        return ask(client, local_service, logprobs=True, extra_body=extra, **options).choices[0]

    free = sample(temperature=0)
    first = free.token_ids[0]
    banned = sample(temperature=0, top_logprobs=2, logit_bias={str(first): -100})
    assert banned.token_ids[0] != first
    best, second = banned.logprobs.content[0].top_logprobs
    assert best.logprob == free.logprobs.content[0].logprob, "the model's own logprobs"
    assert banned.logprobs.content[0].logprob == second.logprob
    assert sample(max_tokens=5, logit_bias={"77": 100}).token_ids == [77] * 5
    penalty = {"repetition_penalty": 50.0}
    varied = sample(temperature=0, extra=penalty).token_ids
    assert len(set(varied)) == len(varied) == 12
    assert sample(seed=1, extra={"min_p": 1.0}).token_ids == free.token_ids


def test_the_logprobs_of_an_echoed_prompt_are_those_of_the_sdk(
    client, local_service, shared_client
) -> None:
    prompt = [5, 6, 7, 8, 9]
    got = client.completions.create(
        model=local_service.model,
        prompt=prompt,
        echo=True,
        max_tokens=2,
        temperature=0,
        logprobs=2,
        extra_body={"return_token_ids": True},
    ).choices[0]
    sampler = shared_client.create_sampling_client(base_model=local_service.model).result()
    whole = tinker.ModelInput.from_ints([*prompt, *got.token_ids])
    want = sampler.compute_logprobs(whole).result()
    assert got.logprobs.token_logprobs[0] is None
    assert got.logprobs.token_logprobs[1:] == pytest.approx(want[1:], abs=1e-4)
    assert got.logprobs.text_offset[0] == 0
    assert len(got.logprobs.tokens) == len(got.logprobs.top_logprobs) == 7
    assert got.text.startswith(got.logprobs.tokens[0])


def test_an_end_token_behind_an_echoed_prompt_has_an_entry(client, local_service) -> None:
    """Programs that score a prompt ask for one token and leave out the last entry."""
    config = json.loads((Path(local_service.model) / "config.json").read_text(encoding="utf-8"))
    got = client.completions.create(
        model=local_service.model,
        prompt=[5, 6, 7],
        echo=True,
        max_tokens=1,
        logprobs=1,
        logit_bias={str(config["eos_token_id"]): 100},
    ).choices[0]
    assert got.finish_reason == "stop"
    assert len(got.logprobs.token_logprobs) == 4
    assert got.text.endswith(got.logprobs.tokens[2])
