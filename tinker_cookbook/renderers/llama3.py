"""Llama 3: `<|start_header_id|>role<|end_header_id|>`, blank line, trimmed text, `<|eot_id|>`.

| renderer   | models                   | system block with dates | tools |
|------------|--------------------------|-------------------------|-------|
| `llama3`   | Llama 3.0 Instruct       | no                      | no    |
| `llama3_1` | Llama 3.1, 3.2, 3.3 Instruct | yes                 | yes   |

The templates of 3.1 and later always open with a system block that names a knowledge cut-off and
today's date, even without a system message. `llama3_1` writes it, since the models were
trained with it; `llama3` leaves it out for every model, as checkpoints trained with that name
expect.

Deliberate differences from the templates:
 1. Typed control tokens stay text.
 2. The date is 26 Jul 2024, as 3.1 and 3.3 write; 3.2 writes the day of the call, which would make
    every day's training data different. `date_string` sets another one.
 3. Arguments given as JSON text are not changed. The template would quote them again.
 4. A tool name that JSON must escape is escaped.
 5. A reply with both text and a call is refused: the template drops the text. Several calls are
    written as the models write them, with `; ` between them; the template raises.
 6. Unknown roles are refused; the template writes any role.
 7. Built-in tools (`<|python_tag|>`) are not written.

A reply is read as calls if it is exactly what these calls would be written as, so that the message
renders to the same tokens again; an answer in JSON on several lines is text. `<|python_tag|>` may
precede it. `fit_tool_calls` knows the declared tools: without any, it turns the calls back into
text.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.base import NamedRenderer, Renderer
from tinker_cookbook.renderers.content import split_reasoning
from tinker_cookbook.renderers.layout import Layout, SegmentKind
from tinker_cookbook.renderers.parsing import Grammar
from tinker_cookbook.renderers.tool_calls import (
    bare_calls_as_text,
    call_name_and_arguments,
    json_text,
    tool_declaration,
)
from tinker_cookbook.renderers.types import Message, Role, ToolSpec
from tinker_cookbook.replies.grammar import WholeCalls
from tinker_cookbook.replies.json_calls import read_whole_reply, write_whole_reply
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["RENDERERS", "Llama3Renderer", "SystemBlock"]

_TOOLS_BEFORE = (
    "Given the following functions, please respond with a JSON for a function call "
    "with its proper arguments that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name '
    "and its value}.Do not use variables.\n\n"
)


@dataclass(frozen=True)
class SystemBlock:
    """The dates that Llama 3.1 and later write before the system message."""

    knowledge_cutoff: str = "December 2023"
    date_string: str = "26 Jul 2024"

    def text(self, *, has_tools: bool) -> str:
        """Return the text of the block; with tools it also names the environment."""
        environment = "Environment: ipython\n" if has_tools else ""
        return (
            f"{environment}Cutting Knowledge Date: {self.knowledge_cutoff}\n"
            f"Today Date: {self.date_string}\n\n"
        )


class Llama3Renderer(Renderer):
    """Llama 3 format; with a system block, the format of 3.1 and later, tools included."""

    takes_text_arguments = False
    roles = ("system", "user", "assistant", "tool", "ipython")

    def __init__(self, tokenizer: Tokenizer, *, system_block: SystemBlock | None = None) -> None:
        super().__init__(tokenizer)
        self.system_block = system_block
        self.writes_tools = system_block is not None
        self.bos_ids = (self.control_token("<|begin_of_text|>"),)
        self._eot = self.control_token("<|eot_id|>")
        self._eot_ids = (self._eot,)
        start = self.control_token("<|start_header_id|>")
        end = self.control_token("<|end_header_id|>")
        role_ids = self.encoder.encode_batch(list(self.roles))
        self._frames = {
            role: self.build_frame([start, *ids, end], "\n\n")
            for role, ids in zip(self.roles, role_ids, strict=True)
        }

    # ---- layout ----

    def lay_out(
        self, layout: Layout, messages: Sequence[Message], forms: Sequence[Hashable]
    ) -> None:
        layout.ids(self.bos_ids, SegmentKind.FRAME, -1)
        tools: Sequence[ToolSpec] = ()
        if self.system_block:
            tools = self._lay_out_system_block(layout, messages, self.system_block)
        for index, message in enumerate(messages):
            if index == 0 and self.system_block and message["role"] == "system":
                continue
            self._lay_out_message(layout, message, index, tools)
            tools = ()

    def open_turn(self, layout: Layout, messages: Sequence[Message], role: Role) -> None:
        layout.frame(self._frames[role], len(messages))

    def _lay_out_system_block(
        self, layout: Layout, messages: Sequence[Message], block: SystemBlock
    ) -> Sequence[ToolSpec]:
        """Append dates and the system message, if there is one; return the tools it declares."""
        has_system = bool(messages) and messages[0]["role"] == "system"
        index = 0 if has_system else -1
        tools = messages[0].get("tools", []) if has_system else []
        layout.frame(self._frames["system"], index)
        layout.text(block.text(has_tools=bool(tools)), SegmentKind.FRAME, index)
        if has_system:
            layout.text(self._text(messages[0], 0), SegmentKind.CONTENT, 0)
        layout.ids(self._eot_ids, SegmentKind.STOP, index)
        if tools and (len(messages) < 2 or messages[1]["role"] != "user"):
            raise RendererError(
                "messages[0]: tools need a user message right after the system message, since "
                "this format declares them there."
            )
        return tools

    def _lay_out_message(
        self, layout: Layout, message: Message, index: int, tools: Sequence[ToolSpec]
    ) -> None:
        role = message["role"]
        sampled = role == "assistant"
        if message.get("tools") and not (index == 0 and self.system_block):
            raise RendererError(
                f"messages[{index}]: tools can be declared by a first system message only, and "
                "only in the format of Llama 3.1 and later (llama3_1)."
            )
        text, kind = self._body(message, index)
        layout.frame(self._frames["ipython" if self._is_result(role) else role], index)
        if tools:
            declared = "".join(json_text(tool_declaration(t), indent=4) + "\n\n" for t in tools)
            layout.text(_TOOLS_BEFORE + declared, SegmentKind.TOOL, index)
        layout.text(text, kind, index, sampled=sampled)
        layout.ids(self._eot_ids, SegmentKind.STOP, index, sampled=sampled)

    def _is_result(self, role: str) -> bool:
        return role in ("tool", "ipython") and self.system_block is not None

    def _body(self, message: Message, index: int) -> tuple[str, SegmentKind]:
        text = self._text(message, index)
        if self._is_result(message["role"]):
            return json_text(split_reasoning(message)[1]), SegmentKind.TOOL
        calls = message.get("tool_calls") or []
        unparsed = message.get("unparsed_tool_calls") or []
        if not calls and not unparsed:
            return text, SegmentKind.CONTENT
        if self.system_block is None or message["role"] != "assistant":
            raise RendererError(
                f"messages[{index}]: tool_calls cannot be written here; the assistant makes them, "
                "in the format of Llama 3.1 and later (llama3_1)."
            )
        if text or (unparsed and len(calls) + len(unparsed) > 1):
            raise RendererError(
                f"messages[{index}]: this format writes only tool calls in such a reply; "
                "move the text into a separate message."
            )
        if unparsed:
            return unparsed[0].raw_text, SegmentKind.TOOL
        written = write_whole_reply([call_name_and_arguments(c) for c in calls], "parameters")
        return written, SegmentKind.TOOL

    def _text(self, message: Message, index: int) -> str:
        reasoning, text = split_reasoning(message)
        if reasoning:
            raise RendererError(
                f"messages[{index}]: Llama 3 has no place for thinking; remove the thinking parts, "
                "or use the renderer of a thinking model."
            )
        return text.strip()

    # ---- replies ----

    def fit_tool_calls(self, message: Message, tools: Sequence[ToolSpec]) -> Message:
        return bare_calls_as_text(message, tools, "parameters") if self.system_block else message

    def get_stop_sequences(self) -> list[int]:
        return [self._eot]

    def grammar(self) -> Grammar:
        others = (self.encoder.control_id(n) for n in ("<|end_of_text|>", "<|eom_id|>"))
        return Grammar(
            stop=frozenset(self._eot_ids),
            eos=frozenset(token for token in others if token is not None),
            whole_calls=self._whole_calls() if self.system_block else None,
        )

    def _whole_calls(self) -> WholeCalls:
        """Return how to recognize a reply that consists of calls."""
        return WholeCalls(
            parse=partial(read_whole_reply, is_exact=True),
            mark=self.encoder.control_id("<|python_tag|>"),
        )


RENDERERS = [
    NamedRenderer(
        "llama3",
        lambda tokenizer, _: Llama3Renderer(tokenizer),
        "Llama 3.0 Instruct",
        "no system block",
    ),
    NamedRenderer(
        "llama3_1",
        lambda tokenizer, _: Llama3Renderer(tokenizer, system_block=SystemBlock()),
        "Llama 3.1, 3.2, 3.3 Instruct",
        "system block with dates; tools",
    ),
]
