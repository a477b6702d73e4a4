"""Learning rates and parameter counts, computed from a model's dimensions.

The learning-rate rule is the one published with the Tinker cookbook (0.6): 5e-5 for full
fine-tuning of a model with hidden size 2000, ten times that for LoRA, times (2000 / hidden) to a
power that was fitted per family. https://thinkingmachines.ai/blog/lora measured that LoRA needs ten
times the rate of full fine-tuning, whatever the rank. Families without a separate fit get the lower
of the two fits, as a starting point. Dimensions are from the models' published config.json files;
models that are not in a table are looked up in their own config.json.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from typing import Any

from tinker_cookbook.exceptions import ConfigurationError, WeightsDownloadError
from tinker_cookbook.model_shapes import AdapterShapes, hidden_size, known_config, read_shapes

__all__ = [
    "ModelDimensions",
    "get_full_finetune_lr_multiplier",
    "get_full_finetune_param_count",
    "get_lora_lr_multiplier",
    "get_lora_lr_over_full_finetune_lr",
    "get_lora_param_count",
    "get_lr",
    "get_lr_with_reason",
    "get_model_dimensions",
]

logger = logging.getLogger(__name__)

BASE_LR = 5e-5
REFERENCE_HIDDEN_SIZE = 2000
LORA_LR_FACTOR = 10.0
# Fitted exponents; SmolLM2 and others of the Llama architecture take Llama's.
FAMILY_EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
# Keyed by the beginning of `model_type`. The fits were made with dense models; the published rule
# uses Qwen's for every model with that name.
FITTED_TYPES = {"llama": "llama", "mistral": "llama", "smollm3": "llama", "qwen": "qwen"}


@dataclass(frozen=True)
class ModelDimensions:
    """The dimensions of a dense decoder that the formulas below need."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    family: str = "llama"


def _llama(*shape: int, vocab: int = 128256, tied: bool = False) -> ModelDimensions:
    hidden, layers, heads, kv_heads, head_dim, intermediate = shape
    return ModelDimensions(hidden, layers, heads, kv_heads, head_dim, intermediate, vocab, tied)


def _qwen3(*shape: int, tied: bool = False) -> ModelDimensions:
    hidden, layers, heads, kv_heads, intermediate = shape
    return ModelDimensions(
        *(hidden, layers, heads, kv_heads, 128, intermediate, 151936, tied),
        qk_norm=True,
        family="qwen",
    )


# Keyed by the name's last part without suffixes such as -Instruct or -Base.
_DIMENSIONS = {
    "Llama-3.2-1B": _llama(2048, 16, 32, 8, 64, 8192, tied=True),
    "Llama-3.2-3B": _llama(3072, 28, 24, 8, 128, 8192, tied=True),
    "Llama-3.1-8B": _llama(4096, 32, 32, 8, 128, 14336),
    "Llama-3.1-70B": _llama(8192, 80, 64, 8, 128, 28672),
    "Llama-3.3-70B": _llama(8192, 80, 64, 8, 128, 28672),
    "SmolLM2-135M": _llama(576, 30, 9, 3, 64, 1536, vocab=49152, tied=True),
    "SmolLM2-360M": _llama(960, 32, 15, 5, 64, 2560, vocab=49152, tied=True),
    "SmolLM2-1.7B": _llama(2048, 24, 32, 32, 64, 8192, vocab=49152, tied=True),
    "Qwen3-0.6B": _qwen3(1024, 28, 16, 8, 3072, tied=True),
    "Qwen3-1.7B": _qwen3(2048, 28, 16, 8, 6144, tied=True),
    "Qwen3-4B": _qwen3(2560, 36, 32, 8, 9728, tied=True),
    "Qwen3-8B": _qwen3(4096, 36, 32, 8, 12288),
    "Qwen3-14B": _qwen3(5120, 40, 40, 8, 17408),
    "Qwen3-32B": _qwen3(5120, 64, 64, 8, 25600),
}
_SUFFIXES = ("-Instruct-2507", "-Thinking-2507", "-Instruct", "-Base")


def get_model_dimensions(model_name: str) -> ModelDimensions:
    """Return dimensions from the table, or from the model's config.json on this machine or the hub.

    Raises:
        ConfigurationError: if the model is unknown, cannot be fetched, or is not a dense decoder of
            the Llama or Qwen family.
    """
    short = _short_name(model_name)
    if short in _DIMENSIONS:
        return _DIMENSIONS[short]
    return _parse_config(model_name, _config_of(model_name))


def _short_name(model_name: str) -> str:
    short = model_name.partition(":")[0].rstrip("/").rpartition("/")[2]
    for suffix in _SUFFIXES:
        short = short.removesuffix(suffix)
    return short


def _config_of(model_name: str) -> dict[str, Any]:
    """Return the config from the table, or the model's config.json."""
    known = known_config(model_name)
    if known is not None:
        return dict(known)
    from tinker_cookbook.model_files import resolve_model_folder

    try:
        folder = resolve_model_folder(model_name, weights=False)
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (WeightsDownloadError, ConfigurationError, OSError, ValueError) as error:
        raise ConfigurationError(
            f"model_name={model_name} has unknown dimensions, from which the learning rate is "
            f"computed ({str(error).rstrip('.')}). Correct model_name, or set learning_rate."
        ) from error


def get_lora_lr_over_full_finetune_lr(model_name: str, lora_alpha: int = 32) -> float:
    """Return the ratio of LoRA's best learning rate to that of full fine-tuning, which is 10.

    It holds for alpha 32, which the services use, and does not depend on the model or the rank.
    """
    if lora_alpha != 32:
        raise ConfigurationError(
            f"lora_alpha={lora_alpha} has no measured ratio; services train with 32."
        )
    del model_name
    return LORA_LR_FACTOR


def get_lr(model_name: str, is_lora: bool = True) -> float:
    """Return a learning rate that is a good starting point for a model.

    Source: see the module's docstring. Below hidden size 2000 it extrapolates the fit. For a family
    without a separate fit, the reason is logged; `get_lr_with_reason` returns it.

    Raises:
        ConfigurationError: for models whose dimensions are unknown.
    """
    rate, reason = get_lr_with_reason(model_name, is_lora)
    if not reason.startswith("the published rule"):
        logger.warning("learning rate %.3g for %s: %s", rate, model_name, reason)
    return rate


def get_lr_with_reason(model_name: str, is_lora: bool = True) -> tuple[float, str]:
    """Return the rate of `get_lr` and its origin in words.

    Raises:
        ConfigurationError: for models whose dimensions are unknown.
    """
    hidden, family, kind = _hidden_and_family(model_name)
    lora = get_lora_lr_over_full_finetune_lr(model_name) if is_lora else 1.0
    rates = {
        name: BASE_LR * lora * (REFERENCE_HIDDEN_SIZE / hidden) ** exponent
        for name, exponent in FAMILY_EXPONENTS.items()
    }
    if family is not None:
        reason = f"the published rule, fitted for {family.capitalize()}, at hidden size {hidden}"
        return rates[family], reason
    lower = min(rates, key=lambda name: rates[name])
    return rates[lower], (
        f"no fit is published for {kind or 'this family'}; this is the lower of the fits for Llama "
        f"and Qwen ({lower.capitalize()}'s) at hidden size {hidden}. It is a starting point: also "
        "try half and twice the rate"
    )


def _hidden_and_family(model_name: str) -> tuple[int, str | None, str]:
    """Return the hidden size, the family whose fit applies (None if none does), and the type."""
    short = _short_name(model_name)
    if short in _DIMENSIONS:
        known = _DIMENSIONS[short]
        return known.hidden, known.family, known.family
    config = _config_of(model_name)
    kind = str(config.get("model_type", ""))
    named = kind if kind else short.lower()
    families = (family for start, family in FITTED_TYPES.items() if named.startswith(start))
    return hidden_size(model_name, config), next(families, None), kind


def get_lora_param_count(
    model_name: str,
    lora_rank: int = 32,
    train_mlp: bool = True,
    train_attn: bool = True,
    train_unembed: bool = True,
) -> int:
    """Return the number of parameters of an adapter: rank * (inputs + outputs) of every matrix.

    `model_shapes` says which matrices count, including those of every expert. A service that shares
    adapters between experts, or leaves experts out, trains fewer parameters.

    Raises:
        ConfigurationError: if nothing is trained, or the model is unknown.
    """
    if not (train_mlp or train_attn or train_unembed):
        raise ConfigurationError(
            "train_mlp, train_attn and train_unembed are all False; train at least one."
        )
    shapes = _adapter_shapes(model_name)
    return lora_rank * (
        shapes.attention * train_attn + shapes.mlp * train_mlp + shapes.unembedding * train_unembed
    )


def _adapter_shapes(model_name: str) -> AdapterShapes:
    d = _DIMENSIONS.get(_short_name(model_name))
    if d is None:
        return read_shapes(model_name, _config_of(model_name))
    q_size, kv_size = d.heads * d.head_dim, d.kv_heads * d.head_dim
    attention = (d.hidden + q_size) * 2 + (d.hidden + kv_size) * 2
    mlp = 3 * (d.hidden + d.intermediate)
    return AdapterShapes(d.layers * attention, d.layers * mlp, d.hidden + d.vocab, d.hidden)


def get_full_finetune_param_count(model_name: str) -> float:
    """Return the number of parameters of the whole model."""
    d = get_model_dimensions(model_name)
    q_size, kv_size = d.heads * d.head_dim, d.kv_heads * d.head_dim
    attention = 2 * d.hidden * q_size + 2 * d.hidden * kv_size
    attention += (q_size + 2 * kv_size) * d.qkv_bias + 2 * d.head_dim * d.qk_norm
    mlp = 3 * d.hidden * d.intermediate
    norms = 2 * d.hidden
    embeddings = d.vocab * d.hidden * (1 if d.tied else 2)
    return float(d.layers * (attention + mlp + norms) + embeddings + d.hidden)


def get_full_finetune_lr_multiplier(model_name: str) -> float:
    """Return 1 / sqrt(parameters), for comparing full fine-tuning's rates between models."""
    return 1.0 / math.sqrt(get_full_finetune_param_count(model_name))


def get_lora_lr_multiplier(model_name: str) -> float:
    """Return `get_full_finetune_lr_multiplier` times LoRA's factor."""
    full = get_full_finetune_lr_multiplier(model_name)
    return full * get_lora_lr_over_full_finetune_lr(model_name)


def _parse_config(model_name: str, config: dict) -> ModelDimensions:
    model_type = str(config.get("model_type", ""))
    families = {"llama": "llama", "mistral": "llama", "qwen2": "qwen", "qwen3": "qwen"}
    if model_type not in families:
        raise ConfigurationError(
            f"model_name={model_name} is of type {model_type!r}; the formulas cover "
            f"{', '.join(families)}. Set learning_rate yourself."
        )
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    missing = [name for name in (*needed, "vocab_size") if config.get(name) is None]
    if missing:
        raise ConfigurationError(
            f"model_name={model_name}: its config.json has no {', '.join(missing)}; take the file "
            "that came with the weights, or set learning_rate yourself."
        )
    heads = config["num_attention_heads"]
    return ModelDimensions(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        family=families[model_type],
    )
