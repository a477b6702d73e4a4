"""SmolLM3: ChatML with a metadata header, and reasoning in plain `<think>` ... `</think>`.

| renderer                   | mode in the header | prompt ends in                           |
|----------------------------|--------------------|------------------------------------------|
| `smollm3`                  | `/think`           | `assistant\\n`                           |
| `smollm3_disable_thinking` | `/no_think`        | `assistant\\n<think>\\n\\n</think>\\n`   |

The header is always written: a cut-off date, the mode, and the system message or SmolLM3's default
text. Replies lose newlines at their start. A reply with reasoning is `<think>`, newline, reasoning,
newline, `</think>`, newline, text, in every turn, so prompts of both formats extend each other.

Differences from the template (the one in llama.cpp, without tools and dates):
 1. Typed control tokens stay text, including `<think>`; reasoning must be a thinking part. The
    template reads reasoning only from typed text.
 2. The renderer decides the mode. The template also looks for `/think` and `/no_think` in the
    system message and removes them; here they are text.
 3. With thinking disabled, reasoning in history is dropped, and a trained reply with it refused.
 4. A reply is encoded separately from what the prompt writes before it.
 5. System messages after the first are refused; the template drops them.
 6. Tools are not written.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.base import NamedRenderer
from tinker_cookbook.renderers.chatml import ChatMLRenderer
from tinker_cookbook.renderers.content import refuse_trained_thinking, split_reasoning
from tinker_cookbook.renderers.layout import Layout, SegmentKind
from tinker_cookbook.renderers.parsing import Grammar
from tinker_cookbook.renderers.types import Message, Role
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["RENDERERS", "SmolLM3Renderer"]

_HEADER = (
    "## Metadata\n\nKnowledge Cutoff Date: June 2025\nReasoning Mode: {mode}\n\n"
    "## Custom Instructions\n\n"
)
_NAME = "You are a helpful AI assistant named SmolLM, trained by Hugging Face."
_HOW_TO_THINK = (
    " Your role as an assistant involves thoroughly exploring questions through a systematic "
    "thinking process before providing the final precise and accurate solutions. This requires "
    "engaging in a comprehensive cycle of analysis, summarizing, exploration, reassessment, "
    "reflection, backtracking, and iteration to develop well-considered thinking process. Please "
    "structure your response into two main sections: Thought and Solution using the specified "
    "format: <think> Thought section </think> Solution section. In the Thought section, detail "
    "your reasoning process in steps. Each step should include detailed considerations such as "
    "analysing questions, summarizing relevant findings, brainstorming new ideas, verifying the "
    "accuracy of the current steps, refining any errors, and revisiting previous steps. In the "
    "Solution section, based on various attempts, explorations, and reflections from the Thought "
    "section, systematically present the final solution that you deem correct. The Solution "
    "section should be logical, accurate, and concise and detail necessary steps needed to reach "
    "the conclusion."
)


class SmolLM3Renderer(ChatMLRenderer):
    """SmolLM3, with or without thinking."""

    roles = ("system", "user", "assistant", "tool")

    def __init__(self, tokenizer: Tokenizer, *, disables_thinking: bool = False) -> None:
        super().__init__(tokenizer)
        self.disables_thinking = disables_thinking
        self._think = self.control_token("<think>")
        self._think_end = self.control_token("</think>")
        newline, gap = self.encoder.encode_batch(["\n", "\n\n"])
        self._empty_block = (self._think, *gap, self._think_end, *newline)
        self._frames["tool"] = self._frames["user"]

    def check_trained_turn(self, messages: Sequence[Message], index: int) -> None:
        if self.disables_thinking:
            refuse_trained_thinking(split_reasoning(messages[index])[0].strip("\n"), index)

    def lay_out(
        self, layout: Layout, messages: Sequence[Message], forms: Sequence[Hashable]
    ) -> None:
        if not messages or messages[0]["role"] != "system":
            self._lay_out_header(layout, "", -1)
        super().lay_out(layout, messages, forms)

    def _lay_out_plain(self, layout: Layout, message: Message, index: int) -> None:
        if message["role"] != "system":
            super()._lay_out_plain(layout, message, index)
        elif index or message.get("tools"):
            raise RendererError(
                f"messages[{index}]: this format has one system message, at the start, and no "
                "tools; join it with the first message, and remove the tools."
            )
        else:
            self._lay_out_header(layout, split_reasoning(message)[1].rstrip(), 0)

    def _lay_out_header(self, layout: Layout, instructions: str, index: int) -> None:
        """Append the system message: metadata, then its text or SmolLM3's default text."""
        mode = "/no_think" if self.disables_thinking else "/think"
        layout.frame(self._frames["system"], index)
        layout.text(_HEADER.format(mode=mode), SegmentKind.FRAME, index)
        if instructions:
            layout.text(f"{instructions}\n\n", SegmentKind.CONTENT, index)
        elif self.disables_thinking:
            layout.text(f"{_NAME}\n\n", SegmentKind.FRAME, index)
        else:
            before, _, rest = f"{_NAME}{_HOW_TO_THINK}\n\n".partition("<think>")
            thought, _, after = rest.partition("</think>")
            layout.text(before, SegmentKind.FRAME, index)
            layout.ids((self._think,), SegmentKind.FRAME, index)
            layout.text(thought, SegmentKind.FRAME, index)
            layout.ids((self._think_end,), SegmentKind.FRAME, index)
            layout.text(after, SegmentKind.FRAME, index)
        self._end_turn(layout, index)

    def _lay_out_assistant(
        self, layout: Layout, message: Message, index: int, form: Hashable
    ) -> None:
        reasoning, text = split_reasoning(message)
        reasoning, text = reasoning.strip("\n"), text.lstrip("\n")
        layout.frame(self._frames["assistant"], index)
        if self.disables_thinking:
            layout.ids(self._empty_block, SegmentKind.FRAME, index)
        elif reasoning:
            layout.ids((self._think,), SegmentKind.THINK, index, sampled=True)
            layout.text(f"\n{reasoning}\n", SegmentKind.THINK, index, sampled=True)
            layout.ids((self._think_end,), SegmentKind.THINK, index, sampled=True)
            layout.text("\n", SegmentKind.THINK, index, sampled=True)
        layout.text(text, SegmentKind.CONTENT, index, sampled=True)
        self._lay_out_calls(layout, message, index, after_text=bool(text))
        self._end_turn(layout, index, sampled=True)

    def open_turn(self, layout: Layout, messages: Sequence[Message], role: Role) -> None:
        super().open_turn(layout, messages, role)
        if role == "assistant" and self.disables_thinking:
            layout.ids(self._empty_block, SegmentKind.FRAME, len(messages))

    def grammar(self) -> Grammar:
        return replace(super().grammar(), think=(self._think, self._think_end))


RENDERERS = [
    NamedRenderer(
        "smollm3",
        lambda tokenizer, _: SmolLM3Renderer(tokenizer),
        "SmolLM3",
        "mode in the system message; old reasoning is kept",
    ),
    NamedRenderer(
        "smollm3_disable_thinking",
        lambda tokenizer, _: SmolLM3Renderer(tokenizer, disables_thinking=True),
        "SmolLM3",
        "mode in the system message; no thinking",
    ),
]
