"""Qwen3: ChatML with reasoning in `<think>` ... `</think>` and tools.

| renderer                 | prompt ends in                       | a reply starts with      |
|--------------------------|-----------------------------------|--------------------------|
| `qwen3`                  | `assistant\\n`                       | `<think>`, always        |
| `qwen3_disable_thinking` | `<think>\\n\\n</think>\\n\\n`        | the text                 |
| `qwen3_thinking_2507`    | `<think>\\n`                         | the reasoning            |
| `qwen3_vl`               | `<think>\\n`, as Qwen3-VL Thinking  | the reasoning            |
| `qwen3_instruct`         | `assistant\\n`                       | the text (see chatml.py) |

As in the template, reasoning before the last user message is dropped, and after it only a reply
with reasoning, or the last one, has a think block. A reply sampled in turn 1 is therefore written
differently in turn 2: prompts do not extend each other, and training makes one example per reply.

Differences from the template, in addition to those in chatml.py:
 1. `<think>` typed in a string is text. The template cuts strings at `</think>`; use thinking parts
    (or `parse_think_blocks`) for reasoning.
 2. Where the prompt opens or closes the think block, what follows is encoded separately, as when
    sampling (`<think>`, `\\n` + `\\n`, `</think>` where the template merges to `\\n\\n`).
 3. Without a user message before them, replies are written as if there were one. The template omits
    all their reasoning, even that of the reply being trained.
 4. With thinking disabled, a trained reply with reasoning is refused: no prompt of this format
    can precede it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from enum import Enum, auto
from typing import Literal

from tinker_cookbook.renderers.base import NamedRenderer
from tinker_cookbook.renderers.chatml import ChatMLRenderer
from tinker_cookbook.renderers.content import refuse_trained_thinking, split_reasoning
from tinker_cookbook.renderers.images import ImageProcessorProtocol, has_images
from tinker_cookbook.renderers.layout import Layout, SegmentKind
from tinker_cookbook.renderers.parsing import Grammar
from tinker_cookbook.renderers.types import Message, Role
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = [
    "RENDERERS",
    "Qwen3DisableThinkingRenderer",
    "Qwen3InstructRenderer",
    "Qwen3Renderer",
    "Qwen3VLInstructRenderer",
    "Qwen3VLRenderer",
]

Thinking = Literal["sampled", "opened", "disabled"]


class Qwen3Renderer(ChatMLRenderer):
    """Qwen3's hybrid thinking format."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        strip_thinking_from_history: bool = True,
        *,
        thinking: Thinking = "sampled",
        image_processor: ImageProcessorProtocol | None = None,
    ) -> None:
        """Prepare the frames.

        Args:
            tokenizer: a Qwen3 tokenizer, or one with its control tokens.
            strip_thinking_from_history: drop old reasoning, as the template does. False keeps a
                think block in every reply, so that prompts extend each other and whole
                conversations train in one example.
            thinking: who writes the think block. "sampled": the model writes all of it. "opened":
                the prompt opens it. "disabled": the prompt contains an empty block.
            image_processor: the model's image processor, if users and tools may send images.
        """
        super().__init__(tokenizer, tools=True, image_processor=image_processor)
        self.strip_thinking_from_history = strip_thinking_from_history
        self.thinking = thinking
        self.disables_thinking = thinking == "disabled"
        self._think = self.control_token("<think>")
        self._think_end = self.control_token("</think>")
        newline, gap = self.encoder.encode_batch(["\n", "\n\n"])
        self._prompt_ids: tuple[int, ...] = {
            "sampled": (),
            "opened": (self._think, *newline),
            "disabled": (self._think, *gap, self._think_end, *gap),
        }[thinking]

    @property
    def has_extension_property(self) -> bool:
        return not self.strip_thinking_from_history

    def turn_forms(self, messages: Sequence[Message]) -> Sequence[Hashable]:
        """Return how each reply is written, as the template decides it."""
        if not self.strip_thinking_from_history:
            return [_Form.THINK] * len(messages)
        query = _last_query_index(messages)
        last = len(messages) - 1
        forms: list[_Form | None] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                forms.append(None)
            elif index > query and (index == last or split_reasoning(message)[0]):
                forms.append(_Form.THINK)
            else:
                forms.append(_Form.HISTORY)
        return forms

    def check_trained_turn(self, messages: Sequence[Message], index: int) -> None:
        if self.disables_thinking:
            refuse_trained_thinking(split_reasoning(messages[index])[0], index)

    def _lay_out_assistant(
        self, layout: Layout, message: Message, index: int, form: Hashable
    ) -> None:
        reasoning, text = split_reasoning(message)
        layout.frame(self._frames["assistant"], index)
        if form is _Form.THINK:
            self._lay_out_thinking(layout, reasoning.strip("\n"), index)
            text_written = text.lstrip("\n")
        else:
            text_written = text
        sampled = form is not _Form.HISTORY
        layout.text(text_written, SegmentKind.CONTENT, index, sampled=sampled)
        self._lay_out_calls(layout, message, index, after_text=bool(text), sampled=sampled)
        self._end_turn(layout, index, sampled=sampled)

    def _lay_out_thinking(self, layout: Layout, reasoning: str, index: int) -> None:
        """Append the think block; the part that the generation prompt writes is FRAME."""
        if self.thinking == "disabled" and not reasoning:
            layout.ids(self._prompt_ids, SegmentKind.FRAME, index)
            return
        if self.thinking == "opened":
            layout.ids(self._prompt_ids, SegmentKind.FRAME, index)
            layout.text(f"{reasoning}\n", SegmentKind.THINK, index, sampled=True)
        else:
            layout.ids((self._think,), SegmentKind.THINK, index, sampled=True)
            layout.text(f"\n{reasoning}\n", SegmentKind.THINK, index, sampled=True)
        layout.ids((self._think_end,), SegmentKind.THINK, index, sampled=True)
        layout.text("\n\n", SegmentKind.THINK, index, sampled=True)

    def open_turn(self, layout: Layout, messages: Sequence[Message], role: Role) -> None:
        super().open_turn(layout, messages, role)
        if role == "assistant" and self._prompt_ids:
            layout.ids(self._prompt_ids, SegmentKind.FRAME, len(messages))

    def grammar(self) -> Grammar:
        think = (self._think, self._think_end)
        starts_in_thinking = self.thinking == "opened"
        return replace(super().grammar(), think=think, starts_in_thinking=starts_in_thinking)


class Qwen3DisableThinkingRenderer(Qwen3Renderer):
    """`qwen3_disable_thinking`."""

    def __init__(self, tokenizer: Tokenizer, strip_thinking_from_history: bool = True) -> None:
        super().__init__(tokenizer, strip_thinking_from_history, thinking="disabled")


class Qwen3VLRenderer(Qwen3Renderer):
    """`qwen3_vl`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_processor: ImageProcessorProtocol | None = None,
        strip_thinking_from_history: bool = True,
    ) -> None:
        super().__init__(
            tokenizer,
            strip_thinking_from_history,
            thinking="opened",
            image_processor=image_processor,
        )


class Qwen3InstructRenderer(ChatMLRenderer):
    """`qwen3_instruct`: without thinking, so it is based on ChatML directly."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, tools=True)


class Qwen3VLInstructRenderer(ChatMLRenderer):
    """`qwen3_vl_instruct`."""

    def __init__(
        self, tokenizer: Tokenizer, image_processor: ImageProcessorProtocol | None = None
    ) -> None:
        super().__init__(tokenizer, tools=True, image_processor=image_processor)


class _Form(Enum):
    """How a reply is written."""

    THINK = auto()
    """The reply has a think block."""
    HISTORY = auto()
    """The reply has no think block, because later messages follow."""


def _last_query_index(messages: Sequence[Message]) -> int:
    """Return the index of the last user message that is not a tool result in disguise, -1 if
    none."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index]["role"] == "user":
            text = "" if has_images(messages[index]) else split_reasoning(messages[index])[1]
            if not (text.startswith("<tool_response>") and text.endswith("</tool_response>")):
                return index
    return -1


RENDERERS = [
    NamedRenderer(
        "qwen3",
        lambda tokenizer, _: Qwen3Renderer(tokenizer),
        "Qwen3",
        "thinking, written by the model; tools",
    ),
    NamedRenderer(
        "qwen3_disable_thinking",
        lambda tokenizer, _: Qwen3DisableThinkingRenderer(tokenizer),
        "Qwen3",
        "the prompt holds an empty think block",
    ),
    NamedRenderer(
        "qwen3_thinking_2507",
        lambda tokenizer, _: Qwen3Renderer(tokenizer, thinking="opened"),
        "Qwen3 Thinking 2507",
        "the prompt opens the think block",
    ),
    NamedRenderer(
        "qwen3_instruct",
        lambda tokenizer, _: Qwen3InstructRenderer(tokenizer),
        "Qwen3 Instruct 2507",
        "no thinking; tools",
    ),
    NamedRenderer(
        "qwen3_vl_instruct",
        Qwen3VLInstructRenderer,
        "Qwen3-VL Instruct",
        "as `qwen3_instruct`, with images",
    ),
    NamedRenderer(
        "qwen3_vl",
        Qwen3VLRenderer,
        "Qwen3-VL Thinking",
        "as `qwen3_thinking_2507`, with images",
    ),
]
