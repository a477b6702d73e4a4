"""Qwen3.5, 3.6 and 3.8: ChatML with an opened think block, tool calls in XML, images.

| renderer                     | prompt ends in                 | old reasoning |
|------------------------------|--------------------------------|---------------|
| `qwen3_5`                    | `<think>\\n`                   | dropped       |
| `qwen3_5_disable_thinking`   | `<think>\\n\\n</think>\\n\\n`  | dropped       |
| `qwen3_5_preserve_thinking`  | `<think>\\n`                   | kept          |
| `qwen3_6` and variants       | as those of `qwen3_5`          | as those      |
| `qwen3_8_xhigh_reasoning`, `_medium_`, `_low_` | `<think>\\n` | kept          |
| `qwen3_8_disable_thinking`   | `<think>\\n\\n</think>\\n\\n`  | kept          |

White space around content and reasoning is dropped. A reply after the last user message has a think
block, empty or not; an earlier one only if old reasoning is kept. Prompts of formats that keep it
extend each other: all formats of Qwen3.8.
Qwen3.8 writes its effort at the start of the system message. Qwen3.5 writes truth values and null
in arguments as Python does, the later ones as JSON does.

Differences from the templates, in addition to those in chatml.py:
 1. `<think>` typed in a string is text. The templates of 3.5 and 3.6 cut strings at `</think>`.
 2. The part of the think block that the prompt writes is encoded separately from what follows, as
    it is sampled: `<think>`, `\\n` + `\\n`, `</think>` where the template merges to `\\n\\n`.
 3. Without a user message before them, replies are written as if there were one; the template
    raises.
 4. A system message after the first is refused, as the template does.
 5. With thinking disabled, a trained reply with reasoning is refused.
 6. Numbers, lists and objects in arguments given as JSON text are not changed. The template does
    not accept text.
 7. `qwen3_5_preserve_thinking` does what the later templates do; Qwen3.5's template has no such
    option.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.base import NamedRenderer
from tinker_cookbook.renderers.chatml import ChatMLRenderer
from tinker_cookbook.renderers.content import refuse_trained_thinking, split_reasoning
from tinker_cookbook.renderers.images import (
    ImageProcessorProtocol,
    has_images,
    strip_pieces,
    text_and_images,
)
from tinker_cookbook.renderers.layout import Layout, SegmentKind
from tinker_cookbook.renderers.notations.xml import (
    PYTHON_WORDS,
    fit_calls,
    parse_xml_call,
    xml_call_text,
)
from tinker_cookbook.renderers.parsing import Grammar
from tinker_cookbook.renderers.tool_calls import json_text, tool_declaration
from tinker_cookbook.renderers.types import CallLike, ImagePart, Message, Role, ToolSpec
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = [
    "REASONING_EFFORT_INSTRUCTIONS",
    "RENDERERS",
    "XML_CALL_INSTRUCTIONS",
    "Qwen3_5DisableThinkingRenderer",
    "Qwen3_5Renderer",
]

REASONING_EFFORT_INSTRUCTIONS: Mapping[str, str] = {
    "xhigh": "Reasoning effort is set to xhigh. Please think carefully through the task, validate "
    "key assumptions, consider plausible alternatives, and prioritize correctness, consistency, "
    "and clarity in the final answer.",
    "medium": "",
    "low": "Reasoning effort is set to low. Keep your thinking brief and focused, moving directly "
    "to the conclusion without unnecessary elaboration.",
}
"""What Qwen3.8 writes before the system message."""

_TOOLS_BEFORE = "# Tools\n\nYou have access to the following functions:\n\n<tools>"
XML_CALL_INSTRUCTIONS = (
    "\n</tools>\n\nIf you choose to call a function ONLY reply in the following format with NO "
    "suffix:\n\n<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\n"
    "value_1\n</parameter>\n<parameter=example_parameter_2>\nThis is the value for the second "
    "parameter\nthat can span\nmultiple lines\n</parameter>\n</function>\n</tool_call>\n\n"
    "<IMPORTANT>\nReminder:\n- Function calls MUST follow the specified format: an inner "
    "<function=...></function> block must be nested within <tool_call></tool_call> XML tags\n"
    "- Required parameters MUST be specified\n- You may provide optional reasoning for your "
    "function call in natural language BEFORE the function call, but NOT after\n- If there is no "
    "function call available, answer the question like normal with your current knowledge and do "
    "not tell the user about function calls\n</IMPORTANT>"
)


class Qwen3_5Renderer(ChatMLRenderer):
    """Qwen3.5 and later."""

    takes_text_arguments = False
    newlines_before_call = 2

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_processor: ImageProcessorProtocol | None = None,
        *,
        thinking: Literal["opened", "disabled"] = "opened",
        strip_thinking_from_history: bool = True,
        reasoning_effort: str | None = None,
        python_words: bool = True,
    ) -> None:
        """Prepare the format.

        Args:
            tokenizer: must have Qwen's control tokens.
            image_processor: the model's image processor, if users and tools may send images.
            thinking: whether the prompt opens the think block or contains an empty one.
            strip_thinking_from_history: drop the think blocks before the last user message.
            reasoning_effort: a key of `REASONING_EFFORT_INSTRUCTIONS`, for Qwen3.8; written if
                thinking is on. None for earlier models.
            python_words: write `True`, `False` and `None` in arguments, as Qwen3.5 does; later
                models write them as JSON does.
        """
        super().__init__(tokenizer, tools=True, image_processor=image_processor)
        if reasoning_effort is not None and reasoning_effort not in REASONING_EFFORT_INSTRUCTIONS:
            raise RendererError(
                f"reasoning_effort={reasoning_effort!r} is unknown; use one of "
                f"{', '.join(REASONING_EFFORT_INSTRUCTIONS)}."
            )
        self.thinking = thinking
        self.disables_thinking = thinking == "disabled"
        self.strip_thinking_from_history = strip_thinking_from_history
        effort = "" if reasoning_effort is None or self.disables_thinking else reasoning_effort
        self._instructions = REASONING_EFFORT_INSTRUCTIONS.get(effort, "")
        self._skips_empty_system = reasoning_effort is not None
        self._words = PYTHON_WORDS if python_words else {}
        self._think = self.control_token("<think>")
        self._think_end = self.control_token("</think>")
        newline, gap = self.encoder.encode_batch(["\n", "\n\n"])
        self._opening = (self._think, *newline)
        self._empty_block = (self._think, *gap, self._think_end, *gap)

    @property
    def has_extension_property(self) -> bool:
        return not self.strip_thinking_from_history

    # ---- layout ----

    def turn_forms(self, messages: Sequence[Message]) -> Sequence[Hashable]:
        """Return whether each reply has a think block."""
        query = self._last_query_index(messages) if self.strip_thinking_from_history else -1
        return [m["role"] == "assistant" and i > query for i, m in enumerate(messages)]

    def _last_query_index(self, messages: Sequence[Message]) -> int:
        """Return the index of the last user message that is not a tool result in disguise, -1 if
        none."""
        for index in range(len(messages) - 1, -1, -1):
            message = messages[index]
            if message["role"] == "user":
                text = "" if self._shows_images(message) else self._read(message)[1]
                if not (text.startswith("<tool_response>") and text.endswith("</tool_response>")):
                    return index
        return -1

    def check_trained_turn(self, messages: Sequence[Message], index: int) -> None:
        if self.disables_thinking:
            refuse_trained_thinking(split_reasoning(messages[index])[0].strip(), index)

    def lay_out(
        self, layout: Layout, messages: Sequence[Message], forms: Sequence[Hashable]
    ) -> None:
        if self._instructions and (not messages or messages[0]["role"] != "system"):
            layout.frame(self._frames["system"], -1)
            layout.text(self._instructions, SegmentKind.CONTENT, -1)
            self._end_turn(layout, -1)
        super().lay_out(layout, messages, forms)

    def _read(self, message: Message) -> tuple[str, str]:
        reasoning, text = split_reasoning(message)
        return reasoning.strip(), text.strip()

    def _read_pieces(self, message: Message, index: int) -> list[str | ImagePart]:
        return strip_pieces(text_and_images(message, index))

    def _lay_out_plain(self, layout: Layout, message: Message, index: int) -> None:
        if message["role"] != "system":
            super()._lay_out_plain(layout, message, index)
            return
        if index:
            raise RendererError(
                f"messages[{index}]: a system message must be the first message in this format; "
                "join it with the first message, or make it a user message."
            )
        if has_images(message):
            raise RendererError("messages[0]: a system message cannot hold images in this format.")
        self._lay_out_system(layout, message)

    def _lay_out_system(self, layout: Layout, message: Message) -> None:
        """Append effort, tools and text of the system message."""
        text, tools = self._read(message)[1], message.get("tools")
        if self._skips_empty_system and not (text or tools or self._instructions):
            return
        layout.frame(self._frames["system"], 0)
        if self._instructions:
            gap = "\n\n" if text or tools else ""
            layout.text(self._instructions + gap, SegmentKind.CONTENT, 0)
        if tools:
            self._lay_out_tools(layout, tools, 0, after_text=False)
        layout.text("\n\n" + text if tools and text else text, SegmentKind.CONTENT, 0)
        self._end_turn(layout, 0)

    def _lay_out_tools(
        self, layout: Layout, tools: Sequence[ToolSpec], index: int, *, after_text: bool
    ) -> None:
        declarations = "".join("\n" + json_text(tool_declaration(tool)) for tool in tools)
        layout.text(_TOOLS_BEFORE + declarations, SegmentKind.TOOL, index)
        self._lay_out_markup(layout, XML_CALL_INSTRUCTIONS, index)

    def _lay_out_assistant(
        self, layout: Layout, message: Message, index: int, form: Hashable
    ) -> None:
        reasoning, text = self._read(message)
        layout.frame(self._frames["assistant"], index)
        if form:
            self._lay_out_thinking(layout, reasoning, index)
        sampled = bool(form)
        layout.text(text, SegmentKind.CONTENT, index, sampled=sampled)
        self._lay_out_calls(layout, message, index, after_text=bool(text), sampled=sampled)
        self._end_turn(layout, index, sampled=sampled)

    def _lay_out_thinking(self, layout: Layout, reasoning: str, index: int) -> None:
        """Append the think block; the part that the generation prompt writes is FRAME."""
        if self.disables_thinking and not reasoning:
            layout.ids(self._empty_block, SegmentKind.FRAME, index)
            return
        layout.ids(self._opening, SegmentKind.FRAME, index)
        layout.text(f"{reasoning}\n", SegmentKind.THINK, index, sampled=True)
        layout.ids((self._think_end,), SegmentKind.THINK, index, sampled=True)
        layout.text("\n\n", SegmentKind.THINK, index, sampled=True)

    def open_turn(self, layout: Layout, messages: Sequence[Message], role: Role) -> None:
        super().open_turn(layout, messages, role)
        if role == "assistant":
            opening = self._empty_block if self.disables_thinking else self._opening
            layout.ids(opening, SegmentKind.FRAME, len(messages))

    def _call_text(self, call: CallLike) -> str:
        return xml_call_text(call, self._words)

    # ---- replies ----

    def fit_tool_calls(self, message: Message, tools: Sequence[ToolSpec]) -> Message:
        return fit_calls(message, tools, self._words)

    def grammar(self) -> Grammar:
        return replace(
            super().grammar(),
            think=(self._think, self._think_end),
            starts_in_thinking=not self.disables_thinking,
            parse_call=partial(parse_xml_call, words=self._words),
        )


class Qwen3_5DisableThinkingRenderer(Qwen3_5Renderer):
    """`qwen3_5_disable_thinking`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_processor: ImageProcessorProtocol | None = None,
        *,
        strip_thinking_from_history: bool = True,
        python_words: bool = True,
    ) -> None:
        super().__init__(
            tokenizer,
            image_processor,
            thinking="disabled",
            strip_thinking_from_history=strip_thinking_from_history,
            python_words=python_words,
        )


RENDERERS = [
    NamedRenderer(
        "qwen3_5",
        Qwen3_5Renderer,
        "Qwen3.5",
        "the prompt opens the think block; tools in XML; images",
    ),
    NamedRenderer(
        "qwen3_5_disable_thinking",
        Qwen3_5DisableThinkingRenderer,
        "Qwen3.5",
        "the prompt holds an empty think block",
    ),
    NamedRenderer(
        "qwen3_5_preserve_thinking",
        lambda tokenizer, images: Qwen3_5Renderer(
            tokenizer, images, strip_thinking_from_history=False
        ),
        "Qwen3.5",
        "old reasoning is kept: whole conversations train in one example",
    ),
    NamedRenderer(
        "qwen3_6",
        lambda tokenizer, images: Qwen3_5Renderer(tokenizer, images, python_words=False),
        "Qwen3.6",
        "the prompt opens the think block; tools in XML; images",
    ),
    NamedRenderer(
        "qwen3_6_disable_thinking",
        lambda tokenizer, images: Qwen3_5DisableThinkingRenderer(
            tokenizer, images, python_words=False
        ),
        "Qwen3.6",
        "the prompt holds an empty think block",
    ),
    NamedRenderer(
        "qwen3_6_preserve_thinking",
        lambda tokenizer, images: Qwen3_5Renderer(
            tokenizer, images, python_words=False, strip_thinking_from_history=False
        ),
        "Qwen3.6",
        "old reasoning is kept: whole conversations train in one example",
    ),
]
