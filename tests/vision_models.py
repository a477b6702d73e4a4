"""A small random model that reads images, with the tokenizer of the other tiny models."""

from __future__ import annotations

import functools
import io
import json
import shutil
from pathlib import Path

import numpy as np

from tests.tiny_models import tiny_model

__all__ = ["TOKENS_PER_BLOCK", "picture", "tiny_vision_model"]

IMAGE_TOKEN, VISION_START, VISION_END = 310, 311, 312
VISION_TOKENS = {
    IMAGE_TOKEN: "<|image_pad|>",
    VISION_START: "<|vision_start|>",
    VISION_END: "<|vision_end|>",
}
PATCH, MERGE = 14, 2
TOKENS_PER_BLOCK = 1
"""An image of 28 x 28 pixels is one token."""


def picture(width: int = 112, height: int = 56, seed: int = 0, format: str = "png") -> bytes:
    """A random image, encoded; 112 x 56 pixels are 8 tokens of the tiny model."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format.upper())
    return file.getvalue()


TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == "image" %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}\
{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@functools.cache
def tiny_vision_model(kind: str = "qwen2_5_vl") -> Path:
    """Folder of a random two-layer vision-language model, built once per process."""
    text = tiny_model(tied=False)
    folder = text.parent / f"tiny-{kind}"
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(text / name, folder / name)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    _add_vision_tokens(folder / "tokenizer.json")
    eos = json.loads((text / "config.json").read_text())["eos_token_id"]
    build = {"qwen2_5_vl": _build_qwen, "llava": _build_llava}[kind]
    build(folder, eos)
    return folder


def _add_vision_tokens(file: Path) -> None:
    """Make tokens of a vision model's chat format of the ids after the last text token."""
    tokenizer = json.loads(file.read_text("utf-8"))
    model = tokenizer["model"]
    num_merges = len(model["merges"]) - (len(model["vocab"]) - IMAGE_TOKEN)
    model["merges"] = model["merges"][:num_merges]
    model["vocab"] = {text: token for text, token in model["vocab"].items() if token < IMAGE_TOKEN}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for token, name in VISION_TOKENS.items():
        entry = {"id": token, "content": name, "special": True, **flags}
        tokenizer["added_tokens"].append(entry)
    file.write_text(json.dumps(tokenizer), encoding="utf-8")


TEXT = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}


def _build_qwen(folder: Path, eos: int) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config=TEXT
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
        | {"eos_token_id": eos, "bos_token_id": 0},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": 48,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=IMAGE_TOKEN + 5,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    _save(Qwen2_5_VLForConditionalGeneration, config, folder)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "min_pixels": 28 * 28,
        "max_pixels": 28 * 28 * 64,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def _build_llava(folder: Path, eos: int) -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config=TEXT | {"model_type": "llama", "eos_token_id": eos, "bos_token_id": 0},
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": PATCH,
        },
        image_token_index=IMAGE_TOKEN,
        image_seq_length=16,
    )
    _save(LlavaForConditionalGeneration, config, folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 56},
        "crop_size": {"height": 56, "width": 56},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def _save(model_class, config, folder: Path) -> None:
    import torch

    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.25 if parameter.ndim > 1 else 0.02)
            if parameter.ndim == 1:
                parameter.add_(1.0)
    model.save_pretrained(folder)
