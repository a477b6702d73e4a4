"""The formats under test."""

from __future__ import annotations

from typing import Any

from .dsml_families import DSML_FAMILIES, DSML_VARIANTS
from .family import Family
from .gemma_families import GEMMA_FAMILIES, GEMMA_VARIANTS
from .glm_families import GLM_FAMILIES
from .marker_families import MARKER_FAMILIES, MARKER_VARIANTS
from .other_families import OTHER_FAMILIES
from .xml_families import XML_FAMILIES

# The template most ChatML models carry: no default system message, any role.
PLAIN_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DATE = "26 Jul 2024"

_TOOLS: dict[str, Any] = {"has_tools": True}
_THINKING: dict[str, Any] = {
    "has_tools": True,
    "has_thinking": True,
    "accepts_thinking": True,
    "text_arguments": True,
}
_NO_THINKING = {"enable_thinking": False}

FAMILIES = {
    family.name: family
    for family in (
        Family("chatml", "chatml", "smollm2", {"chat_template": PLAIN_CHATML}),
        Family("smollm2", "smollm2", "smollm2"),
        Family("qwen2_5", "qwen2_5", "qwen2_5", **_TOOLS),
        Family("qwen3", "qwen3", "qwen3", **_THINKING),
        Family(
            "qwen3_disable_thinking",
            "qwen3_disable_thinking",
            "qwen3",
            _NO_THINKING,
            has_tools=True,
            accepts_thinking=True,
            text_arguments=True,
        ),
        Family(
            "qwen3_instruct",
            "qwen3_instruct",
            "qwen3_instruct_2507",
            has_tools=True,
            text_arguments=True,
        ),
        Family("qwen3_thinking_2507", "qwen3_thinking_2507", "qwen3_thinking_2507", **_THINKING),
        Family("llama3", "llama3", "llama3", trims=True),
        Family("llama3_1", "llama3_1", "llama3_1", has_tools=True, trims=True),
        Family(
            "llama3_2", "llama3_1", "llama3_2", {"date_string": DATE}, has_tools=True, trims=True
        ),
        *XML_FAMILIES,
        *GLM_FAMILIES,
        *GEMMA_FAMILIES,
        *OTHER_FAMILIES,
        *MARKER_FAMILIES,
        *DSML_FAMILIES,
    )
}
VARIANTS = {family.name: family for family in (*MARKER_VARIANTS, *GEMMA_VARIANTS, *DSML_VARIANTS)}
"""Formats so near to one of FAMILIES that equality with their template is test enough."""
