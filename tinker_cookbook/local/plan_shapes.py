"""Sizes of a model that is not loaded, by the engine's own functions.

Where the engine runs the architecture itself, from its configuration; else from the modules that
transformers builds of it, without any numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinker_cookbook.local.engine.model.architecture import ArchConfig, read_arch, read_config_json
from tinker_cookbook.local.engine.types import LoraSpec

if TYPE_CHECKING:
    from tinker_cookbook.local.engine.model.lora import LoraTarget

__all__ = ["ModelShape", "read_shape"]


@dataclass(frozen=True)
class ModelShape:
    """What a plan needs to know; parameters are counted, not measured in bytes."""

    model_type: str
    arch: ArchConfig | None
    """None where the model runs through transformers."""
    num_layers: int
    vocab_size: int
    hidden_size: int
    max_positions: int
    num_parameters: int
    spare_parameters: int
    """Room beside the matrices, where training puts the adapter in use."""
    adapter_parts: dict[str, int]
    """`attn`, `mlp` or `unembed` -> parameters of the adapter."""
    cached_numbers: int
    """Keys and values of one token."""
    pass_bytes: Callable[[int, int], int]
    """From tokens of a sequence and bytes of a number to what training on it takes."""

    @property
    def adapter_parameters(self) -> int:
        return sum(self.adapter_parts.values())

    @property
    def embedding(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def block_parameters(self) -> int:
        """Of a native model: all that is neither an embedding nor the last norm."""
        assert self.arch is not None, "blocks are counted where the engine knows them"
        embeddings = self.embedding * (1 if self.arch.tied_embeddings else 2)
        return self.num_parameters - embeddings - self.hidden_size


def read_shape(folder: Path, spec: LoraSpec) -> ModelShape:
    """The shape of a model and of an adapter on it.

    Raises:
        WeightsError: in one line, if the engine could not run it.
    """
    arch = read_arch(folder)
    return _transformers_shape(folder, spec) if arch is None else _native_shape(arch, spec)


def _native_shape(arch: ArchConfig, spec: LoraSpec) -> ModelShape:
    from tinker_cookbook.local.engine.model.base_model import blocks_to_keep, native_pass_bytes
    from tinker_cookbook.local.engine.model.head import head_buffer_bytes
    from tinker_cookbook.local.engine.model.lora import lora_targets
    from tinker_cookbook.local.engine.model.transformer import block_activation_bytes

    rank = spec.rank

    def pass_bytes(num_tokens: int, itemsize: int) -> int:
        block = block_activation_bytes(arch, num_tokens, rank, itemsize)
        keep = blocks_to_keep(arch.num_layers, block)
        taken = native_pass_bytes(arch, num_tokens, 1, block, keep=keep)[1]
        return taken + head_buffer_bytes(arch.vocab_size, num_tokens)

    embeddings = arch.vocab_size * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    blocks = _block_parameters(arch) * arch.num_layers
    return ModelShape(
        model_type=arch.model_type,
        arch=arch,
        num_layers=arch.num_layers,
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        max_positions=arch.max_positions,
        num_parameters=blocks + embeddings + arch.hidden_size,
        spare_parameters=_spare_parameters(arch, rank) * arch.num_layers,
        adapter_parts=_count_parts(lora_targets(arch, spec), rank),
        cached_numbers=arch.num_layers * 2 * arch.kv_size,
        pass_bytes=pass_bytes,
    )


def _block_parameters(arch: ArchConfig) -> int:
    from tinker_cookbook.local.engine.model.weights import module_shapes

    norms = 2 * arch.hidden_size + (2 * arch.head_dim if arch.qk_norm else 0)
    bias = arch.q_size + 2 * arch.kv_size if arch.qkv_bias else 0
    return sum(rows * columns for rows, columns in module_shapes(arch).values()) + norms + bias


def _spare_parameters(arch: ArchConfig, rank: int) -> int:
    """In one block; a loaded model has room for some rank from the start."""
    from tinker_cookbook.local.engine.model.matrices import spare_columns
    from tinker_cookbook.local.engine.model.weights import FUSED, LORA_ROOM, module_shapes

    shapes = module_shapes(arch)
    return sum(
        spare_columns(max(rank, LORA_ROOM), len(modules)) * sum(shapes[m][0] for m in modules)
        for modules in FUSED.values()
    )


def _count_parts(targets: Iterable[LoraTarget], rank: int) -> dict[str, int]:
    parts: Counter[str] = Counter()
    for target in targets:
        parts[target.part] += rank * (target.in_features + target.out_features)
    return dict(parts)


def _transformers_shape(folder: Path, spec: LoraSpec) -> ModelShape:
    from tinker_cookbook.local.engine.model.hf_model import (
        find_linears,
        hf_pass_bytes,
        max_positions,
        wanted_targets,
    )
    from tinker_cookbook.local.engine.model.hf_support import model_on_meta
    from tinker_cookbook.local.engine.model.vision import has_vision

    model = model_on_meta(folder)
    config, text = model.config, model.config.get_text_config()
    vocab_size, hidden_size = model.get_output_embeddings().weight.shape
    targets = find_linears(model, reads_images=has_vision(read_config_json(folder)))
    return ModelShape(
        model_type=config.model_type,
        arch=None,
        num_layers=int(getattr(text, "num_hidden_layers", 1)),
        vocab_size=int(vocab_size),
        hidden_size=int(hidden_size),
        max_positions=max_positions(config),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        spare_parameters=0,
        adapter_parts=_count_parts(wanted_targets(targets, spec), spec.rank),
        cached_numbers=_cached_numbers(text),
        pass_bytes=lambda num_tokens, itemsize: hf_pass_bytes(
            config, num_tokens, vocab_size=int(vocab_size), backward=True
        ),
    )


def _cached_numbers(config: Any) -> int:
    """At most, as some layers may keep the last tokens only."""
    heads = int(config.num_attention_heads)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers * 2 * kv_heads * head_dim
