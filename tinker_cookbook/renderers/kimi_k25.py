"""Kimi K2.5: K2's format with an opened think block, tools in TypeScript, and images.

kimi_k2.py describes the format and its differences from the template.
"""

from __future__ import annotations

from typing import Literal

from tinker_cookbook.renderers.base import NamedRenderer
from tinker_cookbook.renderers.images import ImageProcessorProtocol
from tinker_cookbook.renderers.kimi_k2 import KimiK2Renderer, KimiRenderer
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["RENDERERS", "KimiK25DisableThinkingRenderer", "KimiK25Renderer"]


class KimiK25Renderer(KimiK2Renderer):
    """`kimi_k25`, and `kimi_k26`, which has the same format."""

    _thinking: Literal["opened", "disabled"] = "opened"

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_processor: ImageProcessorProtocol | None = None,
        strip_thinking_from_history: bool = True,
    ) -> None:
        # Skip K2's constructor: K2.5 does not have its default system message.
        KimiRenderer.__init__(
            self,
            tokenizer,
            strip_thinking_from_history,
            thinking=self._thinking,
            typescript=True,
            image_processor=image_processor,
        )


class KimiK25DisableThinkingRenderer(KimiK25Renderer):
    """`kimi_k25_disable_thinking`, and `kimi_k26_disable_thinking`."""

    _thinking = "disabled"


RENDERERS = [
    NamedRenderer(
        "kimi_k25",
        KimiK25Renderer,
        "Kimi K2.5",
        "the prompt opens the think block; tools; images",
    ),
    NamedRenderer(
        "kimi_k25_disable_thinking",
        KimiK25DisableThinkingRenderer,
        "Kimi K2.5",
        "the prompt closes the think block; tools; images",
    ),
]
