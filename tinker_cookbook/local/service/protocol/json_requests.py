"""JSON requests -> the engine's dataclasses: optimizer, adapter and sampling parameters."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinker_cookbook.local.engine.csr import MAX_COLUMNS, check_csr
from tinker_cookbook.local.engine.types import (
    AdamSpec,
    ImageInput,
    LoraSpec,
    SampleSpec,
    SparseRows,
)
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.service.protocol.assets import read_asset
from tinker_cookbook.local.service.protocol.fields import Fields, show_value
from tinker_cookbook.local.service.settings import Limits

__all__ = [
    "decode_adam",
    "decode_lora",
    "decode_prompt",
    "decode_sample_spec",
    "refuse_other_optimizer",
]

MAX_RANK = 4096
MAX_STOPS = 256
MAX_TOP_LOGPROBS = 1024
MAX_IMAGE_TOKENS = 1_000_000
MAX_INT32 = 2**31 - 1


def decode_lora(values: dict[str, Any] | None) -> LoraSpec:
    """Read a `lora_config`; without one the defaults hold."""
    fields = Fields(values or {}, prefix="lora_config.")
    fields.only("rank", "seed", "train_unembed", "train_mlp", "train_attn")
    spec = LoraSpec(
        rank=fields.integer("rank", 32, minimum=1, maximum=MAX_RANK),
        seed=fields.integer("seed", None),
        train_unembed=fields.flag("train_unembed", True),
        train_mlp=fields.flag("train_mlp", True),
        train_attn=fields.flag("train_attn", True),
    )
    if not (spec.train_unembed or spec.train_mlp or spec.train_attn):
        raise UserError(
            "lora_config trains nothing: train_unembed, train_mlp and train_attn are all false; "
            "set at least one"
        )
    return spec


def refuse_other_optimizer(config: dict[str, Any] | None, *, field: str) -> None:
    """Raise UserError unless the optimizer is AdamW, the one this service has."""
    kind = (config or {}).get("type", "adamw")
    if kind != "adamw":
        reason = ": its update rule is not public" if kind == "dimuon" else ""
        raise UserError(
            f"{field}.type={str(kind)[:40]!r} is not available here{reason}; use 'adamw' "
            "(AdamParams)"
        )


def decode_adam(body: dict[str, Any]) -> AdamSpec:
    """Read the step's settings from an optim_step request."""
    given = Fields(body)
    optimizer = given.object("optimizer_params", {})
    refuse_other_optimizer(optimizer, field="optimizer_params")
    fields = Fields(given.object("adam_params", {}) or optimizer, prefix="adam_params.")
    fields.only(
        *("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm", "type")
    )
    default = AdamSpec()
    return AdamSpec(
        learning_rate=fields.number("learning_rate", default.learning_rate, minimum=0.0),
        beta1=fields.number("beta1", default.beta1, minimum=0.0, below=1.0),
        beta2=fields.number("beta2", default.beta2, minimum=0.0, below=1.0),
        eps=fields.number("eps", default.eps, minimum=0.0),
        weight_decay=fields.number("weight_decay", default.weight_decay, minimum=0.0),
        grad_clip_norm=fields.number("grad_clip_norm", default.grad_clip_norm, minimum=0.0),
    )


def decode_prompt(
    values: dict[str, Any], *, assets_dir: Path | None = None
) -> tuple[np.ndarray, tuple[ImageInput, ...]]:
    """Read a JSON ModelInput: token ids int32 [P], and images with their positions.

    An image that does not say how many tokens it takes has none in the answer. `assets_dir` holds
    the files that clients may point at; None: they may not.
    """
    parts: list[np.ndarray] = []
    images: list[ImageInput] = []
    position = num_image_tokens = 0
    for index, chunk in enumerate(Fields(values, prefix="prompt.").array("chunks")):
        where = f"prompt.chunks[{index}]"
        if not isinstance(chunk, dict):
            raise UserError(f"{where}={show_value(chunk)} is not a chunk; expected an object")
        kind = chunk.get("type", "encoded_text")
        if kind == "encoded_text":
            part = _tokens(Fields(chunk, prefix=f"{where}.").array("tokens"), f"{where}.tokens")
        elif kind in ("image", "image_asset_pointer"):
            image = _image(Fields(chunk, prefix=f"{where}."), position, assets_dir)
            images.append(image)
            num_image_tokens += image.expected_tokens or 0
            if num_image_tokens > MAX_IMAGE_TOKENS:
                raise UserError(
                    f"{where}.expected_tokens={image.expected_tokens} is too many: the images of a "
                    f"prompt may take {MAX_IMAGE_TOKENS} tokens together"
                )
            part = np.zeros(image.expected_tokens or 0, dtype=np.int32)
        else:
            raise UserError(
                f"{where}.type={str(kind)[:40]!r} is not supported here; use encoded_text, image "
                "or image_asset_pointer"
            )
        parts.append(part)
        position += part.size
    prompt = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
    if prompt.size == 0 and not images:
        raise UserError("prompt has no tokens; send at least one (a start token, for example)")
    return prompt, tuple(images)


def _tokens(values: Sequence[Any], where: str) -> np.ndarray:
    found = _as_integers(values)
    if found is not None and (not found.size or (found.min() >= 0 and found.max() <= MAX_INT32)):
        return found.astype(np.int32)
    for index, value in enumerate(values):
        if type(value) is not int or not 0 <= value <= MAX_INT32:
            raise UserError(f"{where}[{index}]={str(value)[:40]} is not a token id")
    raise AssertionError("one of them is no token id")


def _as_integers(values: Sequence[Any]) -> np.ndarray | None:
    """int64, or None if one of them is something else; bool is an int in Python but not here."""
    if not set(map(type, values)) <= {int}:
        return None
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError:
        return None


def _image(fields: Fields, position: int, assets_dir: Path | None) -> ImageInput:
    if fields.values.get("type") == "image_asset_pointer":
        raw = read_asset(assets_dir, fields.text("location"), fields.prefix.rstrip("."))
    else:
        raw = _base64(fields)
    return ImageInput(
        position=position,
        data=raw,
        format=fields.text("format", choices=("png", "jpeg")),
        expected_tokens=fields.integer(
            "expected_tokens", None, minimum=1, maximum=MAX_IMAGE_TOKENS
        ),
    )


def _base64(fields: Fields) -> bytes:
    data = fields.values.get("data")
    try:
        raw = base64.b64decode(data if isinstance(data, str) else "", validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{fields.prefix}data is not base64: {error}") from error
    if not raw:
        raise UserError(f"{fields.prefix}data is empty; send the image as base64")
    return raw


def decode_sample_spec(
    body: dict[str, Any], limits: Limits, *, assets_dir: Path | None = None
) -> SampleSpec:
    """Read an asample request; `assets_dir` as for `decode_prompt`.

    Raises:
        UserError: names the field and the value.
    """
    fields = Fields(body)
    prompt, images = decode_prompt(fields.object("prompt"), assets_dir=assets_dir)
    params = Fields(fields.object("sampling_params", {}), prefix="sampling_params.")
    params.only("max_tokens", "seed", "stop", "temperature", "top_k", "top_p")
    top_k = params.integer("top_k", -1, minimum=-1, maximum=MAX_INT32)
    prompt_logprobs = fields.flag("prompt_logprobs", False)
    last_n = fields.integer("prompt_logprobs_last_n", None)
    _check_last_n(last_n, prompt.size, prompt_logprobs)
    return SampleSpec(
        prompt=prompt,
        images=images,
        num_samples=fields.integer("num_samples", 1, minimum=1, maximum=limits.max_num_samples),
        max_tokens=params.integer("max_tokens", None, minimum=1, maximum=MAX_INT32),
        temperature=params.number("temperature", 1.0, minimum=0.0, maximum=1e6),
        top_k=-1 if top_k == 0 else top_k,
        top_p=_top_p(params),
        seed=params.integer("seed", None),
        stop=_stop(params.values.get("stop")),
        prompt_logprobs=prompt_logprobs,
        prompt_logprobs_last_n=last_n,
        topk_prompt_logprobs=_count(fields, "topk_prompt_logprobs"),
        topk_sample_logprobs=_count(fields, "topk_sample_logprobs"),
        prompt_alt_tokens_k=_count(fields, "prompt_alt_tokens_k"),
        target_prompt_logprobs=_targets(fields.object("target_prompt_logprobs", None), prompt.size),
    )


def _count(fields: Fields, name: str) -> int:
    return fields.integer(name, 0, minimum=0, maximum=MAX_TOP_LOGPROBS)


def _top_p(params: Fields) -> float:
    top_p = params.number("top_p", 1.0, minimum=0.0, maximum=1.0)
    if top_p == 0.0:
        raise UserError("sampling_params.top_p=0 keeps no token; use more than 0, up to 1 (off)")
    return top_p


def _check_last_n(last_n: int | None, prompt_length: int, prompt_logprobs: bool) -> None:
    if last_n is None:
        return
    if not prompt_logprobs:
        raise UserError(
            f"prompt_logprobs_last_n={last_n} needs prompt_logprobs; set include_prompt_logprobs"
        )
    if not 1 <= last_n <= prompt_length - 1:
        raise UserError(
            f"prompt_logprobs_last_n={last_n} is out of range; use 1 to {prompt_length - 1} "
            f"for this prompt of {prompt_length} tokens"
        )


def _stop(value: Any) -> list[str] | list[int] | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or len(value) > MAX_STOPS:
        raise UserError(f"sampling_params.stop={str(value)[:80]} is not a text or a list of stops")
    if all(isinstance(item, str) for item in value):
        if any(not item or len(item) > 4096 for item in value):
            raise UserError("sampling_params.stop holds an empty or over-long text; drop it")
        return value
    for item in value:
        if type(item) is not int or not 0 <= item <= MAX_INT32:
            raise UserError(
                f"sampling_params.stop holds {str(item)[:40]!r}; use texts only, or token ids only"
            )
    return value


def _targets(values: dict[str, Any] | None, prompt_length: int) -> np.ndarray | SparseRows | None:
    """int64 [P - 1, K]: row i asks about prompt token i + 1."""
    if values is None:
        return None
    fields = Fields(values, prefix="target_prompt_logprobs.")
    name = "target_prompt_logprobs"
    fields.text("dtype", choices=("int64",))
    data = _integers(fields, "data")
    shape = tuple(_integers(fields, "shape").tolist()) if values.get("shape") else (data.size,)
    is_wide = len(shape) == 2 and not 0 <= shape[1] <= MAX_COLUMNS
    if len(shape) != 2 or shape[0] != max(prompt_length - 1, 0) or is_wide:
        raise UserError(
            f"{name} has shape {list(shape)}; expected [{max(prompt_length - 1, 0)}, K] for this "
            f"prompt of {prompt_length} tokens, with K up to {MAX_COLUMNS}"
        )
    if values.get("sparse_crow_indices") is not None:
        rows = SparseRows(
            values=data,
            crow_indices=_integers(fields, "sparse_crow_indices"),
            col_indices=_integers(fields, "sparse_col_indices"),
            shape=(shape[0], shape[1]),
        )
        check_csr(rows, name)
        return rows
    if shape[0] * shape[1] != data.size:
        raise UserError(f"{name} has shape {list(shape)} but holds {data.size} values")
    return data.reshape(shape)


def _integers(fields: Fields, name: str) -> np.ndarray:
    values = fields.array(name)
    found = _as_integers(values)
    if found is not None:
        return found
    for value in values:
        if type(value) is not int or not -(2**63) <= value < 2**63:
            raise UserError(f"{fields.prefix}{name} holds {str(value)[:40]}; use whole numbers")
    raise AssertionError("one of them is no whole number of 64 bits")
