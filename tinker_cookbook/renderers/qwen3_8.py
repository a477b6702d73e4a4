"""Qwen3.8: Qwen3.5's format with an effort in the system message; old reasoning is kept.

qwen3_5.py describes the format and its differences from the template.
"""

from __future__ import annotations

from tinker_cookbook.renderers.base import NamedRenderer
from tinker_cookbook.renderers.images import ImageProcessorProtocol
from tinker_cookbook.renderers.qwen3_5 import REASONING_EFFORT_INSTRUCTIONS, Qwen3_5Renderer
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = [
    "REASONING_EFFORT_INSTRUCTIONS",
    "RENDERERS",
    "Qwen3_8DisableThinkingRenderer",
    "Qwen3_8Renderer",
]


class Qwen3_8Renderer(Qwen3_5Renderer):
    """`qwen3_8_xhigh_reasoning`, `_medium_` and `_low_`, by `reasoning_effort`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_processor: ImageProcessorProtocol | None = None,
        strip_thinking_from_history: bool = False,
        *,
        reasoning_effort: str = "xhigh",
    ) -> None:
        super().__init__(
            tokenizer,
            image_processor,
            strip_thinking_from_history=strip_thinking_from_history,
            reasoning_effort=reasoning_effort,
            python_words=False,
        )


class Qwen3_8DisableThinkingRenderer(Qwen3_8Renderer):
    """`qwen3_8_disable_thinking`."""

    def __init__(
        self, tokenizer: Tokenizer, image_processor: ImageProcessorProtocol | None = None
    ) -> None:
        Qwen3_5Renderer.__init__(
            self,
            tokenizer,
            image_processor,
            thinking="disabled",
            strip_thinking_from_history=False,
            reasoning_effort="xhigh",
            python_words=False,
        )


RENDERERS = [
    NamedRenderer(
        "qwen3_8_xhigh_reasoning",
        lambda tokenizer, images: Qwen3_8Renderer(tokenizer, images, reasoning_effort="xhigh"),
        "Qwen3.8",
        "effort `xhigh` in the system message; old reasoning is kept",
    ),
    NamedRenderer(
        "qwen3_8_medium_reasoning",
        lambda tokenizer, images: Qwen3_8Renderer(tokenizer, images, reasoning_effort="medium"),
        "Qwen3.8",
        "effort `medium` in the system message; old reasoning is kept",
    ),
    NamedRenderer(
        "qwen3_8_low_reasoning",
        lambda tokenizer, images: Qwen3_8Renderer(tokenizer, images, reasoning_effort="low"),
        "Qwen3.8",
        "effort `low` in the system message; old reasoning is kept",
    ),
    NamedRenderer(
        "qwen3_8_disable_thinking",
        Qwen3_8DisableThinkingRenderer,
        "Qwen3.8",
        "the prompt holds an empty think block",
    ),
]
