"""Kimi K2.6: the format of K2.5; one variant keeps old reasoning."""

from __future__ import annotations

from tinker_cookbook.renderers.base import NamedRenderer
from tinker_cookbook.renderers.images import ImageProcessorProtocol
from tinker_cookbook.renderers.kimi_k25 import KimiK25DisableThinkingRenderer, KimiK25Renderer
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["RENDERERS", "KimiK26PreserveThinkingRenderer"]


class KimiK26PreserveThinkingRenderer(KimiK25Renderer):
    """`kimi_k26_preserve_thinking`."""

    def __init__(
        self, tokenizer: Tokenizer, image_processor: ImageProcessorProtocol | None = None
    ) -> None:
        super().__init__(tokenizer, image_processor, strip_thinking_from_history=False)


RENDERERS = [
    NamedRenderer(
        "kimi_k26",
        KimiK25Renderer,
        "Kimi K2.6",
        "same as `kimi_k25`",
    ),
    NamedRenderer(
        "kimi_k26_disable_thinking",
        KimiK25DisableThinkingRenderer,
        "Kimi K2.6",
        "same as `kimi_k25_disable_thinking`",
    ),
    NamedRenderer(
        "kimi_k26_preserve_thinking",
        KimiK26PreserveThinkingRenderer,
        "Kimi K2.6",
        "old reasoning is kept; tools; images",
    ),
]
