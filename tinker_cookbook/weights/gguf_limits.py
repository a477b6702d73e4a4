"""Models that llama.cpp would compute in another way, without an error.

llama.cpp decides by the architecture what transformers decides by a field of config.json. Other
differences, such as additional biases, stop the conversion or the loading with an error.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinker_cookbook.exceptions import WeightsMergeError

__all__ = ["check_llama_cpp_computes"]

logger = logging.getLogger(__name__)

NORMALISES_EXPERTS = {
    "qwen3_moe": (True, False),
    "qwen2_moe": (False, False),
    "olmoe": (False, False),
}
"""Architecture -> whether llama.cpp scales the weights of the chosen experts to a sum of 1, and
the value of `norm_topk_prob` where config.json lacks it."""
ACTIVATIONS = {"silu", "swish"}
SILU_MODELS = {
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "olmo2", "olmoe"),
    *("phi3", "granite"),
}
"""Architectures that llama.cpp always computes with SiLU."""
WITHOUT_WINDOW = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe"}
"""Architectures that llama.cpp computes without a sliding window."""
ADVICE = "Use a merged model (--as merged) in transformers, vLLM or SGLang instead."


def check_llama_cpp_computes(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model whose log probabilities llama.cpp would change silently.

    What changes only long sequences, such as a sliding window, is reported as a warning.

    Args:
        folder: Folder of the base model, for the messages.
        config: Its config.json.

    Raises:
        WeightsMergeError: naming the file, the field, and its value.
    """
    model_type = str(config.get("model_type"))
    file = folder / "config.json"
    if model_type in NORMALISES_EXPERTS:
        always, default = NORMALISES_EXPERTS[model_type]
        value = bool(config.get("norm_topk_prob", default))
        if value != always:
            done = "always" if always else "never"
            raise WeightsMergeError(
                f"{file}: norm_topk_prob={str(value).lower()} cannot be exported as GGUF: for "
                f"{model_type}, llama.cpp {done} scales the weights of the chosen experts to a "
                f"sum of 1. {ADVICE}"
            )
    activation = config.get("hidden_act", "silu")
    if model_type in SILU_MODELS and activation not in ACTIVATIONS:
        raise WeightsMergeError(
            f"{file}: hidden_act={activation} cannot be exported as GGUF: for {model_type}, "
            f"llama.cpp always uses silu. {ADVICE}"
        )
    _warn_of_window(file, model_type, config)
    _warn_of_rope(file, config)


def _warn_of_window(file: Path, model_type: str, config: Mapping[str, Any]) -> None:
    window, limit = config.get("sliding_window"), config.get("max_position_embeddings")
    is_used = config.get("use_sliding_window", model_type in ("mistral", "mixtral"))
    if model_type not in WITHOUT_WINDOW or not isinstance(window, int) or not is_used:
        return
    if not isinstance(limit, int) or window < limit:
        logger.warning(
            "%s: sliding_window=%d is not applied by llama.cpp for %s; sequences of more than %d "
            "tokens will differ from the service",
            file,
            window,
            model_type,
            window,
        )


def _warn_of_rope(file: Path, config: Mapping[str, Any]) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) == "dynamic":
        logger.warning(
            "%s: rope_type=dynamic is not applied by llama.cpp; sequences of more than %s tokens "
            "will differ from the service",
            file,
            config.get("max_position_embeddings"),
        )
