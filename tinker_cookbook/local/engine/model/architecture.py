"""The architecture of a model, read from its config.json.

The families in `FAMILIES` share one decoder block (RMSNorm, rotary attention with grouped keys,
SwiGLU; `transformer` has the formulas) and run on the engine's own kernels. `read_arch` returns
None for every other architecture: those run through transformers (`hf_model`), slower.

To add a family with the same block, add its entry; docs/adding_an_architecture.md has an example.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinker_cookbook.exceptions import WeightsError

__all__ = [
    "FAMILIES",
    "ArchConfig",
    "Family",
    "RopeConfig",
    "read_arch",
    "read_config_json",
    "read_eos_token_ids",
]

ConfigJson = Mapping[str, Any]
"""A parsed config.json; its values have the types that each family's files give them."""


@dataclass(frozen=True)
class Family:
    """How a family's block differs from Llama's, by its `model_type`."""

    qkv_bias: bool = False
    """The query, key and value projections have a bias."""
    qk_norm: bool = False
    """Queries and keys are normed per head before their rotation."""
    slides: bool = True
    """Whether `sliding_window` holds unless `use_sliding_window` says otherwise."""


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True, slides=False),
    "qwen3": Family(qk_norm=True, slides=False),
}
"""`model_type` of config.json -> the family, for all models that the engine runs itself."""

_FOREIGN_OPTIONS = ("mlp_bias", "attention_out_bias")
"""Options that the block lacks: a model that sets one runs through transformers."""
_OTHER_HEAD = re.compile("Classification|QuestionAnswering|MultipleChoice|Regression|Reward")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; `llama3` scaling stretches the low frequencies."""

    theta: float = 10000.0
    kind: str = "default"
    """`default`, `linear` or `llama3`."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class ArchConfig:
    """Sizes and options of a decoder that the engine runs itself."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    qk_norm: bool
    tied_embeddings: bool

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together; the value heads have the same."""
        return self.num_kv_heads * self.head_dim


def read_arch(folder: Path) -> ArchConfig | None:
    """Return the architecture of a model folder; None if the engine's own kernels lack it.

    Raises:
        WeightsError: if config.json is missing or damaged, or the model is not a language model.
    """
    config = read_config_json(folder)
    _check_head(folder, config)
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or not _has_native_block(config, family):
        return None
    rope = _read_rope(config)
    if rope is None:
        return None
    try:
        return _build_arch(config, family, rope)
    except KeyError as error:
        raise WeightsError(
            f"{folder / 'config.json'} lacks {error}; the file is damaged"
        ) from error


def _has_native_block(config: ConfigJson, family: Family) -> bool:
    """Return whether the options of a model leave the family's block as the engine knows it."""
    return not (
        config.get("hidden_act", "silu") != "silu"
        or _slides(config, family)
        or (config.get("attention_bias", False) and not family.qkv_bias)
        or any(config.get(name) for name in _FOREIGN_OPTIONS)
        or "quantization_config" in config
    )


def _slides(config: ConfigJson, family: Family) -> bool:
    """Return whether a token attends to a window of the tokens before it only."""
    if family.slides and config.get("sliding_window") is None:
        return False
    return bool(config.get("use_sliding_window", family.slides))


def _build_arch(config: ConfigJson, family: Family, rope: RopeConfig) -> ArchConfig:
    hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
    return ArchConfig(
        model_type=config["model_type"],
        vocab_size=config["vocab_size"],
        hidden_size=hidden_size,
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or hidden_size // num_heads,
        max_positions=config.get("max_position_embeddings", 2048),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope=rope,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _read_rope(config: ConfigJson) -> RopeConfig | None:
    """Return the rotary embedding; None for a kind that the engine lacks.

    Reads `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling` (before).
    """
    parameters = dict(config.get("rope_scaling") or {})
    parameters.update(config.get("rope_parameters") or {})
    theta = float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        return None
    if float(parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1))) != 1:
        return None
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=float(parameters.get("factor", 1.0)),
        low_freq_factor=float(parameters.get("low_freq_factor", 1.0)),
        high_freq_factor=float(parameters.get("high_freq_factor", 4.0)),
        original_max_positions=int(parameters.get("original_max_position_embeddings", 8192)),
    )


def read_config_json(folder: Path) -> dict[str, Any]:
    """Return the parsed config.json of a model folder.

    Raises:
        WeightsError: if it is missing or not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(
            f"model folder {folder} has no config.json; it is not a model"
        ) from error
    except ValueError as error:
        raise WeightsError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} holds a {type(config).__name__}; a JSON object is expected")
    return config


def _check_head(folder: Path, config: ConfigJson) -> None:
    """Refuse a decoder whose output is not a distribution over the vocabulary."""
    names = config.get("architectures")
    others = [name for name in names or [] if _OTHER_HEAD.search(str(name))]
    if others:
        raise WeightsError(
            f"{folder}: {others[0]} computes other numbers than the next token's logits; use a "
            "causal language model, such as LlamaForCausalLM"
        )


def read_eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Return the tokens that end a completion: generation_config.json's, then config.json's."""
    token_ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.exists():
            continue
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        token_ids.extend(v for v in values if isinstance(v, int) and v not in token_ids)
    return tuple(token_ids)
