"""The renderers of this package by name: a new module of formats is added to `FORMATS`.

Importing this module imports all formats, so registry.py does so when a name is first needed.
"""

from __future__ import annotations

from tinker_cookbook.renderers import (
    chatml,
    deepseek_v3,
    deepseek_v4,
    gemma3,
    gemma4,
    glm,
    gpt_oss,
    kimi_k2,
    kimi_k25,
    kimi_k26,
    llama3,
    mistral,
    nemotron3,
    qwen3,
    qwen3_5,
    qwen3_8,
    role_colon,
    smollm3,
)
from tinker_cookbook.renderers.base import NamedRenderer
from tinker_cookbook.renderers.hf_template import renderer as hf_template

__all__ = ["BUILT_IN", "FORMATS"]

# In the order of the table in docs/renderers.md.
FORMATS = (
    chatml,
    qwen3,
    qwen3_5,
    qwen3_8,
    glm,
    mistral,
    gemma3,
    gemma4,
    smollm3,
    llama3,
    deepseek_v3,
    deepseek_v4,
    gpt_oss,
    kimi_k2,
    kimi_k25,
    kimi_k26,
    nemotron3,
    hf_template,
    role_colon,
)
BUILT_IN: dict[str, NamedRenderer] = {
    renderer.name: renderer for module in FORMATS for renderer in module.RENDERERS
}
