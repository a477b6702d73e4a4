"""Gemma 3: `<start_of_turn>role`, newline, trimmed text, `<end_of_turn>`, newline.

The format has no system turn: a system message is the beginning of the user message after it, with
a blank line between. It has no tools and no thinking.

Deliberate differences from the template:
 1. Typed control tokens stay text. HTML tags and runs of white space are text, although they are
    added tokens of the vocabulary; they are encoded as the tokenizer encodes them.
 2. Roles do not have to alternate; the template raises. A system message must come first, before a
    user message.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.base import NamedRenderer, Renderer
from tinker_cookbook.renderers.content import split_reasoning
from tinker_cookbook.renderers.layout import Layout, SegmentKind
from tinker_cookbook.renderers.parsing import Grammar
from tinker_cookbook.renderers.types import Message, Role
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["RENDERERS", "Gemma3Renderer"]

_WRITTEN = {"user": "user", "assistant": "model"}


class Gemma3Renderer(Renderer):
    """Gemma 3, text only."""

    roles = ("system", "user", "assistant")

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.bos_ids = (self.control_token("<bos>"),)
        self._end = self.control_token("<end_of_turn>")
        self._end_ids = (self._end,)
        start = self.control_token("<start_of_turn>")
        self._frames = {
            role: self.build_frame([start], f"{name}\n") for role, name in _WRITTEN.items()
        }
        self._newline = tuple(self.encoder.encode_batch(["\n"])[0])

    def lay_out(
        self, layout: Layout, messages: Sequence[Message], forms: Sequence[Hashable]
    ) -> None:
        layout.ids(self.bos_ids, SegmentKind.FRAME, -1)
        for index, message in enumerate(messages):
            role, text = message["role"], self._text(message, index)
            if role == "system":
                self._check_system(messages, index)
                continue
            sampled = role == "assistant"
            layout.frame(self._frames[role], index)
            self._lay_out_system(layout, messages, index)
            layout.text(text.strip(), SegmentKind.CONTENT, index, sampled=sampled)
            layout.ids(self._end_ids, SegmentKind.STOP, index, sampled=sampled)
            layout.ids(self._newline, SegmentKind.FRAME, index)

    def open_turn(self, layout: Layout, messages: Sequence[Message], role: Role) -> None:
        if messages and messages[-1]["role"] == "system" and role != "user":
            raise self._system_error(len(messages) - 1)
        if role == "system":
            return  # it is the beginning of the user message
        layout.frame(self._frames[role], len(messages))
        self._lay_out_system(layout, messages, len(messages))

    def _lay_out_system(self, layout: Layout, messages: Sequence[Message], index: int) -> None:
        """Append the system message with which user message number `index` begins, if any."""
        if index == 1 and messages[0]["role"] == "system":
            layout.text(self._text(messages[0], 0) + "\n\n", SegmentKind.CONTENT, 0)

    def _check_system(self, messages: Sequence[Message], index: int) -> None:
        follows = messages[index + 1]["role"] if index + 1 < len(messages) else "user"
        if index or follows != "user":
            raise self._system_error(index)

    @staticmethod
    def _system_error(index: int) -> RendererError:
        return RendererError(
            f"messages[{index}]: a system message must be the first, before a user message, "
            "in this format, which writes it into that message; move it there."
        )

    @staticmethod
    def _text(message: Message, index: int) -> str:
        reasoning, text = split_reasoning(message)
        if reasoning:
            raise RendererError(
                f"messages[{index}]: Gemma 3 has no place for thinking; remove the thinking parts, "
                "or use the renderer of a thinking model."
            )
        if message.get("tool_calls") or message.get("tools") or message.get("unparsed_tool_calls"):
            raise RendererError(
                f"messages[{index}]: Gemma 3 has no format for tools and tool_calls; remove them, "
                "or use the renderer of a model with tools."
            )
        return text

    # ---- replies ----

    def get_stop_sequences(self) -> list[int]:
        return [self._end]

    def grammar(self) -> Grammar:
        document_end = self.encoder.control_id("<eos>")
        return Grammar(
            stop=frozenset(self._end_ids),
            eos=frozenset() if document_end is None else frozenset([document_end]),
        )


RENDERERS = [
    NamedRenderer(
        "gemma3",
        lambda tokenizer, _: Gemma3Renderer(tokenizer),
        "Gemma 3",
        "the system message opens the first user message; no tools",
    ),
]
