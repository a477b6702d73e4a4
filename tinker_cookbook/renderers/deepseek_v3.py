"""DeepSeek V3, R1 and V3.1: `<｜User｜>` text `<｜Assistant｜>` text `<｜end▁of▁sentence｜>`.

| renderer                   | model       | a prompt ends in              | reasoning     |
|----------------------------|-------------|-------------------------------|---------------|
| `deepseekv3`               | V3.1        | `<｜Assistant｜></think>`       | refused       |
| `deepseekv3_thinking`      | V3.1        | `<｜Assistant｜><think>`        | sampled first |
| `deepseekv3_chat`          | V3, V3-0324 | `<｜Assistant｜>`               | refused       |
| `deepseek_r1`              | R1          | `<｜Assistant｜><think>`, `\\n` | sampled first |
| `deepseek_r1_0528`         | R1-0528     | `<｜Assistant｜>`               | sampled first |

`deepseekv3_disable_thinking` is another name for `deepseekv3`. R1-0528 writes `<think>` itself.

Text follows its marker directly. System messages come first, without a marker. A reply to a tool
result has no marker; in V3.1 only a reply to a user has one. Between two results V3 writes a line
break, the other models nothing. Old reasoning is dropped, so prompts of thinking formats do not
extend each other, and each reply trains in one example.

Deliberate differences from the templates:
 1. Typed control tokens stay text, including `</think>`, at which the templates cut the text.
 2. Tools are declared in the words of V3.1's model card (V3 and R1: the same text around their own
    call notation); the templates omit tools.
 3. The reasoning of a trained reply is written as it is sampled; the templates drop all reasoning.
 4. A system message after another role is refused: the templates move it to the front of the
    conversation, which rewrites prompts that were already answered.
 5. V3 and R1: every turn of calls and every run of results is opened and closed. The templates do
    so once per conversation, and close results only before a text. V3's template closes a turn of
    calls at its second call, so never a turn with one call, and omits text next to calls.
 6. V3.1: a reply right after system text is encoded separately, as it is sampled.
 7. Formats whose prompt opens the think block cannot sample a reply after tool results, because the
    templates open nothing there. V3.1's model card says that it calls tools without thinking.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import ClassVar, Literal

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.base import NamedRenderer, Renderer
from tinker_cookbook.renderers.content import refuse_trained_thinking, split_reasoning
from tinker_cookbook.renderers.layout import Layout, SegmentKind
from tinker_cookbook.renderers.notations.marked import build_call, texts_between_marks
from tinker_cookbook.renderers.parsing import Grammar, ParsedCall
from tinker_cookbook.renderers.tool_calls import (
    call_name_and_arguments,
    json_text,
    tool_declaration,
)
from tinker_cookbook.renderers.types import Message, Role, ToolCall, ToolSpec, UnparsedToolCall
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = [
    "RENDERERS",
    "DeepSeekR1Renderer",
    "DeepSeekV3ChatRenderer",
    "DeepSeekV3DisableThinkingRenderer",
    "DeepSeekV3ThinkingRenderer",
]

_MARKERS = {
    "user": "<｜User｜>",
    "assistant": "<｜Assistant｜>",
    "calls": "<｜tool▁calls▁begin｜>",
    "calls_end": "<｜tool▁calls▁end｜>",
    "call": "<｜tool▁call▁begin｜>",
    "call_end": "<｜tool▁call▁end｜>",
    "sep": "<｜tool▁sep｜>",
    "outputs": "<｜tool▁outputs▁begin｜>",
    "outputs_end": "<｜tool▁outputs▁end｜>",
    "output": "<｜tool▁output▁begin｜>",
    "output_end": "<｜tool▁output▁end｜>",
}
_THINK_MARKERS = {"think": "<think>", "think_end": "</think>"}
_MARKER = re.compile("(<｜[^｜]*｜>)")
_TOOLS_BEFORE = "## Tools\nYou have access to the following tools:\n"
_TOOLS_AFTER = (
    "\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n{call}\n\nWhere:\n\n"
    "- `tool_call_name` must be an exact match to one of the available tools\n"
    "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters "
    "Schema\n"
    "- For multiple tool calls, chain them directly without separators or spaces\n"
)
_SAMPLED, _HISTORY = "sampled", "history"

Thinking = Literal["none", "opened", "written"]


class _DeepSeekRenderer(Renderer):
    """What all generations of the format have in common."""

    example_call: ClassVar[str]
    """The example of a call in the text that declares tools."""
    marks_outputs: ClassVar[bool] = False
    """Text around the results of one turn."""
    between_results: ClassVar[str] = ""
    has_think_markers: ClassVar[bool] = True
    """Whether the tokenizer has `<think>`: V3's has placeholders instead."""

    writes_tools = True

    def __init__(self, tokenizer: Tokenizer, *, thinking: Thinking) -> None:
        super().__init__(tokenizer)
        self.thinking = thinking
        self.disables_thinking = thinking == "none"
        self.bos_ids = (self.control_token("<｜begin▁of▁sentence｜>"),)
        self._eos_ids = (self.control_token("<｜end▁of▁sentence｜>"),)
        markers = _MARKERS | (_THINK_MARKERS if self.has_think_markers else {})
        self._ids = {key: (self.control_token(name),) for key, name in markers.items()}
        self._history_ids = self._sampled_ids = self._ids["assistant"]

    @property
    def has_extension_property(self) -> bool:
        return self.thinking == "none"

    def turn_forms(self, messages: Sequence[Message]) -> Sequence[Hashable]:
        """Return `sampled` for a last reply in a thinking format, `history` for others."""
        forms = [_HISTORY] * len(messages)
        if messages and self.thinking != "none" and self._can_think(messages, len(messages) - 1):
            forms[-1] = _SAMPLED
        return forms

    def prompt_forms(self, messages: Sequence[Message]) -> Sequence[Hashable]:
        return [_HISTORY] * len(messages)

    def _can_think(self, messages: Sequence[Message], index: int) -> bool:
        """Whether a reply at this index has a think block when it is sampled."""
        before = messages[index - 1]["role"] if index else None
        return self.thinking != "opened" or self._has_marker(before)

    def check_trained_turn(self, messages: Sequence[Message], index: int) -> None:
        if not self._can_think(messages, index):
            raise _no_thought_error(index)
        if self.disables_thinking:
            refuse_trained_thinking(split_reasoning(messages[index])[0], index)

    # ---- layout ----

    def lay_out(
        self, layout: Layout, messages: Sequence[Message], forms: Sequence[Hashable]
    ) -> None:
        layout.ids(self.bos_ids, SegmentKind.FRAME, -1)
        num_system = 0
        while num_system < len(messages) and messages[num_system]["role"] == "system":
            num_system += 1
        for index, message in enumerate(messages):
            role = message["role"]
            if role == "system":
                self._lay_out_system(layout, message, index, is_first=index < num_system)
            elif role == "user":
                layout.ids(self._ids["user"], SegmentKind.FRAME, index)
                layout.text(self._text(message, index), SegmentKind.CONTENT, index)
            elif role == "tool":
                self._lay_out_result(layout, messages, index)
            else:
                self._lay_out_reply(layout, messages, index, forms[index])

    def open_turn(self, layout: Layout, messages: Sequence[Message], role: Role) -> None:
        index = len(messages)
        if role == "user":
            layout.ids(self._ids["user"], SegmentKind.FRAME, index)
        elif role == "assistant":
            if messages and messages[-1]["role"] == "tool" and not self._can_think(messages, index):
                raise _no_thought_error(index)
            self._open_reply(layout, messages, index, self._sampled_ids)

    def _open_reply(
        self, layout: Layout, messages: Sequence[Message], index: int, marker: tuple[int, ...]
    ) -> None:
        """Append what precedes a reply."""
        if self._has_marker(messages[index - 1]["role"] if index else None):
            layout.ids(marker, SegmentKind.FRAME, index)

    def _has_marker(self, before: Role | None) -> bool:
        """Whether a reply after a message of this role has a marker."""
        raise NotImplementedError

    def _text(self, message: Message, index: int) -> str:
        reasoning, text = split_reasoning(message)
        if reasoning or message.get("tool_calls"):
            raise RendererError(
                f"messages[{index}]: only the assistant thinks and makes tool_calls; role is "
                f"{message['role']!r}."
            )
        return text

    def _lay_out_system(
        self, layout: Layout, message: Message, index: int, *, is_first: bool
    ) -> None:
        if not is_first:
            raise RendererError(
                f"messages[{index}]: a system message must come before all others in this format, "
                "which writes it at the very start; move it there, or into a user message."
            )
        if index:
            layout.text("\n\n", SegmentKind.FRAME, index)
        text = self._text(message, index)
        layout.text(text, SegmentKind.CONTENT, index)
        tools = message.get("tools")
        if tools:
            declared = "".join(map(_declaration, tools))
            words = ("\n\n" if text else "") + _TOOLS_BEFORE + declared
            layout.text(words, SegmentKind.TOOL, index)
            self._markup(layout, _TOOLS_AFTER.replace("{call}", self.example_call), index)

    def _markup(self, layout: Layout, text: str, index: int) -> None:
        """Append a text that the format supplies; markers in it become tokens."""
        for piece in _MARKER.split(text):
            token = self.encoder.control_id(piece) if _MARKER.fullmatch(piece) else None
            if token is None:
                layout.text(piece, SegmentKind.TOOL, index)
            else:
                layout.ids((token,), SegmentKind.TOOL, index)

    def _lay_out_result(self, layout: Layout, messages: Sequence[Message], index: int) -> None:
        is_first = index == 0 or messages[index - 1]["role"] != "tool"
        if self.marks_outputs and is_first:
            layout.ids(self._ids["outputs"], SegmentKind.TOOL, index)
        if not is_first:
            layout.text(self.between_results, SegmentKind.TOOL, index)
        layout.ids(self._ids["output"], SegmentKind.TOOL, index)
        layout.text(self._text(messages[index], index), SegmentKind.TOOL, index)
        layout.ids(self._ids["output_end"], SegmentKind.TOOL, index)
        is_last = index == len(messages) - 1 or messages[index + 1]["role"] != "tool"
        if self.marks_outputs and is_last:
            layout.ids(self._ids["outputs_end"], SegmentKind.TOOL, index)

    def _lay_out_reply(
        self, layout: Layout, messages: Sequence[Message], index: int, form: Hashable
    ) -> None:
        message = messages[index]
        reasoning, text = split_reasoning(message)
        opens_sampled = form == _SAMPLED
        marker = self._sampled_ids if opens_sampled else self._history_ids
        self._open_reply(layout, messages, index, marker)
        if opens_sampled:
            self._lay_out_thinking(layout, reasoning, index)
            text = self._text_after_thinking(text)
        layout.text(text, SegmentKind.CONTENT, index, sampled=True)
        self._lay_out_calls(layout, message, index)
        layout.ids(self._eos_ids, SegmentKind.STOP, index, sampled=True)

    def _text_after_thinking(self, text: str) -> str:
        return text

    def _lay_out_thinking(self, layout: Layout, reasoning: str, index: int) -> None:
        """Append the reasoning of a reply as it is sampled."""
        raise NotImplementedError

    # ---- calls ----

    def _lay_out_calls(self, layout: Layout, message: Message, index: int) -> None:
        calls = [self._call_parts(call) for call in message.get("tool_calls") or ()]
        for call in message.get("unparsed_tool_calls") or ():
            body = call.raw_text.removeprefix(_MARKERS["call"]).removesuffix(_MARKERS["call_end"])
            calls.append(body.split(_MARKERS["sep"]))
        if not calls:
            return
        layout.ids(self._ids["calls"], SegmentKind.TOOL, index, sampled=True)
        for number, parts in enumerate(calls):
            if number:
                layout.text(self._between_calls, SegmentKind.TOOL, index, sampled=True)
            layout.ids(self._ids["call"], SegmentKind.TOOL, index, sampled=True)
            for place, part in enumerate(parts):
                if place:
                    layout.ids(self._ids["sep"], SegmentKind.TOOL, index, sampled=True)
                layout.text(part, SegmentKind.TOOL, index, sampled=True)
            layout.ids(self._ids["call_end"], SegmentKind.TOOL, index, sampled=True)
        layout.ids(self._ids["calls_end"], SegmentKind.TOOL, index, sampled=True)

    _between_calls: ClassVar[str] = ""

    def _call_parts(self, call: ToolCall) -> list[str]:
        """Return the texts of a call, to be joined by the separator token."""
        raise NotImplementedError

    def _parse_call(self, parts: Sequence[str | int], raw_text: str) -> list[ParsedCall]:
        raise NotImplementedError

    # ---- replies ----

    def get_stop_sequences(self) -> list[int]:
        return list(self._eos_ids)

    _think_newlines: ClassVar[tuple[int, int, int]] = (0, 0, 0)

    def grammar(self) -> Grammar:
        ids = {key: token for key, (token,) in self._ids.items()}
        return Grammar(
            stop=frozenset(self._eos_ids),
            think=None if self.thinking == "none" else (ids["think"], ids["think_end"]),
            starts_in_thinking=self.thinking == "opened",
            think_newlines=self._think_newlines,
            call=(ids["call"], ids["call_end"]),
            call_section=(ids["calls"], ids["calls_end"]),
            call_marks=frozenset([ids["sep"]]),
            parse_call=self._parse_call,
            newlines_before_call=0,
            newlines_after_call=len(self._between_calls),
        )


class _V31Renderer(_DeepSeekRenderer):
    """V3.1: calls have a bare name and bare arguments; the reply's marker says whether the model
    thinks."""

    example_call = (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments"
        "<｜tool▁call▁end｜>{additional_tool_calls}<｜tool▁calls▁end｜>"
    )

    def __init__(self, tokenizer: Tokenizer, *, thinking: Thinking) -> None:
        super().__init__(tokenizer, thinking=thinking)
        self._history_ids = (*self._ids["assistant"], *self._ids["think_end"])
        opening = "think_end" if thinking == "none" else "think"
        self._sampled_ids = (*self._ids["assistant"], *self._ids[opening])

    def _has_marker(self, before: Role | None) -> bool:
        return before == "user"

    def _call_parts(self, call: ToolCall) -> list[str]:
        return list(call_name_and_arguments(call))

    def _parse_call(self, parts: Sequence[str | int], raw_text: str) -> list[ParsedCall]:
        texts = texts_between_marks(parts)
        if len(texts) != 2:
            error = f"expected a name, {_MARKERS['sep']} and arguments"
            return [UnparsedToolCall(raw_text=raw_text, error=error)]
        return [build_call(texts[0], texts[1], raw_text)]


class DeepSeekV3DisableThinkingRenderer(_V31Renderer):
    """V3.1 without thinking: the prompt closes the think block."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, thinking="none")


class DeepSeekV3ThinkingRenderer(_V31Renderer):
    """V3.1 with thinking: the prompt opens the think block."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, thinking="opened")

    def _lay_out_thinking(self, layout: Layout, reasoning: str, index: int) -> None:
        layout.text(reasoning, SegmentKind.THINK, index, sampled=True)
        layout.ids(self._ids["think_end"], SegmentKind.THINK, index, sampled=True)


class _V3Renderer(_DeepSeekRenderer):
    """V3 and R1: calls name their type and fence their arguments."""

    example_call = (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>tool_call_name\n```json\n"
        "tool_call_arguments\n```<｜tool▁call▁end｜>{additional_tool_calls}<｜tool▁calls▁end｜>"
    )
    marks_outputs = True
    _between_calls = "\n"

    def _has_marker(self, before: Role | None) -> bool:
        return before != "tool"

    def _call_parts(self, call: ToolCall) -> list[str]:
        name, arguments = call_name_and_arguments(call)
        return ["function", f"{name}\n```json\n{arguments}\n```"]

    def _parse_call(self, parts: Sequence[str | int], raw_text: str) -> list[ParsedCall]:
        texts = texts_between_marks(parts)
        found = _FENCED.fullmatch(texts[1]) if len(texts) == 2 else None
        if found is None or texts[0] != "function":
            error = f"expected function, {_MARKERS['sep']}, a name and arguments in a json fence"
            return [UnparsedToolCall(raw_text=raw_text, error=error)]
        return [build_call(found["name"], found["arguments"], raw_text)]


_FENCED = re.compile(r"(?P<name>[^\n]*)\n```json\n(?P<arguments>.*)\n```\n?", re.DOTALL)


class DeepSeekV3ChatRenderer(_V3Renderer):
    """V3 and V3-0324, without thinking."""

    between_results = "\n"
    has_think_markers = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, thinking="none")


class DeepSeekR1Renderer(_V3Renderer):
    """R1, which writes reasoning as `<think>`, newline, reasoning, newline, `</think>`, blank
    line."""

    _think_newlines = (1, 1, 2)

    def __init__(self, tokenizer: Tokenizer, *, opens_thinking: bool = True) -> None:
        """Prepare the markers.

        Args:
            tokenizer: DeepSeek's.
            opens_thinking: whether the prompt writes `<think>` and a newline, as R1's template
                does; R1-0528's leaves that to the model.
        """
        super().__init__(tokenizer, thinking="opened" if opens_thinking else "written")
        newline = self.encoder.encode_batch(["\n"])[0]
        self._opening = (*self._ids["think"], *newline) if opens_thinking else ()
        self._sampled_ids = (*self._ids["assistant"], *self._opening)

    def _text_after_thinking(self, text: str) -> str:
        return text.lstrip("\n")

    def _lay_out_thinking(self, layout: Layout, reasoning: str, index: int) -> None:
        reasoning = reasoning.strip("\n")
        if not self._opening:
            layout.ids(self._ids["think"], SegmentKind.THINK, index, sampled=True)
            reasoning = "\n" + reasoning
        layout.text(f"{reasoning}\n", SegmentKind.THINK, index, sampled=True)
        layout.ids(self._ids["think_end"], SegmentKind.THINK, index, sampled=True)
        layout.text("\n\n", SegmentKind.THINK, index, sampled=True)


def _no_thought_error(index: int) -> RendererError:
    return RendererError(
        f"messages[{index}]: this format does not open a think block for a reply in this place "
        "(V3.1 does so after a user message, R1 never after a tool result). Use the renderer "
        "deepseekv3 "
        "or deepseek_r1_0528 for tools."
    )


def _declaration(tool: ToolSpec) -> str:
    function = tool_declaration(tool)["function"]
    parameters = json_text(function.get("parameters", {}))
    description = function.get("description", "")
    return f"\n### {function['name']}\nDescription: {description}\n\nParameters: {parameters}\n"


RENDERERS = [
    NamedRenderer(
        "deepseekv3",
        lambda tokenizer, _: DeepSeekV3DisableThinkingRenderer(tokenizer),
        "DeepSeek V3.1",
        "the prompt closes the think block; tools",
    ),
    NamedRenderer(
        "deepseekv3_disable_thinking",
        lambda tokenizer, _: DeepSeekV3DisableThinkingRenderer(tokenizer),
        "DeepSeek V3.1",
        "same as `deepseekv3`",
    ),
    NamedRenderer(
        "deepseekv3_thinking",
        lambda tokenizer, _: DeepSeekV3ThinkingRenderer(tokenizer),
        "DeepSeek V3.1",
        "the prompt opens the think block; tools",
    ),
    NamedRenderer(
        "deepseekv3_chat",
        lambda tokenizer, _: DeepSeekV3ChatRenderer(tokenizer),
        "DeepSeek V3, V3-0324",
        "no thinking; tools",
    ),
    NamedRenderer(
        "deepseek_r1",
        lambda tokenizer, _: DeepSeekR1Renderer(tokenizer),
        "DeepSeek R1",
        "the prompt opens the think block; tools",
    ),
    NamedRenderer(
        "deepseek_r1_0528",
        lambda tokenizer, _: DeepSeekR1Renderer(tokenizer, opens_thinking=False),
        "DeepSeek R1-0528",
        "thinking, opened by the model; tools",
    ),
]
