"""Gemma 4: `<|turn>role`, newline, trimmed text, `<turn|>`, newline; thinking, tools.

| renderer                   | the template's options | reasoning of earlier turns           |
|----------------------------|------------------------|--------------------------------------|
| `gemma4`                   | none                   | there is none                        |
| `gemma4_thinking`          | `enable_thinking`      | dropped                              |
| `gemma4_preserve_thinking` | and `preserve_thinking`| kept where a reply calls tools       |

With thinking, the system turn starts with `<|think|>`. Reasoning is `<|channel>thought`, newline,
text, newline, `<channel|>`. A reply that calls tools ends with `<|tool_response>`. The results and
the reply to them follow in the same turn, and the prompt of that reply opens the reasoning. Tools
are declared and called in a separate notation, see notations/gemma4.py.

Deliberate differences from the template:
 1. Typed control tokens stay text, and so do thinking channels typed in a string.
 2. A reply to a tool's result without reasoning closes the channel that its prompt opens. The
    template leaves out both.
 3. Text next to a call is written before it, as it is sampled. The template moves it after the
    results.
 4. Two consecutive replies are two turns, as they are sampled. The template joins their texts.
 5. A result without an id belongs to the call in the same place. Results without a call before them
    are refused; the template drops them.
 6. Without thinking, reasoning in history is dropped and a trained reply with reasoning is refused.
 7. Numbers in arguments given as JSON text are not changed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Literal

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.base import NamedRenderer, Renderer
from tinker_cookbook.renderers.content import refuse_trained_thinking, split_reasoning
from tinker_cookbook.renderers.layout import Layout, SegmentKind
from tinker_cookbook.renderers.notations.gemma4 import (
    Piece,
    call_pieces,
    declaration_pieces,
    parse_call,
    result_pieces,
)
from tinker_cookbook.renderers.notations.labelled import THOUGHT_LABEL, LabelledParser
from tinker_cookbook.renderers.parsing import Grammar, ReplyParser
from tinker_cookbook.renderers.tool_calls import call_name_and_arguments
from tinker_cookbook.renderers.train_on_what import last_user_index
from tinker_cookbook.renderers.types import CallLike, Message, Role, ToolCall
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["RENDERERS", "Gemma4Renderer"]

_WRITTEN = {"system": "system", "user": "user", "assistant": "model"}


class Gemma4Renderer(Renderer):
    """Gemma 4, text only."""

    takes_text_arguments = False
    writes_tools = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        thinking: Literal["enabled", "disabled"] = "disabled",
        preserves_calls: bool = False,
    ) -> None:
        """Prepare the format.

        Args:
            tokenizer: must have Gemma 4's control tokens.
            thinking: whether replies have reasoning.
            preserves_calls: keep the reasoning of replies that call tools after the next user
                message.
        """
        super().__init__(tokenizer)
        self.disables_thinking = thinking == "disabled"
        self._preserves_calls = preserves_calls
        token = self.control_token
        self.bos_ids = (token("<bos>"),)
        turn, self._end = token("<|turn>"), token("<turn|>")
        self._frames = {
            role: self.build_frame([turn], f"{name}\n") for role, name in _WRITTEN.items()
        }
        self._newline = tuple(self.encoder.encode_batch(["\n"])[0])
        self._think = token("<|think|>")
        self._channel = token("<|channel>"), token("<channel|>")
        self._opened = self.build_frame([self._channel[0]], THOUGHT_LABEL)
        self._tool = token("<|tool>"), token("<tool|>")
        self._call = token("<|tool_call>"), token("<tool_call|>")
        self._result = token("<|tool_response>"), token("<tool_response|>")
        self._quote = token('<|"|>')

    @property
    def has_extension_property(self) -> bool:
        return self.disables_thinking

    # ---- layout ----

    def turn_forms(self, messages: Sequence[Message]) -> Sequence[Hashable]:
        """Return whether each reply is written with its reasoning."""
        query = last_user_index(messages)
        forms = []
        for index, message in enumerate(messages):
            keeps = index > query or (self._preserves_calls and _has_calls(message))
            is_reply = message["role"] == "assistant" and not self.disables_thinking
            forms.append(is_reply and keeps and self._shows_block(messages, index))
        return forms

    def _shows_block(self, messages: Sequence[Message], index: int) -> bool:
        """Whether the reply has a thinking channel when it is sampled."""
        return bool(split_reasoning(messages[index])[0]) or self._answers_results(messages, index)

    @staticmethod
    def _answers_results(messages: Sequence[Message], index: int) -> bool:
        return index > 0 and messages[index - 1]["role"] == "tool"

    @staticmethod
    def _is_in_turn(messages: Sequence[Message], index: int) -> bool:
        """Whether the model's turn is still open before message number `index`."""
        before = messages[index - 1] if index else None
        return before is not None and (before["role"] == "tool" or _has_calls(before))

    def check_trained_turn(self, messages: Sequence[Message], index: int) -> None:
        if self.disables_thinking:
            refuse_trained_thinking(split_reasoning(messages[index])[0], index)

    def lay_out(
        self, layout: Layout, messages: Sequence[Message], forms: Sequence[Hashable]
    ) -> None:
        layout.ids(self.bos_ids, SegmentKind.FRAME, -1)
        if not self.disables_thinking and (not messages or messages[0]["role"] != "system"):
            layout.frame(self._frames["system"], -1)
            self._lay_out_think(layout, -1)
            self._end_turn(layout, -1, SegmentKind.FRAME)
        for index, message in enumerate(messages):
            role = message["role"]
            if role == "assistant":
                self._lay_out_reply(layout, messages, index, shows_block=bool(forms[index]))
            elif role == "tool":
                self._lay_out_result(layout, messages, index)
            else:
                self._lay_out_plain(layout, messages, index)

    def _lay_out_think(self, layout: Layout, index: int) -> None:
        layout.ids((self._think,), SegmentKind.FRAME, index)
        layout.text("\n", SegmentKind.FRAME, index)

    def _end_turn(
        self, layout: Layout, index: int, kind: SegmentKind, *, sampled: bool = False
    ) -> None:
        layout.ids((self._end,), kind, index, sampled=sampled)
        layout.ids(self._newline, SegmentKind.FRAME, index)

    def _open(self, layout: Layout, messages: Sequence[Message], index: int, role: Role) -> None:
        """Append the opening of a turn, after the end of the model's turn if the last message is a
        result."""
        if self._answers_results(messages, index):
            self._end_turn(layout, index, SegmentKind.FRAME)
        layout.frame(self._frames[role], index)

    def _lay_out_plain(self, layout: Layout, messages: Sequence[Message], index: int) -> None:
        message = messages[index]
        reasoning, text = split_reasoning(message)
        if reasoning or message.get("tool_calls"):
            raise RendererError(
                f"messages[{index}]: only the assistant can think and make tool_calls."
            )
        tools = message.get("tools") or ()
        if tools and (index or message["role"] != "system"):
            raise RendererError(
                f"messages[{index}]: tools are declared by a system message at the start in this "
                "format; put them there."
            )
        self._open(layout, messages, index, message["role"])
        if index == 0 and message["role"] == "system" and not self.disables_thinking:
            self._lay_out_think(layout, index)
        layout.text(text.strip(), SegmentKind.CONTENT, index)
        for tool in tools:
            layout.ids(self._tool[:1], SegmentKind.TOOL, index)
            self._lay_out_notation(layout, declaration_pieces(tool), index)
            layout.ids(self._tool[1:], SegmentKind.TOOL, index)
        self._end_turn(layout, index, SegmentKind.STOP)

    def _lay_out_notation(
        self, layout: Layout, pieces: Iterable[Piece], index: int, *, sampled: bool = False
    ) -> None:
        """Append notation; texts without a `<|"|>` between them are encoded together."""
        text = ""
        for piece in pieces:
            if piece is not None:
                text += piece
                continue
            layout.text(text, SegmentKind.TOOL, index, sampled=sampled)
            layout.ids((self._quote,), SegmentKind.TOOL, index, sampled=sampled)
            text = ""
        layout.text(text, SegmentKind.TOOL, index, sampled=sampled)

    def _lay_out_result(self, layout: Layout, messages: Sequence[Message], index: int) -> None:
        """Append a tool result; the reply has ended with the opening of the first result."""
        first = index
        while first and messages[first - 1]["role"] == "tool":
            first -= 1
        if not first or not _has_calls(messages[first - 1]):
            raise RendererError(
                f"messages[{index}]: a tool's result follows the reply with its tool_calls in this "
                "format; put it there, or make it a user message."
            )
        calls = messages[first - 1].get("tool_calls") or ()
        name = _result_name(messages[index], calls, index - first)
        if index > first:
            layout.ids(self._result[:1], SegmentKind.TOOL, index)
        text = split_reasoning(messages[index])[1]
        self._lay_out_notation(layout, result_pieces(name, text), index)
        layout.ids(self._result[1:], SegmentKind.TOOL, index)

    def _lay_out_reply(
        self, layout: Layout, messages: Sequence[Message], index: int, *, shows_block: bool
    ) -> None:
        message = messages[index]
        reasoning, text = split_reasoning(message)
        if not self._is_in_turn(messages, index):
            layout.frame(self._frames["assistant"], index)
        if shows_block:
            is_opened = self._answers_results(messages, index)
            self._lay_out_thinking(layout, reasoning, index, is_opened=is_opened)
        layout.text(text.strip(), SegmentKind.CONTENT, index, sampled=True)
        for call in message.get("tool_calls") or ():
            layout.ids(self._call[:1], SegmentKind.TOOL, index, sampled=True)
            self._lay_out_notation(layout, call_pieces(call), index, sampled=True)
            layout.ids(self._call[1:], SegmentKind.TOOL, index, sampled=True)
        for call in message.get("unparsed_tool_calls") or ():
            tokens = self.encoder.encode_markup(call.raw_text)
            layout.ids(tokens, SegmentKind.TOOL, index, sampled=True)
        if _has_calls(message):
            layout.ids(self._result[:1], SegmentKind.STOP, index, sampled=True)
        else:
            self._end_turn(layout, index, SegmentKind.STOP, sampled=True)

    def _lay_out_thinking(
        self, layout: Layout, reasoning: str, index: int, *, is_opened: bool
    ) -> None:
        """Append the thinking channel; the part that the generation prompt writes is FRAME."""
        kind = SegmentKind.THINK
        written = f"{reasoning}\n" if reasoning else ""
        if is_opened:
            layout.frame(self._opened, index)
            layout.text(written, kind, index, sampled=True)
        else:
            layout.ids(self._channel[:1], kind, index, sampled=True)
            layout.text(THOUGHT_LABEL + written, kind, index, sampled=True)
        layout.ids(self._channel[1:], kind, index, sampled=True)

    def open_turn(self, layout: Layout, messages: Sequence[Message], role: Role) -> None:
        index = len(messages)
        if role == "tool":
            if not (messages and _has_calls(messages[-1])):
                layout.ids(self._result[:1], SegmentKind.FRAME, index)
        elif role != "assistant":
            self._open(layout, messages, index, role)
        elif not self._is_in_turn(messages, index):
            layout.frame(self._frames[role], index)
        elif self._answers_results(messages, index) and not self.disables_thinking:
            layout.frame(self._opened, index)

    # ---- replies ----

    def get_stop_sequences(self) -> list[int]:
        return [self._end, self._result[0]]

    def grammar(self) -> Grammar:
        document_end = self.encoder.control_id("<eos>")
        return Grammar(
            stop=frozenset(self.get_stop_sequences()),
            eos=frozenset() if document_end is None else frozenset([document_end]),
            think=self._channel,
            think_newlines=(0, 1, 0),
            call=self._call,
            parse_call=parse_call,
            call_marks=frozenset([self._quote]),
            newlines_before_call=0,
        )

    def response_parser(self) -> ReplyParser:
        return LabelledParser(self.encoder, self.grammar(), may_be_open=not self.disables_thinking)


def _has_calls(message: Message) -> bool:
    return bool(message.get("tool_calls") or message.get("unparsed_tool_calls"))


def _result_name(message: Message, calls: Sequence[CallLike], place: int) -> str:
    """Return the tool that a result is of: by its id, else by its name, else by its place."""
    call_id = message.get("tool_call_id")
    for call in calls:
        known_id = call.id if isinstance(call, ToolCall) else call.get("id")
        if call_id is not None and known_id == call_id:
            return call_name_and_arguments(call)[0]
    if message.get("name"):
        return message.get("name", "")
    is_placed = call_id is None and place < len(calls)
    return call_name_and_arguments(calls[place])[0] if is_placed else "unknown"


RENDERERS = [
    NamedRenderer(
        "gemma4",
        lambda tokenizer, _: Gemma4Renderer(tokenizer),
        "Gemma 4",
        "no thinking; tools in a separate notation",
    ),
    NamedRenderer(
        "gemma4_thinking",
        lambda tokenizer, _: Gemma4Renderer(tokenizer, thinking="enabled"),
        "Gemma 4",
        "thinking; old reasoning is dropped",
    ),
    NamedRenderer(
        "gemma4_preserve_thinking",
        lambda tokenizer, _: Gemma4Renderer(tokenizer, thinking="enabled", preserves_calls=True),
        "Gemma 4",
        "thinking; old reasoning is kept next to calls",
    ),
]
