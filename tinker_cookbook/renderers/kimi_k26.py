"""Kimi K2.6: written as K2.5; one variant keeps old reasoning."""

from __future__ import annotations

from tinker_cookbook.renderers.images import ImageProcessorProtocol
from tinker_cookbook.renderers.kimi_k25 import KimiK25Renderer
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["KimiK26PreserveThinkingRenderer"]


class KimiK26PreserveThinkingRenderer(KimiK25Renderer):
    """`kimi_k26_preserve_thinking`."""

    def __init__(
        self, tokenizer: Tokenizer, image_processor: ImageProcessorProtocol | None = None
    ) -> None:
        super().__init__(tokenizer, image_processor, strip_thinking_from_history=False)
