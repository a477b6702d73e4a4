"""Custom renderers: single messages (`render_message`), and media between text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tinker

from tests.assets import load_tokenizer
from tinker_cookbook.renderers import (
    Message,
    ParseTermination,
    RenderContext,
    Renderer,
    TrainOnWhat,
    get_text_content,
)
from tinker_cookbook.renderers.base import RenderedMessage
from tinker_cookbook.renderers.layout import Layout, SegmentKind
from tinker_cookbook.renderers.picture import terminal_text, token_views

TALK: list[Message] = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]


class BracketRenderer(Renderer):
    """`[role]text<|im_end|>`, told message by message."""

    def get_stop_sequences(self) -> list[int]:
        return [self.control_token("<|im_end|>")]

    def render_message(self, message: Message, ctx: RenderContext) -> RenderedMessage:
        texts = [f"[{message['role']}]", get_text_content(message)]
        header, text = self.encoder.encode_batch(texts)
        output = [*text, *self.get_stop_sequences()]
        return RenderedMessage(
            header=tinker.EncodedTextChunk(tokens=header),
            output=[tinker.EncodedTextChunk(tokens=output)],
        )


def test_one_message_at_a_time_is_enough() -> None:
    renderer = BracketRenderer(load_tokenizer("qwen3"))
    decode = renderer.encoder.decode
    model_input, weights = renderer.build_supervised_example(TALK)
    tokens = np.asarray(model_input.to_ints())
    assert decode(tokens.tolist()) == "[user]Hi<|im_end|>[assistant]Hello<|im_end|>"
    assert decode(tokens[weights > 0].tolist()) == "Hello<|im_end|>"
    prompt = renderer.build_generation_prompt(TALK[:1]).to_ints()
    assert decode(prompt) == "[user]Hi<|im_end|>[assistant]"
    message, end = renderer.parse_response(tokens[weights > 0].tolist())
    assert (message["content"], end) == ("Hello", ParseTermination.STOP_SEQUENCE)


class _PictureRenderer(BracketRenderer):
    """As above, with an image before each user message."""

    image = tinker.types.ImageChunk(data=b"\xff\xd8", format="jpeg", expected_tokens=7)

    def lay_out(self, layout: Layout, messages: Sequence[Message], forms: Sequence[object]) -> None:
        for index, message in enumerate(messages):
            layout.text(f"[{message['role']}]", SegmentKind.FRAME, index)
            if message["role"] == "user":
                layout.media(self.image, index)
            sampled = message["role"] == "assistant"
            layout.text(get_text_content(message), SegmentKind.CONTENT, index, sampled=sampled)
            layout.ids(self.get_stop_sequences(), SegmentKind.STOP, index, sampled=sampled)


def test_images_stand_between_text_chunks_and_take_their_positions() -> None:
    renderer = _PictureRenderer(load_tokenizer("qwen3"))
    model_input, weights = renderer.build_supervised_example(TALK, TrainOnWhat.ALL_MESSAGES)
    kinds = [chunk.type for chunk in model_input.chunks]
    assert kinds == ["encoded_text", "image", "encoded_text"]
    assert weights.shape == (model_input.length,)
    start = model_input.chunks[0].length
    assert weights[:start].tolist() == [0.0] * start
    assert weights[start : start + 7].tolist() == [1.0] * 7
    views = token_views(renderer.render(TALK), weights, renderer.encoder)
    assert "<image: 7 positions>" in terminal_text(views, color=False)
