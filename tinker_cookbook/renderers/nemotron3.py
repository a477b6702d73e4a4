"""Nemotron 3: ChatML with a system block always, a think block in every reply, calls in XML.

| renderer                      | model       | a prompt ends in  | old reasoning | the question |
|-------------------------------|-------------|-------------------|---------------|--------------|
| `nemotron3`                   | Nano, Super | `<think>\\n`      | dropped       | as given     |
| `nemotron3_low_thinking`      | Super       | `<think>\\n`      | dropped       | and "low"    |
| `nemotron3_disable_thinking`  | Nano, Super | `<think></think>` | dropped       | as given     |
| `nemotron3_preserve_thinking` | Nano, Super | `<think>\\n`      | kept          | as given     |

`nemotron3_ultra`, `..._ultra_medium_thinking` (effort: efficient), `..._ultra_disable_thinking` and
`..._ultra_preserve_thinking` are the same for Ultra, which writes no line breaks around `</think>`.

Reasoning is kept after the last user message and dropped before it. White space at the end of a
reply is dropped.

Differences from the templates, in addition to those in chatml.py:
 1. `<think>` typed in a string is text.
 2. In a thinking format, a last reply without reasoning has an empty think block in the form that
    the prompt opens; the template writes `<think></think>`, which cannot be sampled.
 3. With `..._preserve_thinking`, every reply without reasoning has such a block, so that prompts
    extend each other.
 4. With thinking disabled, all reasoning is dropped, and refused in a trained reply; text before a
    call is the same in history as when it is sampled (the template trims it later).
 5. Numbers in arguments are written as in their JSON text; the template writes them as Python does.
 6. A tool result that starts a conversation has a header.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from enum import Enum, auto
from functools import partial
from typing import Literal

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.base import NamedRenderer
from tinker_cookbook.renderers.chatml import ChatMLRenderer
from tinker_cookbook.renderers.content import refuse_trained_thinking, split_reasoning
from tinker_cookbook.renderers.layout import Layout, SegmentKind
from tinker_cookbook.renderers.notations.xml import (
    PYTHON_WORDS,
    fit_calls,
    parse_xml_call,
    xml_call_text,
)
from tinker_cookbook.renderers.parsing import Grammar
from tinker_cookbook.renderers.qwen3_5 import XML_CALL_INSTRUCTIONS
from tinker_cookbook.renderers.tool_calls import json_text, tool_declaration
from tinker_cookbook.renderers.train_on_what import last_user_index
from tinker_cookbook.renderers.types import CallLike, Message, Role, ToolSpec
from tinker_cookbook.replies.json_source import JsonSchema
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = [
    "RENDERERS",
    "Nemotron3DisableThinkingRenderer",
    "Nemotron3LowThinkingRenderer",
    "Nemotron3PreserveThinkingRenderer",
    "Nemotron3Renderer",
    "Nemotron3UltraDisableThinkingRenderer",
    "Nemotron3UltraMediumThinkingRenderer",
    "Nemotron3UltraPreserveThinkingRenderer",
    "Nemotron3UltraRenderer",
]


class _Form(Enum):
    """How a message is written."""

    PLAIN = auto()
    ASKED = auto()
    """The last user message, which names the effort."""
    SAMPLED = auto()
    """A reply as it is sampled."""
    KEPT = auto()
    """A reply after the last user message."""
    DROPPED = auto()
    """A reply before the last user message, without its reasoning."""


class Nemotron3Renderer(ChatMLRenderer):
    """NVIDIA's Nemotron 3."""

    takes_text_arguments = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_processor: None = None,
        *,
        strip_thinking_from_history: bool = True,
        thinking: Literal["opened", "disabled"] = "opened",
        is_ultra: bool = False,
        effort: str | None = None,
    ) -> None:
        """Prepare the format.

        Args:
            tokenizer: Nemotron's.
            image_processor: must be None; the models do not read images.
            strip_thinking_from_history: drop the reasoning before the last user message.
            thinking: whether the prompt opens the think block or contains an empty one.
            is_ultra: no line breaks around `</think>`.
            effort: reasoning effort named in the last user message; None for nothing.
        """
        super().__init__(tokenizer, tools=True, image_processor=image_processor)
        self.thinking = thinking
        self.disables_thinking = thinking == "disabled"
        self.strip_thinking_from_history = strip_thinking_from_history
        self.is_ultra = is_ultra
        self._effort = "" if effort is None else f"\n\n{{reasoning effort: {effort}}}"
        self._think = self.control_token("<think>")
        self._think_end = self.control_token("</think>")
        self._opening = (self._think, *self._newline)
        self._empty_block = (self._think, self._think_end)

    @property
    def has_extension_property(self) -> bool:
        return not self._effort and (self.disables_thinking or not self.strip_thinking_from_history)

    # ---- forms ----

    def turn_forms(self, messages: Sequence[Message]) -> Sequence[Hashable]:
        """Return how each message is written."""
        forms = list(self.prompt_forms(messages))
        if messages and messages[-1]["role"] == "assistant" and not self.disables_thinking:
            forms[-1] = _Form.SAMPLED
        return forms

    def prompt_forms(self, messages: Sequence[Message]) -> Sequence[Hashable]:
        question = last_user_index(messages)
        return [self._form(message, i, question) for i, message in enumerate(messages)]

    def _form(self, message: Message, index: int, question: int) -> _Form:
        if message["role"] != "assistant":
            return _Form.ASKED if self._effort and index == question else _Form.PLAIN
        if self.disables_thinking:
            return _Form.KEPT
        if not self.strip_thinking_from_history:
            return _Form.SAMPLED
        return _Form.KEPT if index > question else _Form.DROPPED

    def check_trained_turn(self, messages: Sequence[Message], index: int) -> None:
        if self.disables_thinking:
            refuse_trained_thinking(split_reasoning(messages[index])[0].strip(), index)

    # ---- layout ----

    def lay_out(
        self, layout: Layout, messages: Sequence[Message], forms: Sequence[Hashable]
    ) -> None:
        has_system = bool(messages) and messages[0]["role"] == "system"
        index = 0 if has_system else -1
        layout.frame(self._frames["system"], index)
        if has_system:
            text, tools = self._plain_text(messages[0], 0), messages[0].get("tools")
            layout.text(text, SegmentKind.CONTENT, 0)
            if tools:
                self._lay_out_tools(layout, tools, 0, after_text=bool(text))
        self._end_turn(layout, index)
        for index in range(int(has_system), len(messages)):
            message, form = messages[index], forms[index]
            if message["role"] == "assistant":
                self._lay_out_assistant(layout, message, index, form)
            elif message["role"] == "tool":
                self._lay_out_tool_result(layout, messages, index)
            else:
                self._lay_out_question(layout, message, index, form)

    def open_turn(self, layout: Layout, messages: Sequence[Message], role: Role) -> None:
        super().open_turn(layout, messages, role)
        if role == "assistant":
            opening = self._empty_block if self.disables_thinking else self._opening
            layout.ids(opening, SegmentKind.FRAME, len(messages))

    def _plain_text(self, message: Message, index: int) -> str:
        reasoning, text = split_reasoning(message)
        if reasoning or message.get("tool_calls"):
            raise RendererError(
                f"messages[{index}]: only the assistant thinks and makes tool_calls; role is "
                f"{message['role']!r}."
            )
        return text

    def _lay_out_question(
        self, layout: Layout, message: Message, index: int, form: Hashable
    ) -> None:
        if message.get("tools"):
            raise RendererError(f"messages[{index}]: tools are declared by the first message.")
        layout.frame(self._frames[message["role"]], index)
        layout.text(self._plain_text(message, index), SegmentKind.CONTENT, index)
        if form is _Form.ASKED:
            layout.text(self._effort, SegmentKind.FRAME, index)
        self._end_turn(layout, index)

    def _lay_out_tools(
        self, layout: Layout, tools: Sequence[ToolSpec], index: int, *, after_text: bool
    ) -> None:
        gap = "\n\n" if after_text else ""
        declared = "".join(_declaration(tool_declaration(tool)["function"]) for tool in tools)
        before = "# Tools\n\nYou have access to the following functions:\n\n<tools>"
        layout.text(gap + before + declared, SegmentKind.TOOL, index)
        self._lay_out_markup(layout, XML_CALL_INSTRUCTIONS, index)

    def _lay_out_assistant(
        self, layout: Layout, message: Message, index: int, form: Hashable
    ) -> None:
        reasoning, text = split_reasoning(message)
        has_calls = bool(message.get("tool_calls") or message.get("unparsed_tool_calls"))
        has_reasoning = bool(reasoning.strip()) and not self.disables_thinking
        if form is _Form.SAMPLED or (has_reasoning and form is _Form.KEPT):
            gap = "" if self.is_ultra else "\n"
            block = (reasoning if has_reasoning else "") + gap
        else:
            gap = "\n" if has_reasoning and not self.is_ultra else ""
            block = None
        text = gap + text
        if block is None and has_calls and form is _Form.DROPPED and not self.is_ultra:
            text = text.strip()
        keeps_end = self.is_ultra and form is _Form.DROPPED and has_calls
        layout.frame(self._frames["assistant"], index)
        self._lay_out_block(layout, block, index)
        text = text if keeps_end else text.rstrip()
        layout.text(text, SegmentKind.CONTENT, index, sampled=True)
        self._lay_out_calls(layout, message, index, after_text=True)
        self._end_turn(layout, index, sampled=True)

    def _lay_out_block(self, layout: Layout, block: str | None, index: int) -> None:
        """Append the think block; the part that the generation prompt writes is FRAME."""
        if block is None:
            layout.ids(self._empty_block, SegmentKind.FRAME, index)
            return
        layout.ids(self._opening, SegmentKind.FRAME, index)
        layout.text(block, SegmentKind.THINK, index, sampled=True)
        layout.ids((self._think_end,), SegmentKind.THINK, index, sampled=True)

    def _lay_out_calls(
        self,
        layout: Layout,
        message: Message,
        index: int,
        *,
        after_text: bool,
        sampled: bool = True,
    ) -> None:
        super()._lay_out_calls(layout, message, index, after_text=after_text, sampled=sampled)
        if message.get("tool_calls") or message.get("unparsed_tool_calls"):
            layout.text("\n", SegmentKind.TOOL, index, sampled=sampled)

    def _call_text(self, call: CallLike) -> str:
        return xml_call_text(call, PYTHON_WORDS)

    def _lay_out_tool_result(self, layout: Layout, messages: Sequence[Message], index: int) -> None:
        """Append a tool result; consecutive results share one user message."""
        if index == 0 or messages[index - 1]["role"] != "tool":
            layout.frame(self._frames["user"], index)
        self._marker(layout, "<tool_response>", index)
        text = self._plain_text(messages[index], index)
        layout.text(f"\n{text}\n", SegmentKind.TOOL, index)
        self._marker(layout, "</tool_response>", index)
        layout.text("\n", SegmentKind.TOOL, index)
        if index == len(messages) - 1 or messages[index + 1]["role"] != "tool":
            self._end_turn(layout, index)

    # ---- replies ----

    def fit_tool_calls(self, message: Message, tools: Sequence[ToolSpec]) -> Message:
        return fit_calls(message, tools, PYTHON_WORDS)

    def grammar(self) -> Grammar:
        return replace(
            super().grammar(),
            think=(self._think, self._think_end),
            starts_in_thinking=not self.disables_thinking,
            think_newlines=(1, 0, 0) if self.is_ultra else (1, 1, 1),
            newlines_before_call=1,
            calls_on_lines=True,
            newlines_after_call=1,
            parse_call=partial(parse_xml_call, words=PYTHON_WORDS),
        )


class Nemotron3PreserveThinkingRenderer(Nemotron3Renderer):
    """`nemotron3_preserve_thinking`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, strip_thinking_from_history=False)


class Nemotron3LowThinkingRenderer(Nemotron3Renderer):
    """`nemotron3_low_thinking`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, effort="low")


class Nemotron3DisableThinkingRenderer(Nemotron3Renderer):
    """`nemotron3_disable_thinking`."""

    def __init__(self, tokenizer: Tokenizer, *, is_ultra: bool = False) -> None:
        Nemotron3Renderer.__init__(self, tokenizer, thinking="disabled", is_ultra=is_ultra)


class Nemotron3UltraRenderer(Nemotron3Renderer):
    """`nemotron3_ultra`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_processor: None = None,
        *,
        strip_thinking_from_history: bool = True,
        effort: str | None = None,
    ) -> None:
        Nemotron3Renderer.__init__(
            self,
            tokenizer,
            image_processor,
            strip_thinking_from_history=strip_thinking_from_history,
            is_ultra=True,
            effort=effort,
        )


class Nemotron3UltraPreserveThinkingRenderer(Nemotron3UltraRenderer):
    """`nemotron3_ultra_preserve_thinking`."""

    def __init__(self, tokenizer: Tokenizer, image_processor: None = None) -> None:
        super().__init__(tokenizer, image_processor, strip_thinking_from_history=False)


class Nemotron3UltraMediumThinkingRenderer(Nemotron3UltraRenderer):
    """`nemotron3_ultra_medium_thinking`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, effort="efficient")


class Nemotron3UltraDisableThinkingRenderer(
    Nemotron3UltraRenderer, Nemotron3DisableThinkingRenderer
):
    """`nemotron3_ultra_disable_thinking`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        Nemotron3DisableThinkingRenderer.__init__(self, tokenizer, is_ultra=True)


def _declaration(function: ToolSpec) -> str:
    """Return one tool in the XML of the system block."""
    parameters = function.get("parameters") or {}
    lines = ["", "<function>", f"<name>{function['name']}</name>"]
    if "description" in function:
        lines.append(f"<description>{function['description'].strip()}</description>")
    lines.append("<parameters>")
    for name, schema in (parameters.get("properties") or {}).items():
        lines += ["<parameter>", f"<name>{name}</name>", *_schema(schema), "</parameter>"]
    lines += _others(parameters, ("type", "properties", "required"))
    if "required" in parameters:
        lines.append(f"<required>{json_text(parameters['required'])}</required>")
    lines.append("</parameters>")
    lines += _others(function, ("type", "name", "description", "parameters"))
    return "\n".join([*lines, "</function>"])


def _schema(schema: JsonSchema) -> list[str]:
    lines = []
    if "type" in schema:
        lines.append(f"<type>{schema['type']}</type>")
    if "description" in schema:
        lines.append(f"<description>{schema['description'].strip()}</description>")
    if "enum" in schema:
        lines.append(f"<enum>{json_text(schema['enum'])}</enum>")
    return lines + _others(schema, ("name", "type", "description", "enum"))


def _others(mapping: JsonSchema, known: Sequence[str]) -> list[str]:
    """Return the other members, as tags."""
    return [
        f"<{key}>{json_text(value) if isinstance(value, dict | list | tuple) else value}</{key}>"
        for key, value in mapping.items()
        if key not in known
    ]


RENDERERS = [
    NamedRenderer(
        "nemotron3",
        lambda tokenizer, _: Nemotron3Renderer(tokenizer),
        "Nemotron 3 Nano, Super, 3.5 Lightning",
        "a system block always; thinking; tools in XML",
    ),
    NamedRenderer(
        "nemotron3_disable_thinking",
        lambda tokenizer, _: Nemotron3DisableThinkingRenderer(tokenizer),
        "Nemotron 3 Nano, Super, 3.5 Lightning",
        "no thinking",
    ),
    NamedRenderer(
        "nemotron3_preserve_thinking",
        lambda tokenizer, _: Nemotron3PreserveThinkingRenderer(tokenizer),
        "Nemotron 3 Nano, Super, 3.5 Lightning",
        "old reasoning is kept",
    ),
    NamedRenderer(
        "nemotron3_low_thinking",
        lambda tokenizer, _: Nemotron3LowThinkingRenderer(tokenizer),
        "Nemotron 3 Super",
        "low effort",
    ),
    NamedRenderer(
        "nemotron3_ultra",
        lambda tokenizer, _: Nemotron3UltraRenderer(tokenizer),
        "Nemotron 3 Ultra",
        "a system block always; thinking; tools in XML",
    ),
    NamedRenderer(
        "nemotron3_ultra_disable_thinking",
        lambda tokenizer, _: Nemotron3UltraDisableThinkingRenderer(tokenizer),
        "Nemotron 3 Ultra",
        "no thinking",
    ),
    NamedRenderer(
        "nemotron3_ultra_medium_thinking",
        lambda tokenizer, _: Nemotron3UltraMediumThinkingRenderer(tokenizer),
        "Nemotron 3 Ultra",
        "medium effort",
    ),
    NamedRenderer(
        "nemotron3_ultra_preserve_thinking",
        lambda tokenizer, _: Nemotron3UltraPreserveThinkingRenderer(tokenizer),
        "Nemotron 3 Ultra",
        "old reasoning is kept",
    ),
]
