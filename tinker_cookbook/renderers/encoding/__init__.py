"""Text to token ids and back, with typed text kept apart from control tokens."""

from tinker_cookbook.renderers.encoding.encoder import (
    TextEncoder,
    Utf8TokenDecoder,
    build_text_encoder,
)

__all__ = ["TextEncoder", "Utf8TokenDecoder", "build_text_encoder"]
