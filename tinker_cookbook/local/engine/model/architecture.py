"""What the engine must know about a model's architecture, read from its config.json.

The families below share one block (RMSNorm, rotary attention with grouped keys, SwiGLU) and run on
the engine's own kernels. `read_arch` answers None for every other architecture: those go through
`hf_model`.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinker_cookbook.exceptions import ConfigurationError, WeightsError

__all__ = [
    "DTYPE_NAMES",
    "NATIVE_MODEL_TYPES",
    "ArchConfig",
    "RopeConfig",
    "dtype_from_environment",
    "read_arch",
    "read_config_json",
    "read_eos_token_ids",
]

NATIVE_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
DTYPE_NAMES = ("float32", "bfloat16")
_OTHER_HEAD = re.compile("Classification|QuestionAnswering|MultipleChoice|Regression|Reward")
_DTYPE_VARIABLE = "TINKER_COOKBOOK_DTYPE"


def dtype_from_environment() -> str | None:
    """The number format that the environment asks for, for who is not told; None: by device.

    Raises:
        ConfigurationError: if it is unknown.
    """
    name = os.environ.get(_DTYPE_VARIABLE) or None
    if name is not None and name not in DTYPE_NAMES:
        raise ConfigurationError(
            f"{_DTYPE_VARIABLE}={name!r} is unknown; use one of {', '.join(DTYPE_NAMES)}"
        )
    return name


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
    """Shape of a decoder that the engine runs itself."""

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
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim


def read_config_json(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a model folder.

    Raises:
        WeightsError: if there is none, or it is not a JSON object.
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


def read_arch(folder: Path) -> ArchConfig | None:
    """The architecture of a model folder; None where the engine's own kernels do not cover it."""
    config = read_config_json(folder)
    _check_head(folder, config)
    if not _is_native(config):
        return None
    rope = _read_rope(config)
    if rope is None:
        return None
    try:
        return _build_arch(config, rope)
    except KeyError as error:
        raise WeightsError(
            f"{folder / 'config.json'} lacks {error}; the file is damaged"
        ) from error


def _check_head(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a decoder that was given another output than one over the vocabulary."""
    names = config.get("architectures")
    others = [name for name in names or [] if _OTHER_HEAD.search(str(name))]
    if others:
        raise WeightsError(
            f"{folder}: {others[0]} puts other numbers out than the next token's logits; use a "
            "causal language model (LlamaForCausalLM and such)"
        )


def _build_arch(config: dict[str, Any], rope: RopeConfig) -> ArchConfig:
    model_type = config["model_type"]
    hidden_size = config["hidden_size"]
    num_heads = config["num_attention_heads"]
    return ArchConfig(
        model_type=model_type,
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
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _is_native(config: dict[str, Any]) -> bool:
    model_type = config.get("model_type")
    sliding = config.get("sliding_window") is not None and config.get("use_sliding_window", True)
    if model_type in ("qwen2", "qwen3"):
        sliding = bool(config.get("use_sliding_window", False))
    biased = model_type != "qwen2" and bool(config.get("attention_bias", False))
    return (
        model_type in NATIVE_MODEL_TYPES
        and config.get("hidden_act", "silu") == "silu"
        and not sliding
        and not biased
        and not config.get("mlp_bias", False)
        and "quantization_config" not in config
    )


def _read_rope(config: dict[str, Any]) -> RopeConfig | None:
    """Understands `rope_parameters` (transformers 5) and `rope_theta` + `rope_scaling` (before)."""
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


def read_eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Tokens that end a completion, from generation_config.json and config.json, in that order."""
    token_ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.exists():
            continue
        value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        token_ids.extend(v for v in values if isinstance(v, int) and v not in token_ids)
    return tuple(token_ids)
