"""Images through the SDK: training and sampling on a small random vision model."""

from __future__ import annotations

import base64
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import tinker

from tests.conftest import start_service
from tests.e2e.sdk import fails_as_user_error, is_alive, logprobs_of, params, tensor, tokens
from tests.vision_models import (
    IMAGE_TOKEN,
    VISION_END,
    VISION_START,
    picture,
    tiny_vision_model,
)
from tinker_cookbook.cli import main
from tinker_cookbook.eval.samples import SampleEvaluatorBuilder
from tinker_cookbook.local.openai_api.codec import TextCodec
from tinker_cookbook.rl.dataset_utils import RenderedDatasetBuilder
from tinker_cookbook.utils.sdk_sessions import close_session

NUM_TOKENS = 8
"""Of `picture()`."""


@pytest.fixture(scope="module")
def vision_service(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("vision")
    assets = folder / "assets"
    (assets / "inside").mkdir(parents=True)
    (assets / "inside" / "a.png").write_bytes(picture())
    (folder / "secret.png").write_bytes(picture())
    (assets / "link.png").symlink_to(folder / "secret.png")
    service = start_service(tiny_vision_model(), folder / "state", "--assets-dir", str(assets))
    yield service
    service.stop()


@pytest.fixture(scope="module")
def client(vision_service):
    client = vision_service.connect()
    yield client
    close_session(client, "success")


@pytest.fixture(scope="module")
def run(client, vision_service):
    return client.create_lora_training_client(
        base_model=vision_service.model, rank=8, seed=0
    ).result()


def image(**changes) -> tinker.types.ImageChunk:
    fields = {"data": picture(), "format": "png", "expected_tokens": NUM_TOKENS} | changes
    return tinker.types.ImageChunk(**fields)


def text(ids) -> tinker.types.EncodedTextChunk:
    return tinker.types.EncodedTextChunk(tokens=list(ids))


def question(chunk=None) -> tinker.ModelInput:
    chunks = [text([*tokens(4), VISION_START]), chunk or image(), text([VISION_END, *tokens(6, 1)])]
    return tinker.ModelInput(chunks=chunks)


def datum(chunk=None) -> tinker.Datum:
    model_input = question(chunk)
    targets = np.random.default_rng(0).integers(3, 300, model_input.length)
    weights = np.zeros(model_input.length)
    weights[-6:] = 1
    inputs = {"target_tokens": tensor(targets, np.int64), "weights": tensor(weights, np.float32)}
    return tinker.Datum(model_input=model_input, loss_fn_inputs=inputs)


def test_a_model_learns_from_an_image_and_samples_with_it(run) -> None:
    losses = []
    for _ in range(6):
        computed = run.forward_backward([datum()], "cross_entropy")
        run.optim_step(tinker.AdamParams(learning_rate=3e-3))
        losses.append(computed.result().metrics["loss:sum"])
    assert losses[-1] < losses[0] - 1
    sampler = run.save_weights_and_get_sampling_client().result()
    response = sampler.sample(
        question(), 2, params(5, stop=[]), include_prompt_logprobs=True
    ).result()
    assert [len(sequence.tokens) for sequence in response.sequences] == [5, 5]
    assert response.prompt_logprobs is not None
    assert response.prompt_logprobs[5 : 5 + NUM_TOKENS] == [None] * NUM_TOKENS
    whole = question()
    whole.chunks.append(text(response.sequences[0].tokens))
    targets = np.zeros(whole.length, np.int64)
    targets[-6:-1] = response.sequences[0].tokens
    inputs = {
        "target_tokens": tensor(targets, np.int64),
        "weights": tensor(np.ones(whole.length), np.float32),
    }
    item = tinker.Datum(model_input=whole, loss_fn_inputs=inputs)
    (logprobs,) = logprobs_of(run.forward([item], "cross_entropy").result())
    np.testing.assert_allclose(logprobs[-6:-1], response.sequences[0].logprobs, atol=1e-3)


def test_another_image_is_another_answer(client, vision_service) -> None:
    sampler = client.create_sampling_client(base_model=vision_service.model).result()
    one, other = (
        sampler.compute_logprobs(question(image(data=picture(seed=seed)))).result()
        for seed in (0, 1)
    )
    assert one[:5] == other[:5]
    assert one[-3:] != other[-3:]


def test_images_that_do_not_say_their_length(client, vision_service) -> None:
    sampler = client.create_sampling_client(base_model=vision_service.model).result()
    said, unsaid = (
        sampler.sample(question(image(expected_tokens=count)), 1, params(6, temperature=0.0))
        .result()
        .sequences[0]
        .tokens
        for count in (NUM_TOKENS, None)
    )
    assert said == unsaid


def test_a_file_of_the_assets_folder(client, vision_service) -> None:
    sampler = client.create_sampling_client(base_model=vision_service.model).result()
    assets = Path(vision_service.state_dir).parent / "assets"
    expected = sampler.sample(question(), 1, params(6, temperature=0.0)).result()
    for location in ("inside/a.png", str(assets / "inside/a.png"), f"file://{assets}/inside/a.png"):
        chunk = tinker.types.ImageAssetPointerChunk(
            location=location, format="png", expected_tokens=NUM_TOKENS
        )
        found = sampler.sample(question(chunk), 1, params(6, temperature=0.0)).result()
        assert found.sequences[0].tokens == expected.sequences[0].tokens


OUTSIDE = ["../secret.png", "link.png", "inside", "missing.png", "/etc/passwd", "", "\0"]
OUTSIDE += ["inside/../../secret.png", "https://example.org/a.png", "file://host/a.png"]
OUTSIDE += ["/proc/self/environ"]


@pytest.mark.parametrize("location", OUTSIDE)
def test_err_12_nothing_outside_of_the_assets_folder(client, vision_service, location) -> None:
    sampler = client.create_sampling_client(base_model=vision_service.model).result()
    chunk = tinker.types.ImageAssetPointerChunk(
        location=location, format="png", expected_tokens=NUM_TOKENS
    )
    fails_as_user_error(lambda: sampler.sample(question(chunk), 1, params(2)).result(), "location")


def test_err_12_bad_images_leave_the_run_alive(run, client, vision_service) -> None:
    sampler = client.create_sampling_client(base_model=vision_service.model).result()
    bad = [
        (image(expected_tokens=NUM_TOKENS + 1), f"makes {NUM_TOKENS} tokens"),
        (image(data=b"no picture"), "cannot be read"),
        (image(format="jpeg"), "cannot be read as jpeg"),
        (image(data=picture()[:100]), "cannot be read"),
    ]
    for chunk, match in bad:
        fails_as_user_error(
            lambda chunk=chunk: run.forward_backward([datum(chunk)], "cross_entropy").result(),
            f"data.0.*{match}",
        )
        fails_as_user_error(
            lambda chunk=chunk: sampler.sample(question(chunk), 1, params(2)).result(), match
        )
    assert is_alive(run)


def test_err_12_a_text_model_refuses_images(new_run, base_sampler) -> None:
    run = new_run()
    fails_as_user_error(
        lambda: run.forward_backward([datum()], "cross_entropy").result(), "reads text only"
    )
    fails_as_user_error(
        lambda: base_sampler.sample(question(), 1, params(2)).result(), "reads text only"
    )
    pointer = tinker.types.ImageAssetPointerChunk(location="a.png", format="png", expected_tokens=2)
    fails_as_user_error(
        lambda: base_sampler.sample(question(pointer), 1, params(2)).result(), "--assets-dir"
    )
    assert is_alive(run)


def test_the_toolkit_samples_with_images(
    vision_service, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    """Datasets, evaluators and `sample` write images as the supervised side does."""
    model, name = vision_service.model, "qwen3_vl_instruct"
    file = tmp_path / "x.png"
    file.write_bytes(picture())
    messages: list[Any] = [{"role": "user", "content": [{"type": "image", "image": str(file)}]}]
    data = RenderedDatasetBuilder(
        model_name=model, renderer_name=name, groups_per_batch=1, group_size=1
    )
    evaluator = SampleEvaluatorBuilder(
        prompts=[], model_name=model, renderer_name=name, log_path=str(tmp_path)
    )()
    for renderer in (data.build_renderer(), pickle.loads(pickle.dumps(evaluator.renderer))):
        prompt = renderer.build_generation_prompt(messages)
        assert [c.length for c in prompt.chunks if c.type == "image"] == [NUM_TOKENS]
    monkeypatch.setenv("TINKER_API_KEY", vision_service.api_key)
    words = ["sample", model, "--base-url", vision_service.base_url, "--max-tokens", "3"]
    assert main([*words, "--renderer", name, "--image", str(file), "--prompt", "What?"]) == 0
    assert "> What?" in capsys.readouterr().out
    assert main([*words, "--renderer", name, "--image", "missing.png"]) == 2
    assert "missing.png: the image cannot be read" in capsys.readouterr().err
    assert main([*words, "--renderer", "chatml", "--image", str(file)]) == 2
    assert (
        f"renderer=chatml cannot write images. For {model} use --renderer"
        in capsys.readouterr().err
    )


def test_an_openai_client_sends_images_in_messages(client, vision_service) -> None:
    url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    parts: list[Any] = [
        {"type": "text", "text": "See"},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "<|image_pad|>?"},
    ]
    with openai.OpenAI(
        base_url=f"{vision_service.base_url}/oai/api/v1", api_key=vision_service.api_key
    ) as openai_client:
        shown = openai_client.chat.completions.create(
            model=vision_service.model,
            messages=[{"role": "user", "content": parts}],
            max_tokens=8,
            temperature=0,
            extra_body={"return_token_ids": True},
        )
    codec = TextCodec(Path(vision_service.model))
    assert codec.template is not None
    content = [{"type": "text", "text": "See"}, {"type": "image"}, parts[2]]
    prompt = codec.template.encode(codec.template.render([{"role": "user", "content": content}]))
    assert prompt.count(IMAGE_TOKEN) == 1, "the text of a message is no image"
    at = prompt.index(IMAGE_TOKEN)
    chunks = [text(prompt[:at]), image(), text(prompt[at + 1 :])]
    sampler = client.create_sampling_client(base_model=vision_service.model).result()
    greedy = tinker.SamplingParams(max_tokens=8, temperature=0)
    want = sampler.sample(tinker.ModelInput(chunks=chunks), 1, greedy).result().sequences[0]
    choice: Any = shown.choices[0]
    assert choice.token_ids == list(want.tokens)
