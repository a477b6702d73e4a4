"""Facts about models, and names that are unknown."""

from __future__ import annotations

import logging

import pytest

from tinker_cookbook import model_info
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.model_files import DEFAULT_MODEL
from tinker_cookbook.renderers import get_renderer_names


@pytest.mark.parametrize(
    ("model", "renderer"),
    [
        (DEFAULT_MODEL, "smollm2"),
        ("HuggingFaceTB/SmolLM2-135M", "role_colon"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3_1"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3_1"),
        ("meta-llama/Llama-3.1-8B", "role_colon"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2_5"),
        ("Qwen/Qwen3-8B", "qwen3"),
        ("Qwen/Qwen3-8B-Base", "role_colon"),
        ("Qwen/Qwen3-8B:beta", "qwen3"),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3_instruct"),
        ("Qwen/Qwen3-4B-Thinking-2507", "qwen3_thinking_2507"),
        ("Qwen/Qwen3-VL-8B-Instruct", "qwen3_vl_instruct"),
        ("Qwen/Qwen3-VL-8B-Thinking", "qwen3_vl"),
        ("Qwen/Qwen3.5-9B", "qwen3_5"),
        ("Qwen/Qwen3.6-27B", "qwen3_6"),
        ("Qwen/Qwen3.8-27B", "qwen3_8_xhigh_reasoning"),
        ("zai-org/GLM-4.6", "glm4_5"),
        ("zai-org/GLM-4.7-Flash", "glm4_7"),
        ("google/gemma-3-4b-it", "gemma3"),
        ("google/gemma-4-31B", "role_colon"),
        ("google/gemma-4-26B-A4B-it", "gemma4"),
        ("HuggingFaceTB/SmolLM3-3B", "smollm3"),
        ("deepseek-ai/DeepSeek-V4-Flash", "deepseekv4"),
        ("deepseek-ai/DeepSeek-V4-Pro", "deepseekv4"),
        ("deepseek-ai/DeepSeek-V4-Pro-Base", "role_colon"),
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "nemotron3"),
        ("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16", "nemotron3"),
        ("nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16", "nemotron3_ultra"),
        ("nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16", "nemotron3"),
        ("mistralai/Mistral-Nemo-Instruct-2407", "mistral_nemo"),
        ("mistralai/Mistral-Small-3.2-24B-Instruct-2506", "mistral_small"),
    ],
)
def test_recommended_renderers(model: str, renderer: str) -> None:
    assert model_info.get_recommended_renderer_name(model) == renderer
    assert model_info.get_recommended_renderer_names(model)[0] == renderer


@pytest.mark.parametrize(
    "get_info",
    [
        model_info.get_deepseek_info,
        model_info.get_glm_info,
        model_info.get_google_info,
        model_info.get_llama_info,
        model_info.get_mistral_info,
        model_info.get_nvidia_info,
        model_info.get_qwen_info,
        model_info.get_smollm_info,
    ],
)
def test_every_model_of_these_families_has_its_renderers(get_info) -> None:
    for attributes in get_info().values():
        assert set(attributes.recommended_renderers) <= set(get_renderer_names())


def test_attributes() -> None:
    attributes = model_info.get_model_attributes("Qwen/Qwen3-30B-A3B")
    assert (attributes.organization, attributes.version_str) == ("Qwen", "3")
    assert (attributes.size_str, attributes.is_chat) == ("30B-A3B", True)
    assert not attributes.is_vl
    assert not model_info.get_model_attributes("Qwen/Qwen3-8B-Base").is_chat
    assert model_info.get_model_attributes("Qwen/Qwen3.5-9B").is_vl
    assert len(set(model_info.get_known_model_names())) > 60


def test_unknown_names_say_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'Qwen/Qwen3-8B'"):
        model_info.get_model_attributes("qwen/qwen3-8b")
    with pytest.raises(KeyError) as raised:  # what upstream raises for an unknown version
        model_info.get_model_attributes("Qwen/Qwen9-8B")
    assert str(raised.value).startswith("model_name='Qwen/Qwen9-8B' is not a known model")
    for name in ("", "gpt2", "nobody/nothing"):
        with pytest.raises(ValueError, match="renderer_name"):
            model_info.get_recommended_renderer_name(name)
    with pytest.raises(ValueError, match=r"'\./my-model' is not a folder"):
        model_info.get_recommended_renderer_name("./my-model")


def test_warning_for_an_unfit_renderer(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model_info.warn_if_renderer_not_recommended("Qwen/Qwen3-8B", "qwen3")
        model_info.warn_if_renderer_not_recommended("Qwen/Qwen3-8B", None)
        model_info.warn_if_renderer_not_recommended("./my-model", "llama3")
        assert not caplog.records
        model_info.warn_if_renderer_not_recommended("Qwen/Qwen3-8B", "llama3")
    assert "'llama3' is not recommended for Qwen/Qwen3-8B; recommended: qwen3" in caplog.text
