"""Renderers: messages to tokens and weights, and sampled tokens back to messages.

renderer = get_renderer("qwen3", get_tokenizer("Qwen/Qwen3-8B"))
model_input, weights = renderer.build_supervised_example(messages)
prompt = renderer.build_generation_prompt(messages)
message, termination = renderer.parse_response(tokens)
"""

from __future__ import annotations

from tinker_cookbook.renderers.base import Renderer
from tinker_cookbook.renderers.content import (
    classify_parse_failure,
    ensure_text,
    format_content_as_string,
    get_text_content,
    parse_content_blocks,
)
from tinker_cookbook.renderers.encoding.encoder import Utf8TokenDecoder
from tinker_cookbook.renderers.registry import (
    check_renderer_name,
    find_image_renderer_names,
    get_registered_renderer_names,
    get_renderer,
    get_renderer_names,
    is_renderer_registered,
    load_renderer,
    register_renderer,
    unregister_renderer,
)
from tinker_cookbook.renderers.types import (
    AudioPart,
    ContentPart,
    ImagePart,
    Message,
    MessageDelta,
    ParseFailureKind,
    ParseTermination,
    RenderContext,
    Role,
    StreamingMessageHeader,
    StreamingTextDelta,
    StreamingThinkingDelta,
    TextPart,
    ThinkingPart,
    ToolCall,
    ToolSpec,
    TrainOnWhat,
    UnparsedToolCall,
)

__all__ = [
    "AudioPart",
    "ContentPart",
    "ImagePart",
    "Message",
    "MessageDelta",
    "ParseFailureKind",
    "ParseTermination",
    "RenderContext",
    "Renderer",
    "Role",
    "StreamingMessageHeader",
    "StreamingTextDelta",
    "StreamingThinkingDelta",
    "TextPart",
    "ThinkingPart",
    "ToolCall",
    "ToolSpec",
    "TrainOnWhat",
    "UnparsedToolCall",
    "Utf8TokenDecoder",
    "check_renderer_name",
    "classify_parse_failure",
    "ensure_text",
    "find_image_renderer_names",
    "format_content_as_string",
    "get_registered_renderer_names",
    "get_renderer",
    "get_renderer_names",
    "get_text_content",
    "is_renderer_registered",
    "load_renderer",
    "parse_content_blocks",
    "register_renderer",
    "unregister_renderer",
]
