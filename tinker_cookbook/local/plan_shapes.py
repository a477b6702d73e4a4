"""Sizes of a model that is not loaded, each from the function that the engine itself uses.

A model that the engine runs itself is built from its configuration with tensors that have a shape
but hold no numbers (`describe_native_model`); any other model is built by transformers in the same
way. Both are then asked what the loaded model would be asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from tinker_cookbook.local.engine.model.architecture import ArchConfig, read_arch, read_config_json
from tinker_cookbook.local.engine.model.base_model import NativeModel, describe_native_model
from tinker_cookbook.local.engine.model.lora import AdapterLayout, LoraTarget
from tinker_cookbook.local.engine.model.number_formats import FULL
from tinker_cookbook.local.engine.model.packed_matrix import PackedMatrix
from tinker_cookbook.local.engine.model.weights import LORA_ROOM
from tinker_cookbook.local.engine.sampling.cache_rows import cache_shape
from tinker_cookbook.local.engine.types import LoraSpec

__all__ = ["ModelSizes", "NativeSpeeds", "read_sizes"]


@dataclass(frozen=True)
class NativeSpeeds:
    """What speeds follow from, for a model that the engine runs itself."""

    block_parameters: int
    """Parameters of all decoder blocks."""
    head_parameters: int
    read_bytes: int
    """Weights that sampling reads for each token of a single sequence, in bytes."""


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model and of one adapter on it. Memory is in bytes."""

    model_type: str
    num_layers: int
    vocab_size: int
    max_positions: int
    num_parameters: int
    weights: dict[str, int]
    """Description of a part -> memory that it holds while the model is loaded."""
    adapter_parts: dict[str, int]
    """`attn`, `mlp` or `unembed` -> number of adapter parameters."""
    adapter_bytes: int
    """Memory of the adapter's parameters."""
    bytes_per_cached_token: int
    """Keys and values of one token in all layers."""
    pass_bytes: Callable[[int], int]
    """Number of tokens in one sequence -> extra memory for training on it."""
    native: NativeSpeeds | None
    """None where the model runs through transformers."""

    @property
    def adapter_parameters(self) -> int:
        """Number of parameters of the adapter."""
        return sum(self.adapter_parts.values())


def read_sizes(
    folder: Path,
    spec: LoraSpec,
    dtype: torch.dtype,
    *,
    compiled: bool,
    base_format: str = FULL,
) -> ModelSizes:
    """Return the sizes of the model in `folder` and of an adapter on it, for a CPU.

    Args:
        dtype: number format of the arithmetic.
        compiled: whether the compiled kernels exist.
        base_format: `full`, `int8` or `int4`.

    Raises:
        WeightsError: in one line, if the engine cannot run the model.
    """
    arch = read_arch(folder)
    if arch is None:
        return _transformers_sizes(folder, spec, dtype)
    room = max(spec.rank, LORA_ROOM)
    model = describe_native_model(
        arch,
        stored_dtype=_stored_dtype(folder),
        dtype=dtype,
        compiled=compiled,
        lora_room=room,
        base_format=base_format,
    )
    return _native_sizes(arch, spec, model)


def _stored_dtype(folder: Path) -> torch.dtype:
    config = read_config_json(folder)
    found = getattr(torch, str(config.get("dtype", config.get("torch_dtype"))), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _native_sizes(arch: ArchConfig, spec: LoraSpec, model: NativeModel) -> ModelSizes:
    compiled = isinstance(model.weights.head, PackedMatrix)
    cached = cache_shape(arch, model.weights)
    targets = model.lora_targets(spec)
    return ModelSizes(
        model_type=arch.model_type,
        num_layers=arch.num_layers,
        vocab_size=arch.vocab_size,
        max_positions=arch.max_positions,
        num_parameters=model.weights.num_parameters,
        weights=_weight_parts(model, packed=compiled),
        adapter_parts=_count_parts(targets, spec.rank),
        adapter_bytes=_adapter_bytes(targets, spec.rank),
        bytes_per_cached_token=cached.bytes_per_token,
        pass_bytes=lambda tokens: model.batch_bytes(tokens, 1, spec.rank, backward=True),
        native=_native_speeds(model),
    )


def _weight_parts(model: NativeModel, *, packed: bool) -> dict[str, int]:
    weights = model.weights
    if packed:
        return {"weights, packed for training and sampling": weights.num_bytes()}
    return {"weights": weights.num_bytes()}


def _native_speeds(model: NativeModel) -> NativeSpeeds:
    blocks, head = model.weights.block_parameters, model.weights.head
    head_parameters = head.out_features * head.in_features
    block_bytes = blocks * model.weights.layers[0].matrices["qkv"].bytes_per_number
    read_bytes = block_bytes + head_parameters * head.bytes_per_number
    return NativeSpeeds(blocks, head_parameters, int(read_bytes))


def _adapter_bytes(targets: Iterable[LoraTarget], rank: int) -> int:
    return AdapterLayout(tuple(targets), rank).num_bytes


def _count_parts(targets: Iterable[LoraTarget], rank: int) -> dict[str, int]:
    parts: Counter[str] = Counter()
    for target in targets:
        parts[target.part] += target.num_parameters(rank)
    return dict(parts)


def _transformers_sizes(folder: Path, spec: LoraSpec, dtype: torch.dtype) -> ModelSizes:
    from tinker_cookbook.local.engine.model.hf_model import (
        find_linears,
        hf_cache_bytes,
        hf_pass_bytes,
        max_positions,
        wanted_targets,
    )
    from tinker_cookbook.local.engine.model.hf_support import model_on_meta
    from tinker_cookbook.local.engine.model.vision import has_vision

    model = model_on_meta(folder)
    config, text = model.config, model.config.get_text_config()
    vocab_size = int(model.get_output_embeddings().weight.shape[0])
    linears = find_linears(model, reads_images=has_vision(read_config_json(folder)))
    targets = wanted_targets(linears, spec)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelSizes(
        model_type=config.model_type,
        num_layers=int(getattr(text, "num_hidden_layers", 1)),
        vocab_size=vocab_size,
        max_positions=max_positions(config),
        num_parameters=num_parameters,
        weights={"weights": num_parameters * dtype.itemsize},
        adapter_parts=_count_parts(targets, spec.rank),
        adapter_bytes=_adapter_bytes(targets, spec.rank),
        bytes_per_cached_token=hf_cache_bytes(config, dtype),
        pass_bytes=lambda tokens: hf_pass_bytes(
            config, tokens, vocab_size=vocab_size, backward=True
        ),
        native=None,
    )
