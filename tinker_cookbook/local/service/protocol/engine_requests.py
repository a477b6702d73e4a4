"""JSON requests -> the engine's dataclasses: optimizer, adapter and sampling parameters."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from tinker_cookbook.local.engine.csr import MAX_COLUMNS
from tinker_cookbook.local.engine.types import (
    AdamSpec,
    ImageInput,
    LoraSpec,
    SampleSpec,
    SparseRows,
)
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.limits import LORA_ALPHA, LORA_DROPOUT, Range
from tinker_cookbook.local.service.protocol.assets import read_asset
from tinker_cookbook.local.service.protocol.bodies import (
    AdamParams,
    LoraConfig,
    OptimStep,
    Sample,
    TargetTokens,
)
from tinker_cookbook.local.service.protocol.json_body import JsonObject, show_value
from tinker_cookbook.local.service.protocol.token_arrays import TOKEN_IDS
from tinker_cookbook.local.service.protocol.typed_body import read_as

__all__ = [
    "ADAMW",
    "decode_adam",
    "decode_lora",
    "decode_prompt",
    "decode_sample_spec",
    "refuse_other_optimizer",
]

ADAMW = "adamw"
MAX_IMAGE_TOKENS = 1_000_000


def decode_lora(values: JsonObject, user_metadata: Mapping[str, str] | None = None) -> LoraSpec:
    """Read a `lora_config`; fields that are missing have their defaults.

    The wire has no fields for alpha and dropout: `lora_alpha`, `lora_rslora` and `lora_dropout` of
    `user_metadata` set them.
    """
    metadata = user_metadata or {}
    config = read_as(LoraConfig, values, prefix="lora_config.")
    if not (config.train_unembed or config.train_mlp or config.train_attn):
        raise UserError(
            "lora_config trains nothing: train_unembed, train_mlp and train_attn are all false; "
            "set at least one"
        )
    return LoraSpec(
        rank=config.rank,
        seed=config.seed,
        train_unembed=config.train_unembed,
        train_mlp=config.train_mlp,
        train_attn=config.train_attn,
        alpha=_decode_alpha(metadata, config.rank),
        dropout=_decode_number(metadata, "lora_dropout", LoraSpec.dropout, LORA_DROPOUT),
    )


def _decode_alpha(metadata: Mapping[str, str], rank: int) -> float:
    """Return the alpha of `alpha / rank`.

    Rank-stabilized LoRA scales by `alpha / sqrt(rank)`, which is a larger alpha. It is saved as
    such, so that every program that reads the adapter scales it in the same way.
    """
    alpha = _decode_number(metadata, "lora_alpha", LoraSpec.alpha, LORA_ALPHA)
    stabilized = metadata.get("lora_rslora", "false")
    if stabilized not in ("true", "false"):
        raise UserError(
            f"user_metadata.lora_rslora={stabilized[:40]!r} is not accepted; use 'true' or 'false'"
        )
    return alpha * math.sqrt(rank) if stabilized == "true" else alpha


def _decode_number(metadata: Mapping[str, str], key: str, default: float, accepted: Range) -> float:
    """Read a number from a run's metadata.

    Raises:
        UserError: it names the key and the value.
    """
    text = metadata.get(key)
    if text is None:
        return default
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if number not in accepted:
        raise UserError(
            f"user_metadata.{key}={text[:40]!r} is not accepted; expected a number{accepted}"
        )
    return number


def refuse_other_optimizer(config: JsonObject | None, *, field: str) -> None:
    """Raise UserError unless the optimizer is AdamW, the only one that this service has."""
    kind = (config or {}).get("type", ADAMW)
    if kind != ADAMW:
        reason = ": its update rule is not public" if kind == "dimuon" else ""
        raise UserError(
            f"{field}.type={str(kind)[:40]!r} is not available here{reason}; use {ADAMW!r} "
            "(AdamParams)"
        )


def decode_adam(body: JsonObject) -> AdamSpec:
    """Read the optimizer's settings from an optim_step request."""
    given = read_as(OptimStep, body)
    refuse_other_optimizer(given.optimizer_params, field="optimizer_params")
    params = read_as(AdamParams, given.adam_params or given.optimizer_params, prefix="adam_params.")
    return AdamSpec(
        learning_rate=params.learning_rate,
        beta1=params.beta1,
        beta2=params.beta2,
        eps=params.eps,
        weight_decay=params.weight_decay,
        grad_clip_norm=params.grad_clip_norm,
    )


def decode_sample_spec(body: JsonObject, *, assets_dir: Path | None = None) -> SampleSpec:
    """Read an asample request.

    What depends on the prompt and the model, such as the shape of `target_prompt_logprobs`, is
    checked by the engine.

    Args:
        assets_dir: folder of the images that clients may point at; None: they may not.

    Raises:
        UserError: the message names the field and the value.
    """
    asked = read_as(Sample, body)
    prompt, images = decode_prompt(asked.prompt.chunks, assets_dir=assets_dir)
    params = asked.sampling_params
    return SampleSpec(
        prompt=prompt,
        images=images,
        num_samples=asked.num_samples,
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        seed=params.seed,
        stop=params.stop,
        prompt_logprobs=asked.prompt_logprobs,
        prompt_logprobs_last_n=asked.prompt_logprobs_last_n,
        topk_prompt_logprobs=asked.topk_prompt_logprobs,
        topk_sample_logprobs=asked.topk_sample_logprobs,
        prompt_alt_tokens_k=asked.prompt_alt_tokens_k,
        target_prompt_logprobs=_target_rows(asked.target_prompt_logprobs),
    )


# --- prompts ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _TextChunk:
    tokens: Annotated[np.ndarray, TOKEN_IDS]


@dataclass(frozen=True, kw_only=True)
class _Image:
    format: Literal["png", "jpeg"]
    expected_tokens: Annotated[int, Range(1, MAX_IMAGE_TOKENS)] | None = None


@dataclass(frozen=True, kw_only=True)
class _ImageChunk(_Image):
    data: object = None
    """The image as base64, which may be long: not a `str`, whose length is limited."""


@dataclass(frozen=True, kw_only=True)
class _ImagePointer(_Image):
    location: str


def decode_prompt(
    chunks: Sequence[object], *, assets_dir: Path | None = None
) -> tuple[np.ndarray, tuple[ImageInput, ...]]:
    """Read the chunks of a ModelInput: token ids int32 [P], and images with their positions.

    Where an image takes `expected_tokens` positions, the ids are 0. An image that does not say how
    many tokens it takes has no positions here.

    Args:
        assets_dir: folder of the images that clients may point at; None: they may not.
    """
    parts: list[np.ndarray] = []
    images: list[ImageInput] = []
    position = num_image_tokens = 0
    for index, chunk in enumerate(chunks):
        where = f"prompt.chunks[{index}]"
        part = _decode_chunk(chunk, where, position, assets_dir)
        if isinstance(part, ImageInput):
            images.append(part)
            num_tokens = part.expected_tokens or 0
            num_image_tokens += num_tokens
            if num_image_tokens > MAX_IMAGE_TOKENS:
                raise UserError(
                    f"{where}.expected_tokens={num_tokens} is too many: the images of a prompt may "
                    f"take {MAX_IMAGE_TOKENS} tokens together"
                )
            part = np.zeros(num_tokens, dtype=np.int32)
        parts.append(part)
        position += part.size
    prompt = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
    if prompt.size == 0 and not images:
        raise UserError("prompt has no tokens; send at least one (a start token, for example)")
    return prompt, tuple(images)


def _decode_chunk(
    chunk: object, where: str, position: int, assets_dir: Path | None
) -> np.ndarray | ImageInput:
    """Read one chunk: token ids int32 [N], or an image at `position`."""
    if not isinstance(chunk, dict):
        raise UserError(f"{where}={show_value(chunk)} is not a chunk; expected an object")
    kind = chunk.get("type", "encoded_text")
    if kind == "encoded_text":
        return read_as(_TextChunk, chunk, prefix=f"{where}.").tokens
    if kind == "image":
        image = read_as(_ImageChunk, chunk, prefix=f"{where}.")
        data = _decode_base64(image.data, f"{where}.data")
    elif kind == "image_asset_pointer":
        image = read_as(_ImagePointer, chunk, prefix=f"{where}.")
        data = read_asset(assets_dir, image.location, where)
    else:
        raise UserError(
            f"{where}.type={str(kind)[:40]!r} is not supported here; use encoded_text, image or "
            "image_asset_pointer"
        )
    return ImageInput(position, data, image.format, image.expected_tokens)


def _decode_base64(data: object, where: str) -> bytes:
    try:
        raw = base64.b64decode(data if isinstance(data, str) else "", validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{where} is not base64: {error}") from error
    if not raw:
        raise UserError(f"{where} is empty; send the image as base64")
    return raw


def _target_rows(targets: TargetTokens | None) -> np.ndarray | SparseRows | None:
    """Return int64 [P - 1, K]: row i holds the token ids that are scored as prompt token i + 1."""
    if targets is None:
        return None
    name, data = "target_prompt_logprobs", targets.data
    given = targets.shape
    shape = tuple(given.tolist()) if given is not None and given.size else (data.size,)
    if len(shape) != 2 or shape[0] < 0 or not 0 <= shape[1] <= MAX_COLUMNS:
        raise UserError(
            f"{name}.shape={list(shape)} is not accepted; expected [P - 1, K] for a prompt of P "
            f"tokens, with K up to {MAX_COLUMNS}"
        )
    if targets.sparse_crow_indices is not None:
        if targets.sparse_col_indices is None:
            raise UserError(f"{name}.sparse_col_indices is missing; expected a list")
        return SparseRows(
            values=data,
            crow_indices=targets.sparse_crow_indices,
            col_indices=targets.sparse_col_indices,
            shape=(shape[0], shape[1]),
        )
    if shape[0] * shape[1] != data.size:
        raise UserError(f"{name} has shape {list(shape)} but holds {data.size} values")
    return data.reshape(shape)
