"""Facts about each known model: its family, its size, and the renderers that fit it.

The first recommended renderer writes what the model's own chat template writes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.tokenizer_utils import strip_variant
from tinker_cookbook.utils.nearest_name import did_you_mean

__all__ = [
    "ModelAttributes",
    "get_deepseek_info",
    "get_glm_info",
    "get_google_info",
    "get_gpt_oss_info",
    "get_known_model_names",
    "get_llama_info",
    "get_mistral_info",
    "get_model_attributes",
    "get_moonshot_info",
    "get_nvidia_info",
    "get_qwen_info",
    "get_recommended_renderer_name",
    "get_recommended_renderer_names",
    "get_smollm_info",
    "get_zai_info",
    "warn_if_renderer_not_recommended",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelAttributes:
    """Facts about one model."""

    organization: str
    version_str: str
    size_str: str
    is_chat: bool
    """False for a base model, which was not trained on a chat format."""
    recommended_renderers: tuple[str, ...]
    """Best first."""
    is_vl: bool = False
    is_audio_in: bool = False


class UnknownModelError(ConfigurationError, KeyError):
    """The model has no entry in this module."""

    __str__ = Exception.__str__  # a KeyError would quote its message


_BASE = ("role_colon",)


def _family(
    organization: str,
    version: str,
    sizes: tuple[str, ...],
    pattern: str,
    renderers: tuple[str, ...],
    *,
    is_vl: bool = False,
) -> dict[str, ModelAttributes]:
    """Return one entry per size; `pattern` makes its name."""
    is_chat = renderers != _BASE
    return {
        pattern.format(size): ModelAttributes(
            organization, version, size, is_chat, renderers, is_vl=is_vl
        )
        for size in sizes
    }


def _variants(name: str) -> tuple[str, ...]:
    return (name, f"{name}_disable_thinking", f"{name}_preserve_thinking")


@cache
def get_llama_info() -> dict[str, ModelAttributes]:
    """Return Llama 3.0 to 3.3. From 3.1 on the template writes dates, hence `llama3_1`."""
    org = "meta-llama"
    dated = ("llama3_1", "llama3")
    return {
        **_family(org, "3", ("8B", "70B"), "Meta-Llama-3-{}", _BASE),
        **_family(org, "3", ("8B", "70B"), "Meta-Llama-3-{}-Instruct", ("llama3",)),
        **_family(org, "3.1", ("8B", "70B", "405B"), "Llama-3.1-{}", _BASE),
        **_family(org, "3.1", ("8B", "70B", "405B"), "Llama-3.1-{}-Instruct", dated),
        **_family(org, "3.2", ("1B", "3B"), "Llama-3.2-{}", _BASE),
        **_family(org, "3.2", ("1B", "3B"), "Llama-3.2-{}-Instruct", dated),
        **_family(org, "3.3", ("70B",), "Llama-3.3-{}-Instruct", dated),
    }


@cache
def get_qwen_info() -> dict[str, ModelAttributes]:
    """Return Qwen2.5 and Qwen3 with its updates, vision models and successors."""
    org = "Qwen"
    qwen2_5 = ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")
    qwen3 = ("0.6B", "1.7B", "4B", "8B", "14B", "32B", "30B-A3B", "235B-A22B")
    qwen3_base = ("0.6B", "1.7B", "4B", "8B", "14B", "30B-A3B")
    updated = ("4B", "30B-A3B", "235B-A22B")
    vision = ("2B", "4B", "8B", "32B", "30B-A3B", "235B-A22B")
    hybrid = ("qwen3", "qwen3_disable_thinking")
    hybrid3_5 = _variants("qwen3_5")
    hybrid3_6 = (*_variants("qwen3_6"), "qwen3_5", "qwen3_5_disable_thinking")
    efforts = ("xhigh_reasoning", "medium_reasoning", "low_reasoning", "disable_thinking")
    hybrid3_8 = tuple(f"qwen3_8_{effort}" for effort in efforts)
    thinking = ("qwen3_thinking_2507",)
    return {
        **_family(org, "2.5", qwen2_5, "Qwen2.5-{}", _BASE),
        **_family(org, "2.5", qwen2_5, "Qwen2.5-{}-Instruct", ("qwen2_5",)),
        **_family(org, "3", qwen3_base, "Qwen3-{}-Base", _BASE),
        **_family(org, "3", qwen3, "Qwen3-{}", hybrid),
        **_family(org, "3", updated, "Qwen3-{}-Instruct-2507", ("qwen3_instruct",)),
        **_family(org, "3", updated, "Qwen3-{}-Thinking-2507", thinking),
        **_family(org, "3", vision, "Qwen3-VL-{}-Instruct", ("qwen3_vl_instruct",), is_vl=True),
        **_family(org, "3", vision, "Qwen3-VL-{}-Thinking", ("qwen3_vl",), is_vl=True),
        **_family(org, "3.5", ("9B", "35B-A3B"), "Qwen3.5-{}-Base", _BASE, is_vl=True),
        **_family(org, "3.5", ("4B", "9B", "27B", "35B-A3B"), "Qwen3.5-{}", hybrid3_5, is_vl=True),
        **_family(org, "3.5", ("397B-A17B",), "Qwen3.5-{}", hybrid3_5, is_vl=True),
        **_family(org, "3.6", ("27B", "35B-A3B"), "Qwen3.6-{}", hybrid3_6, is_vl=True),
        **_family(org, "3.8", ("27B", "35B-A3B"), "Qwen3.8-{}", hybrid3_8, is_vl=True),
    }


@cache
def get_smollm_info() -> dict[str, ModelAttributes]:
    """Return SmolLM2, whose smallest member is the default model, and SmolLM3."""
    org, sizes = "HuggingFaceTB", ("135M", "360M", "1.7B")
    return {
        **_family(org, "2", sizes, "SmolLM2-{}", _BASE),
        **_family(org, "2", sizes, "SmolLM2-{}-Instruct", ("smollm2", "chatml")),
        **_family(org, "3", ("3B",), "SmolLM3-{}-Base", _BASE),
        **_family(org, "3", ("3B",), "SmolLM3-{}", ("smollm3", "smollm3_disable_thinking")),
    }


@cache
def get_glm_info() -> dict[str, ModelAttributes]:
    """Return GLM 4.5 to 4.7."""
    org = "zai-org"
    old = ("glm4_5", "glm4_5_disable_thinking")
    new = _variants("glm4_7")
    return {
        **_family(org, "4.5", ("355B-A32B",), "GLM-4.5-Base", _BASE),
        **_family(org, "4.5", ("355B-A32B",), "GLM-4.5", old),
        **_family(org, "4.5", ("106B-A12B",), "GLM-4.5-Air-Base", _BASE),
        **_family(org, "4.5", ("106B-A12B",), "GLM-4.5-Air", old),
        **_family(org, "4.6", ("355B-A32B",), "GLM-4.6", old),
        **_family(org, "4.7", ("355B-A32B",), "GLM-4.7", new),
        **_family(org, "4.7", ("30B-A3B",), "GLM-4.7-Flash", new),
    }


get_zai_info = get_glm_info
"""The name that programs for the Tinker cookbook use."""


@cache
def get_google_info() -> dict[str, ModelAttributes]:
    """Return Gemma 3 and 4, text only."""
    org, sizes = "google", ("270m", "1b", "4b", "12b", "27b")
    later = ("E2B", "E4B", "12B", "26B-A4B", "31B")
    renderers = ("gemma4", "gemma4_thinking", "gemma4_preserve_thinking")
    return {
        **_family(org, "3", sizes, "gemma-3-{}-pt", _BASE),
        **_family(org, "3", sizes, "gemma-3-{}-it", ("gemma3",)),
        **_family(org, "4", later, "gemma-4-{}", _BASE),
        **_family(org, "4", later, "gemma-4-{}-it", renderers),
    }


@cache
def get_deepseek_info() -> dict[str, ModelAttributes]:
    """Return DeepSeek V3, R1 and V3.1, all of one size, and V4."""
    org, size = "deepseek-ai", ("671B-A37B",)
    flash, pro = ("284B-A13B",), ("1.6T-A49B",)
    suffixes = ("", "_thinking", "_high_reasoning", "_max_reasoning", "_preserve_thinking")
    v4 = tuple(f"deepseekv4{suffix}" for suffix in suffixes)
    return {
        **_family(org, "3", size, "DeepSeek-V3", ("deepseekv3_chat",)),
        **_family(org, "3", size, "DeepSeek-V3-0324", ("deepseekv3_chat",)),
        **_family(org, "R1", size, "DeepSeek-R1", ("deepseek_r1",)),
        **_family(org, "R1", size, "DeepSeek-R1-0528", ("deepseek_r1_0528",)),
        **_family(org, "3.1", ("671B-A37B",), "DeepSeek-V3.1-Base", _BASE),
        **_family(
            org, "3.1", ("671B-A37B",), "DeepSeek-V3.1", ("deepseekv3", "deepseekv3_thinking")
        ),
        **_family(org, "4", flash, "DeepSeek-V4-Flash-Base", _BASE),
        **_family(org, "4", flash, "DeepSeek-V4-Flash", v4),
        **_family(org, "4", pro, "DeepSeek-V4-Pro-Base", _BASE),
        **_family(org, "4", pro, "DeepSeek-V4-Pro", v4),
    }


@cache
def get_gpt_oss_info() -> dict[str, ModelAttributes]:
    """Return gpt-oss."""
    renderers = (
        "gpt_oss_medium_reasoning",
        "gpt_oss_low_reasoning",
        "gpt_oss_high_reasoning",
        "gpt_oss_no_sysprompt",
    )
    return _family("openai", "1", ("20b", "120b"), "gpt-oss-{}", renderers)


@cache
def get_mistral_info() -> dict[str, ModelAttributes]:
    """Return Mistral Nemo and Mistral Small 3.2."""
    org = "mistralai"
    small = ("mistral_small",)
    return {
        **_family(org, "Nemo", ("12B",), "Mistral-Nemo-Base-2407", _BASE),
        **_family(org, "Nemo", ("12B",), "Mistral-Nemo-Instruct-2407", ("mistral_nemo",)),
        **_family(org, "3.2", ("24B",), "Mistral-Small-3.2-{}-Instruct-2506", small, is_vl=True),
    }


@cache
def get_moonshot_info() -> dict[str, ModelAttributes]:
    """Return Kimi K2 and its successors."""
    org, size = "moonshotai", ("1T-A32B",)
    k26 = ("kimi_k26", "kimi_k26_disable_thinking", "kimi_k26_preserve_thinking")
    return {
        **_family(org, "K2", size, "Kimi-K2-Instruct", ("kimi_k2_instruct",)),
        **_family(org, "K2", size, "Kimi-K2-Thinking", ("kimi_k2",)),
        **_family(
            org, "K2.5", size, "Kimi-K2.5", ("kimi_k25", "kimi_k25_disable_thinking"), is_vl=True
        ),
        **_family(org, "K2.6", size, "Kimi-K2.6", k26, is_vl=True),
    }


@cache
def get_nvidia_info() -> dict[str, ModelAttributes]:
    """Return Nemotron 3 and 3.5 Lightning, whose format is that of 3 Nano."""
    org = "nvidia"
    nano = _variants("nemotron3")
    ultra = (*_variants("nemotron3_ultra"), "nemotron3_ultra_medium_thinking")
    return {
        **_family(org, "3", ("30B-A3B",), "NVIDIA-Nemotron-3-Nano-{}-BF16", nano),
        **_family(
            org,
            "3",
            ("120B-A12B",),
            "NVIDIA-Nemotron-3-Super-{}-BF16",
            (*nano, "nemotron3_low_thinking"),
        ),
        **_family(org, "3", ("550B-A55B",), "NVIDIA-Nemotron-3-Ultra-{}-BF16", ultra),
        **_family(org, "3.5", ("30B-A3B",), "NVIDIA-Nemotron-3.5-Lightning-{}-BF16", nano),
    }


_ORGANIZATIONS: dict[str, Callable[[], dict[str, ModelAttributes]]] = {
    "HuggingFaceTB": get_smollm_info,
    "Qwen": get_qwen_info,
    "deepseek-ai": get_deepseek_info,
    "google": get_google_info,
    "meta-llama": get_llama_info,
    "mistralai": get_mistral_info,
    "moonshotai": get_moonshot_info,
    "nvidia": get_nvidia_info,
    "openai": get_gpt_oss_info,
    "zai-org": get_glm_info,
}


def get_known_model_names() -> list[str]:
    """Return every model with an entry here, as `organization/model`."""
    return [f"{org}/{name}" for org, get_info in _ORGANIZATIONS.items() for name in get_info()]


def get_model_attributes(model_name: str) -> ModelAttributes:
    """Return the facts about a model.

    Args:
        model_name: `organization/model`, with or without a `:variant` suffix.

    Raises:
        ConfigurationError: if the model is unknown (also a KeyError), with the nearest known name.
    """
    name = strip_variant(model_name)
    organization, _, model = name.partition("/")
    get_info = _ORGANIZATIONS.get(organization)
    attributes = get_info().get(model) if get_info is not None else None
    if attributes is None:
        raise _unknown_model_error(model_name, name)
    return attributes


def get_recommended_renderer_names(model_name: str) -> list[str]:
    """Return the renderers that fit a model, best first.

    An unknown model in a local folder with a chat template gets `hf_template`, with a warning.
    """
    try:
        return list(get_model_attributes(model_name).recommended_renderers)
    except UnknownModelError:
        if not _has_chat_template(Path(model_name)):
            raise
    logger.warning(
        "%s is not a known model, so it is rendered by its own chat template (renderer "
        "hf_template). 'tinker-cookbook render --verify %s' says whether one of the other "
        "renderers fits; select it with renderer_name=... or --renderer.",
        model_name,
        model_name,
    )
    return ["hf_template"]


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(json.loads(config.read_text("utf-8")).get("chat_template"))


def get_recommended_renderer_name(model_name: str) -> str:
    """Return the renderer that gives the same text as the model's own chat template."""
    return get_recommended_renderer_names(model_name)[0]


def warn_if_renderer_not_recommended(model_name: str, renderer_name: str | None) -> None:
    """Log a warning if the renderer is not recommended for the model; skip unknown models."""
    if renderer_name is None:
        return
    try:
        names = get_recommended_renderer_names(model_name)
    except ConfigurationError:
        return
    if renderer_name not in names:
        logger.warning(
            "renderer %r is not recommended for %s; recommended: %s",
            renderer_name,
            model_name,
            ", ".join(names),
        )


def _unknown_model_error(model_name: str, name: str) -> UnknownModelError:
    if Path(model_name).is_dir() and not _has_chat_template(Path(model_name)):
        return UnknownModelError(
            f"model_name={model_name!r} is a folder without a chat template, so its chat format is "
            "unknown; say which renderer to use (renderer_name=..., --renderer): role_colon is for "
            "base models."
        )
    if model_name.startswith(("/", "./", "../", "~")):
        return UnknownModelError(
            f"model_name={model_name!r} is not a folder; give an existing one, or a model's name."
        )
    organizations = ", ".join(sorted(_ORGANIZATIONS))
    return UnknownModelError(
        f"model_name={model_name!r} is not a known model; known are models of {organizations}."
        f"{did_you_mean(name, get_known_model_names())} For any other model or a local folder, say "
        "which renderer to use (renderer_name=..., --renderer): hf_template uses any model's own "
        "chat template, role_colon is for base models; 'tinker-cookbook render --verify MODEL' "
        "finds what fits."
    )
