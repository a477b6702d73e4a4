"""Kimi K2, K2.5 and K2.6: `<|im_user|>user<|im_middle|>` text `<|im_end|>`.

| renderer                     | model       | a prompt ends in  | old reasoning | system text |
|------------------------------|-------------|-------------------|---------------|-------------|
| `kimi_k2_instruct`           | K2-Instruct | `<|im_middle|>`   | (none)        | a default   |
| `kimi_k2`                    | K2-Thinking | `<|im_middle|>`   | dropped       | a default   |
| `kimi_k25`, `kimi_k26`       | K2.5, K2.6  | `<think>`         | dropped       | as given    |
| `kimi_k25_disable_thinking`  | K2.5        | `<think></think>` | dropped       | as given    |
| `kimi_k26_disable_thinking`  | K2.6        | `<think></think>` | dropped       | as given    |
| `kimi_k26_preserve_thinking` | K2.6        | `<think>`         | kept          | as given    |

Every reply of the thinking models has a think block, empty or not. Reasoning is dropped up to the
last reply without calls, so it is kept during a series of calls and results. Calls have ids
`functions.NAME:N`, which results repeat. K2.5 and K2.6 declare tools in TypeScript, the others in
JSON. Users and tools of K2.5 and K2.6 may send images.

Deliberate differences from the templates:
 1. Typed control tokens stay text.
 2. A trained reply's reasoning is written as it is sampled; the templates drop the last one's.
 3. An id of another shape is replaced by the next id in order, in the call and in its result.
    K2-Thinking's template writes any id; K2-Instruct's numbers the calls of each reply from 0.
 4. A result without an id takes the id of the call in the same place.
 5. K2-Instruct: a line break follows the id of a result, as in the later models; the template of
    July 2025 writes a backslash and an n.
 6. With thinking disabled, all reasoning is dropped, and refused in a trained reply.
 7. Arguments given as JSON text are not changed.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Literal

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.base import NamedRenderer, Renderer
from tinker_cookbook.renderers.content import refuse_trained_thinking, split_reasoning
from tinker_cookbook.renderers.images import (
    ImageProcessorProtocol,
    ImageWriter,
    has_images,
    text_and_images,
)
from tinker_cookbook.renderers.layout import Layout, SegmentKind
from tinker_cookbook.renderers.notations.kimi import typescript_text
from tinker_cookbook.renderers.notations.marked import build_call, texts_between_marks
from tinker_cookbook.renderers.parsing import Grammar, ParsedCall
from tinker_cookbook.renderers.tool_calls import (
    call_name_and_arguments,
    json_text,
    tool_declaration,
)
from tinker_cookbook.renderers.types import Message, Role, ToolCall, ToolSpec, UnparsedToolCall
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["KIMI_INSTRUCT_SYSTEM", "KIMI_SYSTEM", "RENDERERS", "KimiK2Renderer", "KimiRenderer"]

KIMI_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."
KIMI_INSTRUCT_SYSTEM = "You are a helpful assistant"

Thinking = Literal["none", "written", "opened", "disabled"]

_CALL_ID = re.compile(r"functions\.(?P<name>.+):\d+", re.DOTALL)
_KEPT, _DROPPED = "kept", "dropped"
_CALL_MARKS = {
    "section": "<|tool_calls_section_begin|>",
    "section_end": "<|tool_calls_section_end|>",
    "call": "<|tool_call_begin|>",
    "call_end": "<|tool_call_end|>",
    "arguments": "<|tool_call_argument_begin|>",
}


class KimiRenderer(Renderer):
    """The format of Moonshot's Kimi models."""

    writes_tools = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        strip_thinking_from_history: bool = True,
        *,
        thinking: Thinking = "written",
        default_system: str | None = None,
        typescript: bool = False,
        image_processor: ImageProcessorProtocol | None = None,
    ) -> None:
        """Prepare the frames.

        Args:
            tokenizer: Kimi's.
            strip_thinking_from_history: drop the reasoning of finished turns.
            thinking: who writes the think block. "none": nobody does. "written": the model
                writes all of it. "opened": the prompt opens it. "disabled": the prompt contains an
                empty block.
            default_system: system text if the first message is not a system message.
            typescript: declare tools in TypeScript, not in JSON.
            image_processor: the model's image processor, if users and tools may send images (K2.5
                and later).
        """
        super().__init__(tokenizer)
        self.thinking: Thinking = thinking
        self.strip_thinking_from_history = strip_thinking_from_history
        self.disables_thinking = thinking in ("none", "disabled")
        self.default_system = default_system
        if thinking == "none":
            self.takes_text_arguments = False  # its template would quote JSON text again
        self.typescript = typescript
        self._end_ids = (self.control_token("<|im_end|>"),)
        self._middle = self.control_token("<|im_middle|>")
        self._starts = {
            role: (self.control_token(f"<|im_{role}|>"),)
            for role in ("system", "user", "assistant")
        }
        self._marks = {key: (self.control_token(name),) for key, name in _CALL_MARKS.items()}
        self._think: tuple[int, ...] = ()
        self._think_end: tuple[int, ...] = ()
        if thinking != "none":
            self._think = (self.control_token("<think>"),)
            self._think_end = (self.control_token("</think>"),)
        names = ("system", "user", "assistant", "tool", "tool_declare")
        ids = self.encoder.encode_batch(list(names))
        self._headers = {
            name: (*self._starts.get(name, self._starts["system"]), *name_ids, self._middle)
            for name, name_ids in zip(names, ids, strict=True)
        }
        self._images = None
        if image_processor is not None:
            self._images = self._image_writer(image_processor)
        self._opening: tuple[int, ...] = {
            "none": (),
            "written": (),
            "opened": self._think,
            "disabled": (*self._think, *self._think_end),
        }[thinking]

    def _image_writer(self, image_processor: ImageProcessorProtocol) -> ImageWriter:
        begin, content, end = (
            self.control_token(f"<|media_{name}|>") for name in ("begin", "content", "end")
        )
        (kind,) = self.encoder.encode_batch(["image"])
        before = (begin, *kind, content)
        return ImageWriter(image_processor, before=before, after=[end], gap="\n")

    @property
    def writes_images(self) -> bool:
        return self._images is not None

    @property
    def has_extension_property(self) -> bool:
        return self.disables_thinking or not self.strip_thinking_from_history

    def turn_forms(self, messages: Sequence[Message]) -> Sequence[Hashable]:
        """Return for each reply whether its reasoning is `kept` or `dropped`."""
        forms = list(self.prompt_forms(messages))
        if messages and not self.disables_thinking:
            forms[-1] = _KEPT
        return forms

    def prompt_forms(self, messages: Sequence[Message]) -> Sequence[Hashable]:
        if self.disables_thinking:
            return [_DROPPED] * len(messages)
        if not self.strip_thinking_from_history:
            return [_KEPT] * len(messages)
        answers = [
            index
            for index, message in enumerate(messages)
            if message["role"] == "assistant" and not _has_call(message)
        ]
        last_answer = answers[-1] if answers else -1
        return [_DROPPED if index <= last_answer else _KEPT for index in range(len(messages))]

    def check_trained_turn(self, messages: Sequence[Message], index: int) -> None:
        if self.disables_thinking:
            refuse_trained_thinking(split_reasoning(messages[index])[0], index)

    # ---- layout ----

    def lay_out(
        self, layout: Layout, messages: Sequence[Message], forms: Sequence[Hashable]
    ) -> None:
        has_system = bool(messages) and messages[0]["role"] == "system"
        tools = messages[0].get("tools") if has_system else None
        if tools:
            layout.ids(self._headers["tool_declare"], SegmentKind.FRAME, 0)
            layout.text(self._declarations(tools), SegmentKind.TOOL, 0)
            layout.ids(self._end_ids, SegmentKind.STOP, 0)
        # A system message that only declares tools is not written.
        is_bare = has_system and bool(tools) and not messages[0].get("content")
        if self.default_system and (is_bare or not has_system):
            layout.ids(self._headers["system"], SegmentKind.FRAME, -1)
            layout.text(self.default_system, SegmentKind.CONTENT, -1)
            layout.ids(self._end_ids, SegmentKind.STOP, -1)
        ids = _CallIds()
        for index, message in enumerate(messages):
            if index or not is_bare:
                self._lay_out_message(layout, message, index, form=forms[index], ids=ids)

    def _declarations(self, tools: Sequence[ToolSpec]) -> str:
        if self.typescript:
            return typescript_text(tools)
        return json_text([tool_declaration(tool) for tool in tools])

    def open_turn(self, layout: Layout, messages: Sequence[Message], role: Role) -> None:
        layout.ids(self._headers[role], SegmentKind.FRAME, len(messages))
        if role == "assistant" and self._opening:
            layout.ids(self._opening, SegmentKind.FRAME, len(messages))

    def _lay_out_message(
        self, layout: Layout, message: Message, index: int, *, form: Hashable, ids: _CallIds
    ) -> None:
        role = message["role"]
        if message.get("tools") and index:
            raise RendererError(f"messages[{index}]: tools are declared by the first message.")
        self._lay_out_header(layout, message, index)
        if self._images is not None and role in ("user", "tool") and has_images(message):
            if role == "tool":
                self._lay_out_result_id(layout, message, index, ids)
            kind = SegmentKind.TOOL if role == "tool" else SegmentKind.CONTENT
            self._images.lay_out(layout, text_and_images(message, index), index, kind)
            layout.ids(self._end_ids, SegmentKind.STOP, index)
            return
        reasoning, text = split_reasoning(message)
        if role == "assistant":
            if self._think:
                self._lay_out_thinking(layout, reasoning if form == _KEPT else "", index, form)
            layout.text(text, SegmentKind.CONTENT, index, sampled=True)
            self._lay_out_calls(layout, message, index, ids)
        elif reasoning or message.get("tool_calls"):
            raise RendererError(
                f"messages[{index}]: only the assistant thinks and makes tool_calls; role is "
                f"{role!r}."
            )
        elif role == "tool":
            self._lay_out_result_id(layout, message, index, ids)
            layout.text(text, SegmentKind.TOOL, index)
        else:
            layout.text(text, SegmentKind.CONTENT, index)
        layout.ids(self._end_ids, SegmentKind.STOP, index, sampled=role == "assistant")

    def _lay_out_result_id(
        self, layout: Layout, message: Message, index: int, ids: _CallIds
    ) -> None:
        call_id = ids.of_result(message.get("tool_call_id"), message.get("name"))
        layout.text(f"## Return of {call_id}\n", SegmentKind.TOOL, index)

    def _lay_out_header(self, layout: Layout, message: Message, index: int) -> None:
        role, name = message["role"], message.get("name")
        if not name or self.thinking == "none":
            layout.ids(self._headers[role], SegmentKind.FRAME, index)
            return
        layout.ids(self._starts.get(role, self._starts["system"]), SegmentKind.FRAME, index)
        layout.text(name, SegmentKind.FRAME, index)
        layout.ids((self._middle,), SegmentKind.FRAME, index)

    def _lay_out_thinking(self, layout: Layout, reasoning: str, index: int, form: Hashable) -> None:
        """Append the think block; the part that the generation prompt writes is FRAME."""
        if form == _DROPPED:
            layout.ids((*self._think, *self._think_end), SegmentKind.FRAME, index)
            return
        opener = SegmentKind.FRAME if self.thinking == "opened" else SegmentKind.THINK
        layout.ids(self._think, opener, index, sampled=opener is SegmentKind.THINK)
        layout.text(reasoning, SegmentKind.THINK, index, sampled=True)
        layout.ids(self._think_end, SegmentKind.THINK, index, sampled=True)

    def _lay_out_calls(self, layout: Layout, message: Message, index: int, ids: _CallIds) -> None:
        calls: list[list[str]] = []
        ids.start_reply(restart=self.thinking == "none")
        for call in message.get("tool_calls") or ():
            name, arguments = call_name_and_arguments(call)
            given = call.id if isinstance(call, ToolCall) else call.get("id")
            calls.append([ids.of_call(name, given), arguments])
        for call in message.get("unparsed_tool_calls") or ():
            opening, closing = _CALL_MARKS["call"], _CALL_MARKS["call_end"]
            body = call.raw_text.removeprefix(opening).removesuffix(closing)
            calls.append(body.split(_CALL_MARKS["arguments"]))
        if not calls:
            return
        layout.ids(self._marks["section"], SegmentKind.TOOL, index, sampled=True)
        for parts in calls:
            layout.ids(self._marks["call"], SegmentKind.TOOL, index, sampled=True)
            for place, part in enumerate(parts):
                if place:
                    layout.ids(self._marks["arguments"], SegmentKind.TOOL, index, sampled=True)
                layout.text(part, SegmentKind.TOOL, index, sampled=True)
            layout.ids(self._marks["call_end"], SegmentKind.TOOL, index, sampled=True)
        layout.ids(self._marks["section_end"], SegmentKind.TOOL, index, sampled=True)

    # ---- replies ----

    def get_stop_sequences(self) -> list[int]:
        return list(self._end_ids)

    def grammar(self) -> Grammar:
        marks = {key: token for key, (token,) in self._marks.items()}
        document_end = self.encoder.control_id("[EOS]")
        return Grammar(
            stop=frozenset(self._end_ids),
            eos=frozenset() if document_end is None else frozenset([document_end]),
            think=(self._think[0], self._think_end[0]) if self._think else None,
            starts_in_thinking=self.thinking == "opened",
            think_newlines=(0, 0, 0),
            call=(marks["call"], marks["call_end"]),
            call_section=(marks["section"], marks["section_end"]),
            call_marks=frozenset([marks["arguments"]]),
            parse_call=_parse_call,
            newlines_before_call=0,
        )


class KimiK2Renderer(KimiRenderer):
    """`kimi_k2`."""

    DEFAULT_SYSTEM_PROMPT = KIMI_SYSTEM

    def __init__(self, tokenizer: Tokenizer, strip_thinking_from_history: bool = True) -> None:
        super().__init__(tokenizer, strip_thinking_from_history, default_system=KIMI_SYSTEM)


class _CallIds:
    """Numbers the calls of a conversation and assigns ids to their results."""

    def __init__(self) -> None:
        self._next = 0
        self._written: dict[str, str] = {}
        self._waiting: list[str] = []

    def start_reply(self, *, restart: bool) -> None:
        """Forget the calls of the previous reply."""
        self._waiting = []
        if restart:
            self._next = 0

    def of_call(self, name: str, given: str | None) -> str:
        """Return the id of the next call."""
        found = _CALL_ID.fullmatch(given or "")
        call_id = f"functions.{name}:{self._next}"
        if given and found and found["name"] == name:
            call_id = given
        elif given:
            self._written[given] = call_id
        self._next += 1
        self._waiting.append(call_id)
        return call_id

    def of_result(self, given: str | None, name: str | None) -> str:
        """Return the id that a result repeats: its own, or the id of the call in the same place."""
        if given:
            call_id = self._written.get(given, given)
            if call_id in self._waiting:
                self._waiting.remove(call_id)
            return call_id
        if self._waiting:
            return self._waiting.pop(0)
        return f"functions.{name or 'unknown'}:{max(0, self._next - 1)}"


def _has_call(message: Message) -> bool:
    return bool(message.get("tool_calls") or message.get("unparsed_tool_calls"))


def _parse_call(parts: Sequence[str | int], raw_text: str) -> list[ParsedCall]:
    texts = texts_between_marks(parts)
    found = _CALL_ID.fullmatch(texts[0].strip())
    if len(texts) != 2 or found is None:
        error = f"expected functions.NAME:N, {_CALL_MARKS['arguments']} and arguments"
        return [UnparsedToolCall(raw_text=raw_text, error=error)]
    return [build_call(found["name"], texts[1], raw_text, call_id=texts[0].strip())]


RENDERERS = [
    NamedRenderer(
        "kimi_k2_instruct",
        lambda tokenizer, _: KimiRenderer(
            tokenizer, thinking="none", default_system=KIMI_INSTRUCT_SYSTEM
        ),
        "Kimi K2 Instruct",
        "a default system message; no thinking; tools",
    ),
    NamedRenderer(
        "kimi_k2",
        lambda tokenizer, _: KimiK2Renderer(tokenizer),
        "Kimi K2 Thinking",
        "a default system message; thinking; tools",
    ),
]
