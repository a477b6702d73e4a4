"""DeepSeek V4: `<｜User｜>` text `<｜Assistant｜>` text `<｜end▁of▁sentence｜>`.

| renderer                              | a prompt ends in         | reasoning in history     |
|---------------------------------------|--------------------------|--------------------------|
| `deepseekv4`, `_disable_thinking`     | `<｜Assistant｜></think>` | dropped                  |
| `deepseekv4_thinking`                 | `<｜Assistant｜><think>`  | dropped, kept with tools |
| `deepseekv4_high_reasoning`, `_max_`  | same, the effort first   | same                     |
| `deepseekv4_preserve_thinking`        | same                     | kept                     |

System messages come first, without a marker, followed by the tool declarations. Consecutive
messages of users, developers and tools share one marker, with a blank line between them; a result
is inside `<tool_result>`. Calls are written as in notations/dsml.py. A conversation with tools or
results keeps its reasoning, so it trains in one example.

The reference is the community's template, because the model ships an encoder in Python instead.
Deliberate differences from it:
 1. Typed control tokens stay text; `｜DSML｜` is one of them, so no text can forge a call.
 2. A system message after another role is refused: the template moves it to the front of the
    conversation, which rewrites prompts that were already answered.
 3. Numbers, lists and objects in arguments given as JSON text are not changed.
 4. Reasoning in a trained reply without thinking is refused; the template drops it.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Literal

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.base import NamedRenderer, Renderer
from tinker_cookbook.renderers.content import refuse_trained_thinking, split_reasoning
from tinker_cookbook.renderers.layout import Layout, SegmentKind
from tinker_cookbook.renderers.notations.dsml import DSML, DsmlParser, calls_text
from tinker_cookbook.renderers.parsing import Grammar, ReplyParser
from tinker_cookbook.renderers.tool_calls import json_text, tool_declaration
from tinker_cookbook.renderers.types import Message, Role, ToolSpec
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["RENDERERS", "DeepSeekV4Renderer"]

_TOOLS_BEFORE = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by \
writing a "<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, \
booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside \
<think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
_TOOLS_AFTER = (
    "\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool "
    "calls.\n"
)
_EFFORTS = {
    "high": "Reasoning Effort: Absolute maximum with no shortcuts permitted.\nYou MUST be very "
    "thorough in your thinking and comprehensively decompose the problem to resolve the root "
    "cause, rigorously stress-testing your logic against all potential paths, edge cases, and "
    "adversarial scenarios.\nExplicitly write out your entire deliberation process, documenting "
    "every intermediate step, considered alternative, and rejected hypothesis to ensure absolutely "
    "no assumption is left unchecked.\n\n",
    "max": "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\nYou "
    "MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: "
    "exhaustively decompose the problem into its most fundamental components, trace every causal "
    "chain to its root, and resolve the underlying cause rather than any surface symptom.\nDo not "
    "stop reasoning until you have independently verified the solution from multiple angles and "
    "are certain that no assumption remains unchecked and no error remains undiscovered.\n\n",
}
_MARKER = re.compile(f"({DSML}|</?think>)")
_ASKING = ("user", "developer", "tool")


class DeepSeekV4Renderer(Renderer):
    """DeepSeek V4."""

    roles = ("system", "developer", "user", "assistant", "tool")
    takes_text_arguments = False
    writes_tools = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        strip_thinking_from_history: bool = True,
        *,
        thinking: Literal["opened", "disabled"] = "opened",
        effort: Literal["high", "max"] | None = None,
    ) -> None:
        """Prepare the format.

        Args:
            tokenizer: DeepSeek V4's.
            strip_thinking_from_history: drop the reasoning of replies before the last question, in
                conversations without tools. False keeps it, so that prompts extend.
            thinking: whether the prompt opens the think block or closes it.
            effort: reasoning effort, written before everything else if thinking is on.
        """
        super().__init__(tokenizer)
        if effort is not None and effort not in _EFFORTS:
            raise RendererError(
                f"effort={effort!r} is unknown; use one of {', '.join(_EFFORTS)}, or None."
            )
        self.strip_thinking_from_history = strip_thinking_from_history
        self.disables_thinking = thinking == "disabled"
        self._effort = "" if effort is None or self.disables_thinking else _EFFORTS[effort]
        self.bos_ids = (self.control_token("<｜begin▁of▁sentence｜>"),)
        self._eos = self.control_token("<｜end▁of▁sentence｜>")
        self._user = (self.control_token("<｜User｜>"),)
        self._assistant = (self.control_token("<｜Assistant｜>"),)
        self._markers = {n: (self.control_token(n),) for n in (DSML, "<think>", "</think>")}
        self._think, self._think_end = self._markers["<think>"], self._markers["</think>"]

    @property
    def has_extension_property(self) -> bool:
        return self.disables_thinking or not self.strip_thinking_from_history

    def turn_forms(self, messages: Sequence[Message]) -> Sequence[Hashable]:
        """Return whether each reply is written with its reasoning."""
        if self.disables_thinking:
            return [False] * len(messages)
        keeps_all = not self.strip_thinking_from_history or any(
            message["role"] == "tool" or message.get("tools") for message in messages
        )
        asking = [i for i, message in enumerate(messages) if message["role"] in _ASKING]
        first_kept = -1 if keeps_all or not asking else asking[-1]
        return [i > first_kept and m["role"] == "assistant" for i, m in enumerate(messages)]

    def trains_in_one(self, messages: Sequence[Message], trained: Sequence[int]) -> bool:
        return self.rewritten_turn(messages, trained) is None

    def check_trained_turn(self, messages: Sequence[Message], index: int) -> None:
        if self.disables_thinking:
            refuse_trained_thinking(split_reasoning(messages[index])[0], index)

    # ---- layout ----

    def lay_out(
        self, layout: Layout, messages: Sequence[Message], forms: Sequence[Hashable]
    ) -> None:
        layout.ids(self.bos_ids, SegmentKind.FRAME, -1)
        layout.text(self._effort, SegmentKind.FRAME, -1)
        num_system = next((i for i, m in enumerate(messages) if m["role"] != "system"), None)
        num_system = len(messages) if num_system is None else num_system
        self._lay_out_system(layout, messages[:num_system])
        for index in range(num_system, len(messages)):
            message = messages[index]
            if message["role"] == "system":
                raise RendererError(
                    f"messages[{index}]: a system message must come before all others in this "
                    "format, which writes it at the very start; move it there, or into a user "
                    "message."
                )
            if message["role"] == "assistant":
                self._lay_out_reply(layout, message, index, has_reasoning=bool(forms[index]))
            else:
                self._lay_out_question(layout, messages, index)

    def _lay_out_system(self, layout: Layout, messages: Sequence[Message]) -> None:
        for index, message in enumerate(messages):
            gap = "\n\n" if index else ""
            layout.text(gap, SegmentKind.FRAME, index)
            layout.text(_plain_text(message, index), SegmentKind.CONTENT, index)
        has_text = len(messages) > 1 or any(_plain_text(m, 0) for m in messages)
        for index, message in enumerate(messages):
            tools = message.get("tools")
            if tools:
                layout.text("\n\n" if has_text else "", SegmentKind.TOOL, index)
                self._lay_out_tools(layout, tools, index)

    def _lay_out_tools(self, layout: Layout, tools: Sequence[ToolSpec], index: int) -> None:
        self._markup(layout, _MARKER.split(_TOOLS_BEFORE), index)
        declared = (json_text(tool_declaration(tool)["function"]) + "\n" for tool in tools)
        layout.text("".join(declared) + _TOOLS_AFTER, SegmentKind.TOOL, index)

    def _markup(
        self, layout: Layout, pieces: Sequence[str], index: int, *, sampled: bool = False
    ) -> None:
        """Append a text that the format supplies; markers in it become tokens."""
        for piece in pieces:
            token = self._markers.get(piece)
            if token is None:
                layout.text(piece, SegmentKind.TOOL, index, sampled=sampled)
            else:
                layout.ids(token, SegmentKind.TOOL, index, sampled=sampled)

    def _open_question(self, layout: Layout, messages: Sequence[Message], index: int) -> None:
        """Append what precedes a message to the model."""
        if index and messages[index - 1]["role"] in _ASKING:
            layout.text("\n\n", SegmentKind.FRAME, index)
        else:
            layout.ids(self._user, SegmentKind.FRAME, index)

    def _lay_out_question(self, layout: Layout, messages: Sequence[Message], index: int) -> None:
        self._open_question(layout, messages, index)
        text = _plain_text(messages[index], index)
        if messages[index]["role"] == "tool":
            layout.text(f"<tool_result>{text}</tool_result>", SegmentKind.TOOL, index)
        else:
            layout.text(text, SegmentKind.CONTENT, index)

    def _lay_out_reply(
        self, layout: Layout, message: Message, index: int, *, has_reasoning: bool
    ) -> None:
        reasoning, text = split_reasoning(message)
        sampled = has_reasoning or self.disables_thinking
        layout.ids(self._assistant, SegmentKind.FRAME, index)
        if has_reasoning:
            layout.ids(self._think, SegmentKind.FRAME, index)
            layout.text(reasoning, SegmentKind.THINK, index, sampled=True)
            layout.ids(self._think_end, SegmentKind.THINK, index, sampled=True)
        else:
            layout.ids(self._think_end, SegmentKind.FRAME, index)
        layout.text(text, SegmentKind.CONTENT, index, sampled=sampled)
        calls = calls_text(
            message.get("tool_calls") or (), message.get("unparsed_tool_calls") or ()
        )
        for number, piece in enumerate(calls):
            if number:
                layout.ids(self._markers[DSML], SegmentKind.TOOL, index, sampled=sampled)
            layout.text(piece, SegmentKind.TOOL, index, sampled=sampled)
        layout.ids((self._eos,), SegmentKind.STOP, index, sampled=sampled)

    def open_turn(self, layout: Layout, messages: Sequence[Message], role: Role) -> None:
        index = len(messages)
        if role == "assistant":
            layout.ids(self._assistant, SegmentKind.FRAME, index)
            layout.ids(
                self._think_end if self.disables_thinking else self._think, SegmentKind.FRAME, index
            )
        elif role in _ASKING:
            self._open_question(layout, messages, index)
            layout.text("<tool_result>" if role == "tool" else "", SegmentKind.FRAME, index)

    # ---- replies ----

    def get_stop_sequences(self) -> list[int]:
        return [self._eos]

    def grammar(self) -> Grammar:
        (think,), (think_end,) = self._think, self._think_end
        return Grammar(
            stop=frozenset([self._eos]),
            think=None if self.disables_thinking else (think, think_end),
            starts_in_thinking=not self.disables_thinking,
            think_newlines=(0, 0, 0),
            call_marks=frozenset(self._markers[DSML]),
        )

    def response_parser(self) -> ReplyParser:
        (think,), (think_end,) = self._think, self._think_end
        return DsmlParser(
            self.encoder,
            stop=self._eos,
            dsml=self._markers[DSML][0],
            think=None if self.disables_thinking else (think, think_end),
            starts_in_thinking=not self.disables_thinking,
        )


def _plain_text(message: Message, index: int) -> str:
    reasoning, text = split_reasoning(message)
    if reasoning or message.get("tool_calls"):
        raise RendererError(
            f"messages[{index}]: only the assistant thinks and makes tool_calls; role is "
            f"{message['role']!r}."
        )
    if message.get("tools") and message["role"] != "system":
        raise RendererError(f"messages[{index}]: tools are declared by a system message.")
    return text


RENDERERS = [
    NamedRenderer(
        "deepseekv4",
        lambda tokenizer, _: DeepSeekV4Renderer(tokenizer, thinking="disabled"),
        "DeepSeek V4",
        "the prompt closes the think block; tools",
    ),
    NamedRenderer(
        "deepseekv4_disable_thinking",
        lambda tokenizer, _: DeepSeekV4Renderer(tokenizer, thinking="disabled"),
        "DeepSeek V4",
        "same as `deepseekv4`",
    ),
    NamedRenderer(
        "deepseekv4_thinking",
        lambda tokenizer, _: DeepSeekV4Renderer(tokenizer),
        "DeepSeek V4",
        "thinking; tools",
    ),
    NamedRenderer(
        "deepseekv4_high_reasoning",
        lambda tokenizer, _: DeepSeekV4Renderer(tokenizer, effort="high"),
        "DeepSeek V4",
        "thinking, effort `high` before everything; tools",
    ),
    NamedRenderer(
        "deepseekv4_max_reasoning",
        lambda tokenizer, _: DeepSeekV4Renderer(tokenizer, effort="max"),
        "DeepSeek V4",
        "thinking, effort `max` before everything; tools",
    ),
    NamedRenderer(
        "deepseekv4_preserve_thinking",
        lambda tokenizer, _: DeepSeekV4Renderer(tokenizer, False),
        "DeepSeek V4",
        "old reasoning is kept without tools as well",
    ),
]
