"""GLM 4.5 to 4.7: role tokens, `<think>` ... `</think>`, tool calls with a token per key and value.

| renderer                   | models           | prompt ends in                    | reasoning |
|----------------------------|------------------|-----------------------------------|-----------|
| `glm4_5`                   | GLM-4.5, GLM-4.6 | `<|assistant|>`                   | last turn |
| `glm4_5_disable_thinking`  | GLM-4.5, GLM-4.6 | `<|assistant|>\\n<think></think>` | none      |
| `glm4_7`                   | GLM-4.7          | `<|assistant|><think>`            | last turn |
| `glm4_7_disable_thinking`  | GLM-4.7          | `<|assistant|></think>`           | none      |
| `glm4_7_preserve_thinking` | GLM-4.7          | `<|assistant|><think>`            | all turns |

GLM has no token that ends a turn: a reply ends with the token that opens the next one, `<|user|>`,
or `<|observation|>` after tool calls. That token is trained with the reply. 4.5 writes line breaks
between the parts of a message, 4.7 does not. White space around replies and reasoning is dropped.

Deliberate differences from the templates:
 1. Typed control tokens stay text, including `/nothink`.
 2. A conversation that ends in a reply includes the token that ends the reply.
 3. If neither of the two follows a reply (another reply does, say), that token is written first;
    the templates write nothing there.
 4. GLM-4.7: a reply without reasoning after the last user message is `<think></think>` and text,
    as it is sampled after the prompt's `<think>`. The template omits `<think>`.
 5. With thinking disabled, reasoning in history is dropped and a trained reply with reasoning is
    refused. The templates keep it within a run of tool calls.
 6. Numbers, lists and objects in arguments given as JSON text are not changed.
 7. Reasoning must be a thinking part; the templates also cut strings at `</think>`.
 8. With tools, an empty system message counts as none.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.base import NamedRenderer, Renderer
from tinker_cookbook.renderers.content import refuse_trained_thinking, split_reasoning
from tinker_cookbook.renderers.layout import Layout, SegmentKind
from tinker_cookbook.renderers.notations.xml import fit_calls, value_text
from tinker_cookbook.renderers.parsing import Grammar
from tinker_cookbook.renderers.tool_calls import (
    as_tool_call,
    call_name_and_arguments,
    json_text,
    member_texts,
    tool_declaration,
)
from tinker_cookbook.renderers.train_on_what import last_user_index
from tinker_cookbook.renderers.types import Message, Role, ToolCall, ToolSpec, UnparsedToolCall
from tinker_cookbook.replies.pair_calls import PAIR_MARKS, read_pair_call
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["RENDERERS", "GlmRenderer"]

_TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_TOOLS_AFTER = (
    "</tools>\n\nFor each function call, output the function name and arguments within the "
    "following XML format:\n"
)


class GlmRenderer(Renderer):
    """GLM 4.5 and later."""

    takes_text_arguments = False
    writes_tools = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        thinking: Literal["enabled", "disabled"] = "enabled",
        strip_thinking_from_history: bool = True,
        opens_think: bool = False,
    ) -> None:
        """Prepare the format.

        Args:
            tokenizer: must have GLM's control tokens.
            thinking: whether replies have reasoning.
            strip_thinking_from_history: drop the reasoning before the last user message.
            opens_think: write as GLM-4.7: no line breaks, and the prompt opens the think block.
        """
        super().__init__(tokenizer)
        self.disables_thinking = thinking == "disabled"
        self.strip_thinking_from_history = strip_thinking_from_history
        self._opens_think = opens_think
        self._gap = "" if opens_think else "\n"
        token = self.control_token
        self.bos_ids = (token("[gMASK]"), token("<sop>"))
        self._openings = {
            "system": token("<|system|>"),
            "user": token("<|user|>"),
            "assistant": token("<|assistant|>"),
            "tool": token("<|observation|>"),
        }
        self._think, self._think_end = token("<think>"), token("</think>")
        self._call = token("<tool_call>"), token("</tool_call>")
        self._result = token("<tool_response>"), token("</tool_response>")
        self._marks = {mark: token(mark) for mark in PAIR_MARKS}
        self._no_think = self.encoder.control_id("/nothink")
        self._frames = {r: self.build_frame([t], self._gap) for r, t in self._openings.items()}
        self._tails = {role: self.build_frame([], self._gap) for role in self._openings}
        self._newline = tuple(self.encoder.encode_batch(["\n"])[0])

    @property
    def has_extension_property(self) -> bool:
        return self.disables_thinking or not self.strip_thinking_from_history

    # ---- layout ----

    def turn_forms(self, messages: Sequence[Message]) -> Sequence[Hashable]:
        """Return whether each reply is written with its reasoning."""
        query = last_user_index(messages) if self.strip_thinking_from_history else -1
        return [
            message["role"] == "assistant" and index > query and self._shows_block(message)
            for index, message in enumerate(messages)
        ]

    def _shows_block(self, message: Message) -> bool:
        """Whether dropping the reasoning changes how the reply is written."""
        if self.disables_thinking:
            return False
        return self._opens_think or bool(split_reasoning(message)[0].strip())

    def check_trained_turn(self, messages: Sequence[Message], index: int) -> None:
        if self.disables_thinking:
            refuse_trained_thinking(split_reasoning(messages[index])[0].strip(), index)

    def lay_out(
        self, layout: Layout, messages: Sequence[Message], forms: Sequence[Hashable]
    ) -> None:
        layout.ids(self.bos_ids, SegmentKind.FRAME, -1)
        for index, message in enumerate(messages):
            role = message["role"]
            if role == "assistant":
                self._lay_out_reply(layout, messages, index, shows_block=bool(forms[index]))
            elif role == "tool":
                self._lay_out_result(layout, messages, index)
            else:
                self._lay_out_plain(layout, messages, index)

    def _open(self, layout: Layout, messages: Sequence[Message], index: int, role: Role) -> None:
        """Append the opening of a message, without a token that the previous reply ended with."""
        if not self._is_open(messages, index, role):
            layout.frame(self._frames[role], index)
        elif self._gap:
            layout.frame(self._tails[role], index)

    def _is_open(self, messages: Sequence[Message], index: int, role: Role) -> bool:
        """Whether the previous reply ended with the token that opens this message."""
        if not index or messages[index - 1]["role"] != "assistant":
            return False
        return self._end_of(messages[index - 1]) == self._openings[role]

    def _end_of(self, message: Message) -> int:
        """Return the token that ends this reply: the one that opens the next message."""
        has_calls = message.get("tool_calls") or message.get("unparsed_tool_calls")
        return self._openings["tool" if has_calls else "user"]

    def _lay_out_plain(self, layout: Layout, messages: Sequence[Message], index: int) -> None:
        message = messages[index]
        reasoning, text = split_reasoning(message)
        if reasoning or message.get("tool_calls"):
            raise RendererError(
                f"messages[{index}]: only the assistant can think and make tool_calls."
            )
        tools = message.get("tools")
        if tools:
            self._lay_out_tools(layout, tools, index)
            if not text:
                return
        self._open(layout, messages, index, message["role"])
        layout.text(text, SegmentKind.CONTENT, index)
        if self.disables_thinking and message["role"] == "user" and not self._opens_think:
            no_think = () if self._no_think is None else (self._no_think,)
            layout.ids(no_think, SegmentKind.FRAME, index)

    def _lay_out_tools(self, layout: Layout, tools: Sequence[ToolSpec], index: int) -> None:
        if index:
            raise RendererError(
                f"messages[{index}]: tools are declared by the first message only in this format."
            )
        declarations = "".join(json_text(tool_declaration(tool)) + "\n" for tool in tools)
        layout.ids((self._openings["system"],), SegmentKind.FRAME, index)
        text = f"\n{_TOOLS_BEFORE}{declarations}{_TOOLS_AFTER}"
        layout.text(text, SegmentKind.TOOL, index)
        example = [self._pair(f"{{arg-key-{n}}}", f"{{arg-value-{n}}}") for n in (1, 2)]
        self._lay_out_call(layout, "{function-name}", [*example, ["..." + self._gap]], index)

    def _lay_out_result(self, layout: Layout, messages: Sequence[Message], index: int) -> None:
        """Append a tool result; consecutive results share one opening."""
        text = split_reasoning(messages[index])[1]
        is_first = index == 0 or messages[index - 1]["role"] != "tool"
        if is_first and not self._is_open(messages, index, "tool"):
            layout.ids((self._openings["tool"],), SegmentKind.FRAME, index)
        layout.text(self._gap, SegmentKind.TOOL, index)
        layout.ids((self._result[0],), SegmentKind.TOOL, index)
        layout.text(f"{self._gap}{text}{self._gap}", SegmentKind.TOOL, index)
        layout.ids((self._result[1],), SegmentKind.TOOL, index)

    def _lay_out_reply(
        self, layout: Layout, messages: Sequence[Message], index: int, *, shows_block: bool
    ) -> None:
        message = messages[index]
        reasoning, text = (part.strip() for part in split_reasoning(message))
        layout.ids((self._openings["assistant"],), SegmentKind.FRAME, index)
        self._lay_out_thinking(layout, reasoning if shows_block else "", index, shows_block)
        layout.text(self._gap + text if text else "", SegmentKind.CONTENT, index, sampled=True)
        for call in message.get("tool_calls") or ():
            name, arguments = call_name_and_arguments(call)
            pairs = [self._pair(k, value_text(v, {})) for k, v in member_texts(arguments)]
            layout.text(self._gap, SegmentKind.TOOL, index, sampled=True)
            self._lay_out_call(layout, name, pairs, index, sampled=True)
        for call in message.get("unparsed_tool_calls") or ():
            layout.text(self._gap, SegmentKind.TOOL, index, sampled=True)
            tokens = self.encoder.encode_markup(call.raw_text)
            layout.ids(tokens, SegmentKind.TOOL, index, sampled=True)
        layout.ids((self._end_of(message),), SegmentKind.STOP, index, sampled=True)

    def _lay_out_thinking(
        self, layout: Layout, reasoning: str, index: int, shows_block: bool
    ) -> None:
        """Append the think block; the part that the generation prompt writes is FRAME."""
        if self.disables_thinking:
            layout.ids(self._prompt_tail(), SegmentKind.FRAME, index)
            return
        if self._opens_think:
            if shows_block:
                layout.ids((self._think,), SegmentKind.FRAME, index)
        else:
            layout.text("\n", SegmentKind.THINK, index, sampled=True)
            layout.ids((self._think,), SegmentKind.THINK, index, sampled=True)
        layout.text(reasoning, SegmentKind.THINK, index, sampled=True)
        layout.ids((self._think_end,), SegmentKind.THINK, index, sampled=True)

    def _prompt_tail(self) -> tuple[int, ...]:
        """Return the part of the think block that the generation prompt writes."""
        if self._opens_think:
            return (self._think_end,) if self.disables_thinking else (self._think,)
        return (*self._newline, self._think, self._think_end) if self.disables_thinking else ()

    def _pair(self, key: str, value: str) -> list[str | int]:
        start, end, value_start, value_end = self._marks.values()
        return [start, key, end, self._gap, value_start, value, value_end, self._gap]

    def _lay_out_call(
        self,
        layout: Layout,
        name: str,
        arguments: Sequence[Sequence[str | int]],
        index: int,
        *,
        sampled: bool = False,
    ) -> None:
        pieces = [self._call[0], name + self._gap]
        for piece in [*pieces, *(p for pair in arguments for p in pair), self._call[1]]:
            if isinstance(piece, str):
                layout.text(piece, SegmentKind.TOOL, index, sampled=sampled)
            else:
                layout.ids((piece,), SegmentKind.TOOL, index, sampled=sampled)

    def open_turn(self, layout: Layout, messages: Sequence[Message], role: Role) -> None:
        if role != "assistant":
            self._open(layout, messages, len(messages), role)
            return
        tokens = (self._openings[role], *self._prompt_tail())
        layout.ids(tokens, SegmentKind.FRAME, len(messages))

    # ---- replies ----

    def fit_tool_calls(self, message: Message, tools: Sequence[ToolSpec]) -> Message:
        return fit_calls(message, tools, {})

    def get_stop_sequences(self) -> list[int]:
        return [self._openings["user"], self._openings["tool"]]

    def grammar(self) -> Grammar:
        document_end = self.encoder.control_id("<|endoftext|>")
        return Grammar(
            stop=frozenset(self.get_stop_sequences()),
            eos=frozenset() if document_end is None else frozenset([document_end]),
            think=(self._think, self._think_end),
            starts_in_thinking=self._opens_think and not self.disables_thinking,
            call=self._call,
            parse_call=self._parse_call,
            call_marks=frozenset(self._marks.values()),
            newlines_before_call=len(self._gap),
            newlines_at_start=len(self._gap),
        )

    def _parse_call(
        self, parts: Sequence[str | int], raw_text: str
    ) -> Sequence[ToolCall | UnparsedToolCall]:
        """Parse one call; its marks are token ids."""
        return [as_tool_call(read_pair_call(parts, raw_text, list(self._marks.values())))]


RENDERERS = [
    NamedRenderer(
        "glm4_5",
        lambda tokenizer, _: GlmRenderer(tokenizer),
        "GLM-4.5, GLM-4.6",
        "a reply ends with the token that opens the next message; tools",
    ),
    NamedRenderer(
        "glm4_5_disable_thinking",
        lambda tokenizer, _: GlmRenderer(tokenizer, thinking="disabled"),
        "GLM-4.5, GLM-4.6",
        "the prompt holds an empty think block; tools",
    ),
    NamedRenderer(
        "glm4_7",
        lambda tokenizer, _: GlmRenderer(tokenizer, opens_think=True),
        "GLM-4.7",
        "the prompt opens the think block; tools",
    ),
    NamedRenderer(
        "glm4_7_disable_thinking",
        lambda tokenizer, _: GlmRenderer(tokenizer, thinking="disabled", opens_think=True),
        "GLM-4.7",
        "the prompt closes the think block; tools",
    ),
    NamedRenderer(
        "glm4_7_preserve_thinking",
        lambda tokenizer, _: GlmRenderer(
            tokenizer, strip_thinking_from_history=False, opens_think=True
        ),
        "GLM-4.7",
        "old reasoning is kept; tools",
    ),
]
