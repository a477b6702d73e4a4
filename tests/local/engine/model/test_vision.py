"""Models that read images: equal to transformers, and images checked before they cost anything."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.vision_models import picture, tiny_vision_model
from tinker_cookbook.local.engine.host import EngineHost
from tinker_cookbook.local.engine.model.images import decode_image
from tinker_cookbook.local.engine.settings import EngineSettings
from tinker_cookbook.local.engine.types import (
    AdamSpec,
    ImageInput,
    LoraSpec,
    LossSpec,
    SampleSpec,
    TrainDatum,
)
from tinker_cookbook.local.errors import UserError

CROSS_ENTROPY = LossSpec("cross_entropy")
KINDS = {"qwen2_5_vl": 8, "llava": 16}
"""Tokens of the picture below."""


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str) -> str:
    return str(tiny_vision_model(kind))


@pytest.fixture(scope="module")
def host(model: str):
    host = EngineHost(EngineSettings(dtype="float32"))
    yield host
    host.close(RuntimeError("closed"))


def prompt_of(kind: str, seed: int = 0, num_images: int = 1) -> tuple[np.ndarray, tuple]:
    """Text, images and text."""
    rng = np.random.default_rng(seed)
    parts, images = [rng.integers(3, 300, 4)], []
    for number in range(num_images):
        position = sum(len(part) for part in parts)
        count = KINDS[kind]
        data = picture(seed=seed + number) if kind == "qwen2_5_vl" else picture(56, 56, seed)
        images.append(ImageInput(position, data, "png", count))
        parts += [np.zeros(count, np.int64), rng.integers(3, 300, 5)]
    return np.concatenate(parts).astype(np.int32), tuple(images)


def datum_of(tokens: np.ndarray, images: tuple) -> TrainDatum:
    targets = np.roll(tokens, -1).astype(np.int64)
    weights = np.ones(len(tokens), np.float32)
    return TrainDatum(tokens, {"target_tokens": targets, "weights": weights}, images)


def train(host: EngineHost, run: str, data: list[TrainDatum], *, backward: bool = True):
    return host.forward_backward(run, data, CROSS_ENTROPY, backward=backward)


def sample(host: EngineHost, sampler: str, spec: SampleSpec):
    future: Future = Future()
    host.sample(sampler, spec, future, None)
    while host.has_sampling_work:
        host.sampling_step()
    return future.result()


def test_logprobs_are_those_of_transformers(host, model: str, kind: str) -> None:
    """With two images, of which each must land in its place."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    host.create_run("equal", model, LoraSpec(rank=4, seed=0))
    tokens, images = prompt_of(kind, num_images=2)
    (found,) = train(host, "equal", [datum_of(tokens, images)], backward=False).logprobs
    other = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(model)
    pictures = [decode_image(image, "image") for image in images]
    inputs = dict(processor(images=pictures, return_tensors="pt"))
    ids = torch.from_numpy(tokens.astype(np.int64))
    for image in images:
        ids[image.position : image.position + KINDS[kind]] = 310
    if kind == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (ids == 310).int()[None]
    with torch.no_grad():
        logits = other(input_ids=ids[None], **inputs).logits[0].double()
    targets = torch.from_numpy(np.roll(tokens, -1).astype(np.int64))
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-4)


def test_training_looks_at_the_image(host, model: str, kind: str) -> None:
    host.create_run("learn", model, LoraSpec(rank=8, seed=0))
    tokens, images = prompt_of(kind)
    data = [datum_of(tokens, images)]
    losses = []
    for _ in range(8):
        losses.append(train(host, "learn", data).metrics["loss:sum"])
        host.optim_step("learn", AdamSpec(learning_rate=3e-3))
    assert losses[-1] < losses[0] - 1
    size = (112, 56) if kind == "qwen2_5_vl" else (56, 56)
    other = replace(images[0], data=picture(*size, seed=9))
    (seen,) = train(host, "learn", data, backward=False).logprobs
    (unseen,) = train(host, "learn", [datum_of(tokens, (other,))], backward=False).logprobs
    assert np.abs(seen - unseen)[images[0].position + KINDS[kind] :].max() > 1e-3


def test_sampler_and_trainer_agree(host, model: str, kind: str) -> None:
    host.create_run("agree", model, LoraSpec(rank=8, seed=0))
    tokens, images = prompt_of(kind, num_images=2)
    train(host, "agree", [datum_of(tokens, images)])
    host.optim_step("agree", AdamSpec(learning_rate=3e-3))
    host.create_sampler("agree", model, run_id="agree")
    spec = SampleSpec(tokens, images=images, num_samples=3, max_tokens=6, seed=5, stop=[])
    result = sample(host, "agree", replace(spec, prompt_logprobs=True))
    for sequence in result.sequences:
        whole = np.concatenate([tokens, sequence.tokens])
        (logprobs,) = train(host, "agree", [datum_of(whole, images)], backward=False).logprobs
        np.testing.assert_allclose(sequence.logprobs, logprobs[len(tokens) - 1 : -1], atol=2e-4)
    assert result.prompt_logprobs is not None
    is_image = np.zeros(len(tokens), bool)
    for image in images:
        is_image[image.position : image.position + KINDS[kind]] = True
    assert np.isnan(result.prompt_logprobs[is_image]).all()
    assert np.isfinite(result.prompt_logprobs[1:][~is_image[1:]]).all()
    unsaid = tuple(
        replace(image, expected_tokens=None, position=4 + 5 * number)
        for number, image in enumerate(images)
    )
    short = replace(spec, prompt=tokens[~is_image], images=unsaid)
    again = sample(host, "agree", short)
    assert [s.tokens.tolist() for s in again.sequences] == [
        s.tokens.tolist() for s in result.sequences
    ]


def test_text_after_images_is_not_disturbed(host, model: str, kind: str) -> None:
    """The model remembers nothing of another sequence's image."""
    host.create_sampler("text", model)
    text = np.random.default_rng(3).integers(3, 300, 9).astype(np.int32)
    spec = SampleSpec(text, max_tokens=8, temperature=0.0, stop=[])
    before = sample(host, "text", spec).sequences[0]
    tokens, images = prompt_of(kind)
    futures: list[Future] = [Future(), Future()]
    host.sample("text", SampleSpec(tokens, images=images, max_tokens=8, stop=[]), futures[0], None)
    host.sample("text", spec, futures[1], None)
    while host.has_sampling_work:
        host.sampling_step()
    after = futures[1].result().sequences[0]
    assert after.tokens.tolist() == before.tokens.tolist()
    np.testing.assert_allclose(after.logprobs, before.logprobs, atol=1e-5)


def test_wrong_expected_tokens_are_refused_with_the_right_number(host, model, kind) -> None:
    host.create_run("count", model, LoraSpec(rank=4, seed=0))
    host.create_sampler("count", model)
    tokens, images = prompt_of(kind)
    wrong = replace(images[0], expected_tokens=KINDS[kind] - 1)
    with pytest.raises(UserError, match=rf"data\[0\].*makes {KINDS[kind]} tokens"):
        train(host, "count", [datum_of(tokens[:-1], (wrong,))])
    with pytest.raises(UserError, match=rf"image 0.*makes {KINDS[kind]} tokens"):
        sample(host, "count", SampleSpec(tokens[:-1], images=(wrong,), max_tokens=2))


def bomb() -> bytes:
    """A PNG of a few bytes whose header claims 60000 x 60000 pixels."""
    import struct
    import zlib

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "format", "match"),
    [
        (picture(), "jpeg", "cannot be read as jpeg"),
        (picture(format="jpeg"), "png", "cannot be read as png"),
        (picture(), "gif", "format='gif'"),
        (picture()[:-40], "png", "cannot be read"),
        (picture(format="jpeg")[:-200], "jpeg", "cannot be read"),
        (b"", "png", "0 bytes"),
        (b"x" * (32 * 2**20 + 1), "png", "33554433 bytes"),
        (b"<svg onload='x'/>", "png", "cannot be read"),
        (bomb(), "png", "9000 x 9000 pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_images_are_refused(data: bytes, format: str, match: str) -> None:
    with pytest.raises(UserError, match=rf"data\[3\].*{match}"):
        decode_image(ImageInput(0, data, format, 1), "data[3]")
