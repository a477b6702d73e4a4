"""Images: as many positions as the model's image processor makes, where its template puts them."""

# pyright: reportArgumentType=false

from __future__ import annotations

import base64
import json
import pickle
import shutil
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.assets import load_tokenizer, tokenizer_folder
from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.image_processing_utils import KimiImageSizes, get_image_processor
from tinker_cookbook.renderers import Message, TrainOnWhat, get_renderer
from tinker_cookbook.renderers.base import image_to_chunk
from tinker_cookbook.supervised.common import datum_from_model_input_weights

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")

# As in the models' preprocessor_config.json.
QWEN3_VL = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
SMALL = {**QWEN3_VL, "size": {"shortest_edge": 3136, "longest_edge": 200704}, "patch_size": 14}
FORMATS = [
    ("qwen3_vl_instruct", "qwen3_vl", {}),
    ("qwen3_5", "qwen3_5", {}),
    ("qwen3_5_disable_thinking", "qwen3_5", {"enable_thinking": False}),
    ("qwen3_6", "qwen3_6", {}),
    ("qwen3_8_low_reasoning", "qwen3_8", {"reasoning_effort": "low"}),
]


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    loaded = {}
    for name, settings in {"qwen3_vl": QWEN3_VL, "small": SMALL}.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        loaded[name] = get_image_processor(str(folder))
    return loaded


@cache
def picture(width: int, height: int) -> Any:
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Any, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def count_by_pixels(processor: Any, image: Any) -> int:
    """Return the positions that the processor itself gives an image, pixels and all."""
    grid = processor(images=[image.convert("RGB")], return_tensors="np")["image_grid_thw"]
    return int(np.prod(grid)) // processor.merge_size**2


@pytest.mark.parametrize("name", ["qwen3_vl", "small"])
@pytest.mark.parametrize(
    "size", [(640, 480), (33, 1000), (1, 1), (28, 28), (1920, 1080), (15, 17), (200, 1)]
)
def test_positions_are_the_processors(
    processors: dict[str, Any], name: str, size: tuple[int, int]
) -> None:
    image = picture(*size)
    chunk = image_to_chunk(image, processors[name])
    assert chunk.expected_tokens == count_by_pixels(processors[name], image)
    assert chunk.length == chunk.expected_tokens


def talk() -> list[Any]:
    """Return a conversation with images of two sizes from the user and from a tool."""
    call = {"function": {"name": "crop", "arguments": '{"x": 1}'}}
    return [
        {"role": "system", "content": "See."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is "},
                {"type": "image", "image": picture(640, 480)},
                {"type": "text", "text": " and"},
                {"type": "image", "image": picture(100, 300)},
                {"type": "text", "text": "?"},
            ],
        },
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {
            "role": "tool",
            "content": [
                {"type": "image", "image": picture(64, 64)},
                {"type": "text", "text": "cropped"},
            ],
        },
        {"role": "assistant", "content": "Noise."},
        {"role": "user", "content": [{"type": "image", "image": picture(32, 32)}]},
    ]


def by_template(name: str, options: dict[str, Any], processor: Any, messages: list[Any]) -> list:
    """Return the template's ids of a prompt, each image's pad repeated as its processor says."""
    converted, images = [], []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            images += [part["image"] for part in content if part["type"] == "image"]
            content = [{"type": "image"} if part["type"] == "image" else part for part in content]
        calls = [
            {"type": "function", "function": {"name": "crop", "arguments": {"x": 1}}}
            for _ in message.get("tool_calls", [])
        ]
        converted.append(
            {**message, "content": content, **({"tool_calls": calls} if calls else {})}
        )
    tokenizer = load_tokenizer(name)
    text = tokenizer.apply_chat_template(
        converted, tokenize=False, add_generation_prompt=True, **options
    )
    pieces = text.split("<|image_pad|>")
    pads = ["<|image_pad|>" * count_by_pixels(processor, image) for image in images]
    whole = "".join(p + pad for p, pad in zip(pieces, [*pads, ""], strict=True))
    return tokenizer.encode(whole, add_special_tokens=False)


def with_pads(model_input: Any, pad: int) -> list[int]:
    """Return the ids of an input, images as their pads."""
    return [
        token
        for chunk in model_input.chunks
        for token in (chunk.tokens if chunk.type == "encoded_text" else [pad] * chunk.length)
    ]


@pytest.mark.parametrize(("name", "tokenizer", "options"), FORMATS)
def test_prompts_equal_the_template(
    processors: dict[str, Any], name: str, tokenizer: str, options: dict[str, Any]
) -> None:
    renderer = get_renderer(name, load_tokenizer(tokenizer), processors["qwen3_vl"])
    pad = load_tokenizer(tokenizer).convert_tokens_to_ids("<|image_pad|>")
    messages = talk()
    for length in (2, 4, 6):
        got = with_pads(renderer.build_generation_prompt(messages[:length]), pad)
        expected = by_template(tokenizer, options, processors["qwen3_vl"], messages[:length])
        assert renderer.encoder.decode(got) == renderer.encoder.decode(expected)
        # An opened think block without reasoning takes two tokens, as it is sampled.
        if length == 2 or name in ("qwen3_vl_instruct", "qwen3_5_disable_thinking"):
            assert got == expected


KIMI = ("kimi_k25", "kimi_k25_disable_thinking", "kimi_k26_preserve_thinking")


@pytest.mark.parametrize("name", KIMI)
def test_kimi_prompts_equal_the_template(name: str) -> None:
    """K2.5's template is K2-Thinking's with another opening of images (its own changelog says)."""
    tokenizer, processor = load_tokenizer("kimi_k2_5"), KimiImageSizes()
    renderer = get_renderer(name, tokenizer, processor)
    pad, options = "<|media_pad|>", {"thinking": not renderer.disables_thinking}
    template = tokenizer.chat_template.replace("<|media_start|>image", "<|media_begin|>image")
    talk_of_kimi = [m for m in talk() if m["role"] != "assistant"]
    converted: list[Any] = [dict(message) for message in talk_of_kimi]
    for message in converted:
        message["tool_call_id"] = "functions.crop:0"
        if isinstance(message["content"], list):
            message["content"] = [
                {"type": "image"} if p["type"] == "image" else p for p in message["content"]
            ]
    for message in talk_of_kimi:
        message["tool_call_id"] = "functions.crop:0"
    text = tokenizer.apply_chat_template(
        converted,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
        **options,
    )
    pieces = text.split(pad)
    images = [(640, 480), (100, 300), (64, 64), (32, 32)]
    counts = [processor.get_number_of_image_patches(h, w) // 4 for w, h in images]
    whole = "".join(p + pad * n for p, n in zip(pieces, [*counts, 0], strict=True))
    got = with_pads(
        renderer.build_generation_prompt(talk_of_kimi), tokenizer.convert_tokens_to_ids(pad)
    )
    assert got == tokenizer.encode(whole, add_special_tokens=False)


def test_kimi_trains_after_images_and_refuses_them_elsewhere() -> None:
    renderer = get_renderer("kimi_k25", load_tokenizer("kimi_k2_5"), KimiImageSizes())
    messages = talk()[:5]
    for model_input, weights in renderer.build_supervised_examples(messages):
        position = 0
        for chunk in model_input.chunks:
            if chunk.type == "image":
                assert not weights[position : position + chunk.length].any()
            position += chunk.length
        assert weights.any()
    image: Any = [{"type": "image", "image": picture(32, 32)}]
    for role in ("system", "assistant"):
        with pytest.raises(RendererError, match="image"):
            renderer.render([{"role": role, "content": image}])
    with pytest.raises(RendererError, match="'image' cannot be written"):
        get_renderer("kimi_k2", load_tokenizer("kimi_k2_5"), KimiImageSizes()).render(
            [{"role": "user", "content": image}]
        )


@pytest.mark.parametrize(("name", "tokenizer"), [f[:2] for f in FORMATS])
def test_training_follows_the_prompt_and_images_are_not_trained(
    processors: dict[str, Any], name: str, tokenizer: str
) -> None:
    renderer = get_renderer(name, load_tokenizer(tokenizer), processors["small"])
    messages = talk()[:5]
    for mode in (TrainOnWhat.LAST_ASSISTANT_TURN, TrainOnWhat.ALL_ASSISTANT_MESSAGES):
        examples = renderer.build_supervised_examples(messages, mode)
        trained = sum(int((np.diff([0, *weights]) > 0).sum()) for _, weights in examples)
        assert trained == 2
        for model_input, weights in examples:
            assert weights.shape == (model_input.length,)
            position = 0
            for chunk in model_input.chunks:
                if chunk.type == "image":
                    assert not weights[position : position + chunk.length].any()
                position += chunk.length
    model_input, weights = renderer.build_supervised_example(messages)
    prompt = renderer.build_generation_prompt(messages[:4])
    start = int(np.flatnonzero(weights)[0])
    assert prompt.length == start
    assert [c for c in model_input.chunks if c.type == "image"] == [
        c for c in prompt.chunks if c.type == "image"
    ]


def test_data_with_images_shift_and_cut(processors: dict[str, Any]) -> None:
    renderer = get_renderer("qwen3_vl_instruct", load_tokenizer("qwen3_vl"), processors["small"])
    model_input, weights = renderer.build_supervised_example(talk()[:5])
    datum = datum_from_model_input_weights(model_input, weights)
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
    assert datum.model_input.length == model_input.length - 1 == len(targets)
    first = model_input.chunks[0].length
    image = model_input.chunks[1]
    assert image.type == "image"
    assert not targets[first : first + image.length - 1].any()
    # Cut within the first image: it goes as a whole, and what remains has no image.
    short = datum_from_model_input_weights(model_input, weights, max_length=first + 5)
    assert [chunk.type for chunk in short.model_input.chunks] == ["encoded_text"]


def test_bytes_are_passed_on(processors: dict[str, Any], tmp_path: Path) -> None:
    image, processor = picture(60, 40), processors["small"]
    for kind, name in (("PNG", "png"), ("JPEG", "jpeg")):
        data = encoded(image, kind)
        file = tmp_path / f"x.{name}"
        file.write_bytes(data)
        uri = f"data:image/{name};base64,{base64.b64encode(data).decode()}"
        for given in (data, str(file), uri):
            chunk = image_to_chunk(given, processor)
            assert (chunk.data, chunk.format) == (data, name)
    for kind in ("WEBP", "BMP", "GIF"):
        chunk = image_to_chunk(encoded(image, kind), processor)
        assert chunk.format == "png"
        assert Image.open(BytesIO(chunk.data)).size == (60, 40)
    in_memory = image_to_chunk(image, processor)
    np.testing.assert_array_equal(
        np.asarray(Image.open(BytesIO(in_memory.data))), np.asarray(image)
    )
    for mode in ("RGBA", "P", "L", "CMYK", "1"):
        assert image_to_chunk(image.convert(mode), processor).format == "png"


def test_a_photo_on_its_side_is_turned_upright(processors: dict[str, Any]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    data = encoded(picture(640, 100), "JPEG", exif=exif)
    chunk = image_to_chunk(data, processors["small"])
    assert chunk.format == "png"
    assert Image.open(BytesIO(chunk.data)).size == (100, 640)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("https://somewhere/x.png", "is a URL"),
        (b"no image at all", "unknown format"),
        (b"\x89PNG\r\n\x1a\n and then nothing", "cannot be read"),
        ("data:image/png;base64,@@@", "not base64"),
        ("missing.png", "cannot be read"),
        (None, "NoneType"),
        (17, "of type int"),
    ],
)
def test_what_is_no_image_is_refused(processors: dict[str, Any], image: Any, message: str) -> None:
    with pytest.raises(RendererError, match=message):
        image_to_chunk(image, processors["small"])


def test_what_cannot_hold_images_says_so(processors: dict[str, Any]) -> None:
    tokenizer, processor = load_tokenizer("qwen3_5"), processors["small"]
    part: Any = {"type": "image", "image": picture(32, 32)}
    with pytest.raises(RendererError, match="200"):  # sides of a ratio above 200
        image_to_chunk(picture(900, 4), processor)
    renderer = get_renderer("qwen3_5", tokenizer, processor)
    user: Message = {"role": "user", "content": "q"}
    for role in ("system", "assistant"):
        messages: list[Message] = [{"role": role, "content": [part]}, user]
        with pytest.raises(RendererError, match="image"):
            renderer.render(messages if role == "system" else messages[::-1])
    with pytest.raises(RendererError, match="type='image' cannot be written"):
        get_renderer("qwen3_5", tokenizer).render([{"role": "user", "content": [part]}])
    sound: Any = {"type": "audio", "audio": b""}
    with pytest.raises(RendererError, match="'audio' cannot be combined with images"):
        renderer.render([{"role": "user", "content": [part, sound]}])


def test_a_renderer_with_images_is_pickled_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tokenizer_folder("qwen3_vl"), folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(SMALL))
    tokenizer, processor = load_tokenizer("qwen3_vl"), get_image_processor(str(folder))
    renderer = get_renderer("qwen3_vl_instruct", tokenizer, processor, model_name=str(folder))
    data = pickle.dumps(renderer)
    assert len(data) < 500
    again = pickle.loads(data)
    messages = talk()[:2]
    assert again.build_generation_prompt(messages) == renderer.build_generation_prompt(messages)
