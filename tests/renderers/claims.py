"""Families whose renderer claims the extension property, as test_extension.py checks."""

from __future__ import annotations

from .families import FAMILIES

# Written out, so that collecting these tests does not load every tokenizer.
_CLAIMS = """
    chatml llama3 llama3_1 llama3_2 qwen2_5 qwen3_instruct smollm2 smollm3 smollm3_disable_thinking
    qwen3_6_preserve_thinking qwen3_vl_instruct qwen3_8_disable_thinking
    qwen3_8_low_reasoning qwen3_8_medium_reasoning qwen3_8_xhigh_reasoning
    glm4_5_disable_thinking glm4_7_disable_thinking glm4_7_preserve_thinking gemma3 gemma4
    deepseekv3 deepseekv3_chat deepseekv4
    kimi_k2_instruct kimi_k25_disable_thinking kimi_k26_preserve_thinking
    nemotron3_disable_thinking nemotron3_preserve_thinking
""".split()
EXTENDING = [name for name in _CLAIMS if name in FAMILIES]
