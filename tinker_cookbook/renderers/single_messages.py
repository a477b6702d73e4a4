"""For renderers that write one message at a time, as the upstream cookbook's do.

Such a renderer implements `render_message` instead of `lay_out` and `open_turn`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.layout import Layout, SegmentKind
from tinker_cookbook.renderers.train_on_what import last_user_index
from tinker_cookbook.renderers.types import Message, ParseTermination, RenderContext, Role

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = [
    "RenderedMessage",
    "context_of",
    "lay_out_header",
    "lay_out_messages",
    "parse_response_for_stop_token",
    "tokens_weights_from_strings_weights",
]


@dataclass(frozen=True)
class RenderedMessage:
    """Tokens of one message: the header is context, the output is what can be trained."""

    output: list[tinker.ModelInputChunk]
    header: tinker.EncodedTextChunk | None = None
    stop_overlap: tinker.EncodedTextChunk | None = None
    """Trained after the last message: the beginning of a next header, if that ends sampling."""


RenderMessage = Callable[[Message, RenderContext], RenderedMessage]


def lay_out_messages(layout: Layout, messages: Sequence[Message], render: RenderMessage) -> None:
    """Append all messages, each as `render` writes it."""
    for index, message in enumerate(messages):
        rendered = render(message, context_of(messages, index))
        sampled = message["role"] == "assistant"
        _append(layout, rendered.header, SegmentKind.FRAME, index)
        for chunk in rendered.output:
            _append(layout, chunk, SegmentKind.CONTENT, index, sampled=sampled)
        if index == len(messages) - 1:
            _append(layout, rendered.stop_overlap, SegmentKind.STOP, index, sampled=sampled)


def lay_out_header(
    layout: Layout, messages: Sequence[Message], role: Role, render: RenderMessage
) -> None:
    """Append the header of a next message of `role`."""
    opened = [*messages, Message(role=role, content="")]
    rendered = render(opened[-1], context_of(opened, len(messages)))
    _append(layout, rendered.header, SegmentKind.FRAME, len(messages))


def _append(
    layout: Layout,
    chunk: tinker.ModelInputChunk | None,
    kind: SegmentKind,
    message: int,
    *,
    sampled: bool = False,
) -> None:
    if chunk is None:
        return
    if chunk.type == "encoded_text":
        layout.ids(list(chunk.tokens), kind, message, sampled=sampled)
    else:
        layout.media(chunk, message)


def context_of(messages: Sequence[Message], index: int) -> RenderContext:
    """Return the place of message number `index` in its conversation."""
    user = last_user_index(messages)
    return RenderContext(
        idx=index,
        is_last=index == len(messages) - 1,
        prev_message=messages[index - 1] if index else None,
        next_message=messages[index + 1] if index + 1 < len(messages) else None,
        last_user_index=user,
        in_last_assistant_turn=messages[index]["role"] == "assistant" and index > user,
    )


def parse_response_for_stop_token(
    response: Sequence[int], tokenizer: Tokenizer, stop_token: int
) -> tuple[Message, ParseTermination]:
    """Parse a sampled reply of a format in which one token ends a turn.

    Returns:
        The text before the stop token, and how the reply ended: MALFORMED without a stop token.

    Raises:
        RendererError: if the stop token occurs more than once, so sampling did not stop at it.
    """
    tokens = list(response)
    count = tokens.count(stop_token)
    if count > 1:
        raise RendererError(
            f"the reply has stop token {stop_token} {count} times; give it as the stop sequence "
            "when sampling, so that a reply ends there."
        )
    text = tokens[: tokens.index(stop_token)] if count else tokens
    message = Message(role="assistant", content=str(tokenizer.decode(text)))
    return message, ParseTermination.STOP_SEQUENCE if count else ParseTermination.MALFORMED


def tokens_weights_from_strings_weights(
    strings_weights: Sequence[tuple[str, float]], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Encode texts separately; all tokens of a text get its weight.

    Returns:
        Tokens, int64 [T], and weights, float32 [T].
    """
    tokens: list[int] = []
    weights: list[float] = []
    for text, weight in strings_weights:
        # Only the first text may get the tokens that the tokenizer writes before a document.
        encoded = tokenizer.encode(text, add_special_tokens=not tokens)
        tokens += encoded
        weights += [weight] * len(encoded)
    return np.array(tokens, dtype=np.int64), np.array(weights, dtype=np.float32)
