"""The renderers that have a name from the start. The registry imports this at its first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from tinker_cookbook.renderers.chatml import QWEN2_5_SYSTEM, SMOLLM2_SYSTEM, ChatMLRenderer
from tinker_cookbook.renderers.deepseek_v3 import (
    DeepSeekR1Renderer,
    DeepSeekV3ChatRenderer,
    DeepSeekV3DisableThinkingRenderer,
    DeepSeekV3ThinkingRenderer,
)
from tinker_cookbook.renderers.deepseek_v4 import DeepSeekV4Renderer
from tinker_cookbook.renderers.gemma3 import Gemma3Renderer
from tinker_cookbook.renderers.gemma4 import Gemma4Renderer
from tinker_cookbook.renderers.glm import GlmRenderer
from tinker_cookbook.renderers.gpt_oss import GptOssRenderer
from tinker_cookbook.renderers.hf_template import HFTemplateRenderer
from tinker_cookbook.renderers.kimi_k2 import KIMI_INSTRUCT_SYSTEM, KIMI_SYSTEM, KimiRenderer
from tinker_cookbook.renderers.llama3 import Llama3Renderer, SystemBlock
from tinker_cookbook.renderers.mistral import MistralRenderer
from tinker_cookbook.renderers.nemotron3 import Nemotron3Renderer
from tinker_cookbook.renderers.qwen3 import Qwen3Renderer
from tinker_cookbook.renderers.qwen3_5 import Qwen3_5Renderer
from tinker_cookbook.renderers.role_colon import RoleColonRenderer
from tinker_cookbook.renderers.smollm3 import SmolLM3Renderer

if TYPE_CHECKING:
    from tinker_cookbook.renderers import RendererFactory

__all__ = ["BUILT_IN"]


def _qwen3_5(**options: Any) -> RendererFactory:
    return lambda tokenizer, images: Qwen3_5Renderer(tokenizer, images, **options)


def _qwen3_8(effort: str, **options: Any) -> RendererFactory:
    return _qwen3_5(strip_thinking_from_history=False, reasoning_effort=effort, **options)


def _gpt_oss(effort: str) -> RendererFactory:
    return lambda tokenizer, _: GptOssRenderer(
        tokenizer, use_system_prompt=True, reasoning_effort=effort
    )


def _kimi_k25(thinking: Literal["opened", "disabled"], *, strip: bool = True) -> RendererFactory:
    return lambda tokenizer, images: KimiRenderer(
        tokenizer, strip, thinking=thinking, typescript=True, image_processor=images
    )


def _deepseek_v4(strip: bool = True, **options: Any) -> RendererFactory:
    return lambda tokenizer, _: DeepSeekV4Renderer(tokenizer, strip, **options)


def _nemotron3(strip: bool = True, **options: Any) -> RendererFactory:
    return lambda tokenizer, _: Nemotron3Renderer(tokenizer, strip, **options)


BUILT_IN: dict[str, RendererFactory] = {
    "chatml": lambda tokenizer, _: ChatMLRenderer(tokenizer),
    "deepseek_r1": lambda tokenizer, _: DeepSeekR1Renderer(tokenizer),
    "deepseek_r1_0528": lambda tokenizer, _: DeepSeekR1Renderer(tokenizer, opens_thinking=False),
    "deepseekv3": lambda tokenizer, _: DeepSeekV3DisableThinkingRenderer(tokenizer),
    "deepseekv3_chat": lambda tokenizer, _: DeepSeekV3ChatRenderer(tokenizer),
    "deepseekv3_disable_thinking": lambda tokenizer, _: DeepSeekV3DisableThinkingRenderer(
        tokenizer
    ),
    "deepseekv3_thinking": lambda tokenizer, _: DeepSeekV3ThinkingRenderer(tokenizer),
    "deepseekv4": _deepseek_v4(thinking="disabled"),
    "deepseekv4_disable_thinking": _deepseek_v4(thinking="disabled"),
    "deepseekv4_high_reasoning": _deepseek_v4(effort="high"),
    "deepseekv4_max_reasoning": _deepseek_v4(effort="max"),
    "deepseekv4_preserve_thinking": _deepseek_v4(strip=False),
    "deepseekv4_thinking": _deepseek_v4(),
    "gpt_oss_high_reasoning": _gpt_oss("high"),
    "gpt_oss_low_reasoning": _gpt_oss("low"),
    "gpt_oss_medium_reasoning": _gpt_oss("medium"),
    "gpt_oss_no_sysprompt": lambda tokenizer, _: GptOssRenderer(tokenizer),
    "kimi_k2": lambda tokenizer, _: KimiRenderer(tokenizer, default_system=KIMI_SYSTEM),
    "kimi_k25": _kimi_k25("opened"),
    "kimi_k25_disable_thinking": _kimi_k25("disabled"),
    "kimi_k26": _kimi_k25("opened"),
    "kimi_k26_disable_thinking": _kimi_k25("disabled"),
    "kimi_k26_preserve_thinking": _kimi_k25("opened", strip=False),
    "kimi_k2_instruct": lambda tokenizer, _: KimiRenderer(
        tokenizer, thinking="none", default_system=KIMI_INSTRUCT_SYSTEM
    ),
    "hf_template": lambda tokenizer, _: HFTemplateRenderer(tokenizer),
    "gemma3": lambda tokenizer, _: Gemma3Renderer(tokenizer),
    "gemma4": lambda tokenizer, _: Gemma4Renderer(tokenizer),
    "gemma4_preserve_thinking": lambda tokenizer, _: Gemma4Renderer(
        tokenizer, thinking="enabled", preserves_calls=True
    ),
    "gemma4_thinking": lambda tokenizer, _: Gemma4Renderer(tokenizer, thinking="enabled"),
    "glm4_5": lambda tokenizer, _: GlmRenderer(tokenizer),
    "glm4_5_disable_thinking": lambda tokenizer, _: GlmRenderer(tokenizer, thinking="disabled"),
    "glm4_7": lambda tokenizer, _: GlmRenderer(tokenizer, opens_think=True),
    "glm4_7_disable_thinking": lambda tokenizer, _: GlmRenderer(
        tokenizer, thinking="disabled", opens_think=True
    ),
    "glm4_7_preserve_thinking": lambda tokenizer, _: GlmRenderer(
        tokenizer, strip_thinking_from_history=False, opens_think=True
    ),
    "llama3": lambda tokenizer, _: Llama3Renderer(tokenizer),
    "llama3_1": lambda tokenizer, _: Llama3Renderer(tokenizer, system_block=SystemBlock()),
    "mistral_nemo": lambda tokenizer, _: MistralRenderer(tokenizer),
    "mistral_small": lambda tokenizer, _: MistralRenderer(tokenizer, is_small=True),
    "nemotron3": _nemotron3(),
    "nemotron3_disable_thinking": _nemotron3(thinking="disabled"),
    "nemotron3_low_thinking": _nemotron3(effort="low"),
    "nemotron3_preserve_thinking": _nemotron3(strip=False),
    "nemotron3_ultra": _nemotron3(is_ultra=True),
    "nemotron3_ultra_disable_thinking": _nemotron3(is_ultra=True, thinking="disabled"),
    "nemotron3_ultra_medium_thinking": _nemotron3(is_ultra=True, effort="efficient"),
    "nemotron3_ultra_preserve_thinking": _nemotron3(strip=False, is_ultra=True),
    "qwen2_5": lambda tokenizer, _: ChatMLRenderer(
        tokenizer, default_system=QWEN2_5_SYSTEM, tools=True
    ),
    "qwen3": lambda tokenizer, _: Qwen3Renderer(tokenizer),
    "qwen3_disable_thinking": lambda tokenizer, _: Qwen3Renderer(tokenizer, thinking="disabled"),
    "qwen3_instruct": lambda tokenizer, _: ChatMLRenderer(tokenizer, tools=True),
    "qwen3_5": _qwen3_5(python_words=True),
    "qwen3_5_disable_thinking": _qwen3_5(python_words=True, thinking="disabled"),
    "qwen3_5_preserve_thinking": _qwen3_5(python_words=True, strip_thinking_from_history=False),
    "qwen3_6": _qwen3_5(),
    "qwen3_6_disable_thinking": _qwen3_5(thinking="disabled"),
    "qwen3_6_preserve_thinking": _qwen3_5(strip_thinking_from_history=False),
    "qwen3_8_disable_thinking": _qwen3_8("xhigh", thinking="disabled"),
    "qwen3_8_low_reasoning": _qwen3_8("low"),
    "qwen3_8_medium_reasoning": _qwen3_8("medium"),
    "qwen3_8_xhigh_reasoning": _qwen3_8("xhigh"),
    "qwen3_vl": lambda tokenizer, images: Qwen3Renderer(
        tokenizer, thinking="opened", image_processor=images
    ),
    "qwen3_vl_instruct": lambda tokenizer, images: ChatMLRenderer(
        tokenizer, tools=True, image_processor=images
    ),
    "qwen3_thinking_2507": lambda tokenizer, _: Qwen3Renderer(tokenizer, thinking="opened"),
    "role_colon": lambda tokenizer, _: RoleColonRenderer(tokenizer),
    "smollm2": lambda tokenizer, _: ChatMLRenderer(tokenizer, default_system=SMOLLM2_SYSTEM),
    "smollm3": lambda tokenizer, _: SmolLM3Renderer(tokenizer),
    "smollm3_disable_thinking": lambda tokenizer, _: SmolLM3Renderer(
        tokenizer, disables_thinking=True
    ),
}
