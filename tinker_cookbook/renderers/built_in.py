"""The renderers that have a name from the start. The registry imports this at its first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
from tinker_cookbook.renderers.kimi_k2 import (
    KIMI_INSTRUCT_SYSTEM,
    KimiK2Renderer,
    KimiRenderer,
)
from tinker_cookbook.renderers.kimi_k25 import KimiK25DisableThinkingRenderer, KimiK25Renderer
from tinker_cookbook.renderers.kimi_k26 import KimiK26PreserveThinkingRenderer
from tinker_cookbook.renderers.llama3 import Llama3Renderer, SystemBlock
from tinker_cookbook.renderers.mistral import MistralRenderer
from tinker_cookbook.renderers.nemotron3 import (
    Nemotron3DisableThinkingRenderer,
    Nemotron3LowThinkingRenderer,
    Nemotron3PreserveThinkingRenderer,
    Nemotron3Renderer,
    Nemotron3UltraDisableThinkingRenderer,
    Nemotron3UltraMediumThinkingRenderer,
    Nemotron3UltraPreserveThinkingRenderer,
    Nemotron3UltraRenderer,
)
from tinker_cookbook.renderers.qwen3 import (
    Qwen3DisableThinkingRenderer,
    Qwen3InstructRenderer,
    Qwen3Renderer,
    Qwen3VLInstructRenderer,
    Qwen3VLRenderer,
)
from tinker_cookbook.renderers.qwen3_5 import Qwen3_5DisableThinkingRenderer, Qwen3_5Renderer
from tinker_cookbook.renderers.qwen3_8 import Qwen3_8DisableThinkingRenderer, Qwen3_8Renderer
from tinker_cookbook.renderers.role_colon import RoleColonRenderer
from tinker_cookbook.renderers.smollm3 import SmolLM3Renderer

if TYPE_CHECKING:
    from tinker_cookbook.renderers import RendererFactory

__all__ = ["BUILT_IN"]


def _qwen3_5(**options: Any) -> RendererFactory:
    return lambda tokenizer, images: Qwen3_5Renderer(tokenizer, images, **options)


def _qwen3_6(**options: Any) -> RendererFactory:
    return _qwen3_5(python_words=False, **options)


def _qwen3_8(effort: str) -> RendererFactory:
    return lambda tokenizer, images: Qwen3_8Renderer(tokenizer, images, reasoning_effort=effort)


def _gpt_oss(effort: str) -> RendererFactory:
    return lambda tokenizer, _: GptOssRenderer(
        tokenizer, use_system_prompt=True, reasoning_effort=effort
    )


def _deepseek_v4(strip: bool = True, **options: Any) -> RendererFactory:
    return lambda tokenizer, _: DeepSeekV4Renderer(tokenizer, strip, **options)


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
    "kimi_k2": lambda tokenizer, _: KimiK2Renderer(tokenizer),
    "kimi_k25": KimiK25Renderer,
    "kimi_k25_disable_thinking": KimiK25DisableThinkingRenderer,
    "kimi_k26": KimiK25Renderer,
    "kimi_k26_disable_thinking": KimiK25DisableThinkingRenderer,
    "kimi_k26_preserve_thinking": KimiK26PreserveThinkingRenderer,
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
    "nemotron3": lambda tokenizer, _: Nemotron3Renderer(tokenizer),
    "nemotron3_disable_thinking": lambda tokenizer, _: Nemotron3DisableThinkingRenderer(tokenizer),
    "nemotron3_low_thinking": lambda tokenizer, _: Nemotron3LowThinkingRenderer(tokenizer),
    "nemotron3_preserve_thinking": lambda tokenizer, _: Nemotron3PreserveThinkingRenderer(
        tokenizer
    ),
    "nemotron3_ultra": lambda tokenizer, _: Nemotron3UltraRenderer(tokenizer),
    "nemotron3_ultra_disable_thinking": lambda tokenizer, _: Nemotron3UltraDisableThinkingRenderer(
        tokenizer
    ),
    "nemotron3_ultra_medium_thinking": lambda tokenizer, _: Nemotron3UltraMediumThinkingRenderer(
        tokenizer
    ),
    "nemotron3_ultra_preserve_thinking": (
        lambda tokenizer, _: Nemotron3UltraPreserveThinkingRenderer(tokenizer)
    ),
    "qwen2_5": lambda tokenizer, _: ChatMLRenderer(
        tokenizer, default_system=QWEN2_5_SYSTEM, tools=True
    ),
    "qwen3": lambda tokenizer, _: Qwen3Renderer(tokenizer),
    "qwen3_disable_thinking": lambda tokenizer, _: Qwen3DisableThinkingRenderer(tokenizer),
    "qwen3_instruct": lambda tokenizer, _: Qwen3InstructRenderer(tokenizer),
    "qwen3_5": Qwen3_5Renderer,
    "qwen3_5_disable_thinking": Qwen3_5DisableThinkingRenderer,
    "qwen3_5_preserve_thinking": _qwen3_5(strip_thinking_from_history=False),
    "qwen3_6": _qwen3_6(),
    "qwen3_6_disable_thinking": lambda tokenizer, images: Qwen3_5DisableThinkingRenderer(
        tokenizer, images, python_words=False
    ),
    "qwen3_6_preserve_thinking": _qwen3_6(strip_thinking_from_history=False),
    "qwen3_8_disable_thinking": Qwen3_8DisableThinkingRenderer,
    "qwen3_8_low_reasoning": _qwen3_8("low"),
    "qwen3_8_medium_reasoning": _qwen3_8("medium"),
    "qwen3_8_xhigh_reasoning": _qwen3_8("xhigh"),
    "qwen3_vl": Qwen3VLRenderer,
    "qwen3_vl_instruct": Qwen3VLInstructRenderer,
    "qwen3_thinking_2507": lambda tokenizer, _: Qwen3Renderer(tokenizer, thinking="opened"),
    "role_colon": lambda tokenizer, _: RoleColonRenderer(tokenizer),
    "smollm2": lambda tokenizer, _: ChatMLRenderer(tokenizer, default_system=SMOLLM2_SYSTEM),
    "smollm3": lambda tokenizer, _: SmolLM3Renderer(tokenizer),
    "smollm3_disable_thinking": lambda tokenizer, _: SmolLM3Renderer(
        tokenizer, disables_thinking=True
    ),
}
