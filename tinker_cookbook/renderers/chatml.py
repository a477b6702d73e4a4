"""ChatML: `<|im_start|>role`, newline, text, `<|im_end|>`, newline.

By default it adds nothing. What a model family adds is an option:

| renderer     | model family          | default_system    | tools |
|--------------|-----------------------|-------------------|-------|
| `chatml`     | any with `<|im_start|>` | none            | no    |
| `smollm2`    | SmolLM2 Instruct      | SmolLM's          | no    |
| `qwen2_5`    | Qwen2.5 Instruct      | Qwen's            | yes   |
| `qwen3_instruct` | Qwen3 Instruct 2507 | none            | yes   |
| `qwen3_vl_instruct` | Qwen3-VL Instruct | none           | yes, and images |

Deliberate differences from the models' templates:
 1. Typed control tokens stay text; the template turns them into control tokens.
 2. The assistant's text is encoded separately from the header before it, because sampling starts
    there. The template merges a newline at the start of that text with the header's, into a token
    that sampling cannot produce.
 3. Arguments given as JSON text are not changed. Qwen2.5's template would quote them a second time.
 4. A tool name that JSON must escape is escaped.
 5. Unknown roles are refused; Qwen's templates drop them silently.
 6. A prompt without any message has the default system message, as all later prompts have.
 7. A system message after the first is written as in Qwen3; Qwen3-VL's template drops it.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.base import NamedRenderer, Renderer
from tinker_cookbook.renderers.content import split_reasoning
from tinker_cookbook.renderers.images import (
    ImageProcessorProtocol,
    ImageWriter,
    has_images,
    text_and_images,
)
from tinker_cookbook.renderers.layout import Layout, SegmentKind
from tinker_cookbook.renderers.notations.text_markers import TextCallParser
from tinker_cookbook.renderers.parsing import Grammar, ReplyParser
from tinker_cookbook.renderers.tool_calls import (
    call_name_and_arguments,
    json_text,
    tool_declaration,
)
from tinker_cookbook.renderers.types import CallLike, ImagePart, Message, Role, ToolSpec
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["QWEN2_5_SYSTEM", "RENDERERS", "SMOLLM2_SYSTEM", "ChatMLRenderer"]

SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN2_5_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

_TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
_CALL_MARKER = re.compile(r"(</?tool_call>)")
_MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


class ChatMLRenderer(Renderer):
    """ChatML, with options for what a model family adds."""

    newlines_before_call = 1
    """Newlines between a reply's text and its first call."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        default_system: str | None = None,
        tools: bool = False,
        image_processor: ImageProcessorProtocol | None = None,
    ) -> None:
        """Prepare the frames.

        Args:
            tokenizer: must have `<|im_start|>` and `<|im_end|>`.
            default_system: system text written when the first message is not a system message.
            tools: write and parse tool calls as Qwen does (`<tool_call>` around JSON).
            image_processor: the model's image processor, if users and tools may send images.
        """
        super().__init__(tokenizer)
        self.default_system = default_system
        self.writes_tools = tools
        if default_system is not None:
            self.takes_text_arguments = False  # Qwen2.5's template would quote JSON text again
        self._start = self.control_token("<|im_start|>")
        self._end = self.control_token("<|im_end|>")
        self._end_ids = (self._end,)
        self._newline = tuple(self.encoder.encode_batch(["\n"])[0])
        self._frames = {role: self.build_frame([self._start], f"{role}\n") for role in self.roles}
        self._results_frame = self.build_frame([self._start], "user")
        self._marker_ids = {name: self.encoder.control_id(name) for name in _MARKERS}
        self._images = None
        if image_processor is not None:
            self._images = ImageWriter.of_qwen(self, image_processor)

    # ---- layout ----

    def lay_out(
        self, layout: Layout, messages: Sequence[Message], forms: Sequence[Hashable]
    ) -> None:
        if self.default_system and (not messages or messages[0]["role"] != "system"):
            layout.frame(self._frames["system"], -1)
            layout.text(self.default_system, SegmentKind.CONTENT, -1)
            self._end_turn(layout, -1)
        for index, message in enumerate(messages):
            role = message["role"]
            if role == "assistant":
                self._lay_out_assistant(layout, message, index, forms[index])
            elif role == "tool" and self.writes_tools:
                self._lay_out_tool_result(layout, messages, index)
            else:
                self._lay_out_plain(layout, message, index)

    def open_turn(self, layout: Layout, messages: Sequence[Message], role: Role) -> None:
        layout.frame(self._frames[role], len(messages))

    def _end_turn(self, layout: Layout, index: int, *, sampled: bool = False) -> None:
        layout.ids(self._end_ids, SegmentKind.STOP, index, sampled=sampled)
        layout.ids(self._newline, SegmentKind.FRAME, index)

    def _read(self, message: Message) -> tuple[str, str]:
        """Return the reasoning and the text of a message, as the format writes them."""
        return split_reasoning(message)

    def _read_pieces(self, message: Message, index: int) -> list[str | ImagePart]:
        """Return texts and images of a message, as the format writes them."""
        return text_and_images(message, index)

    def _shows_images(self, message: Message) -> bool:
        roles = ("user", "tool")
        return self._images is not None and message["role"] in roles and has_images(message)

    def _lay_out_images(
        self, layout: Layout, message: Message, index: int, kind: SegmentKind
    ) -> None:
        assert self._images is not None, "asked before"
        self._images.lay_out(layout, self._read_pieces(message, index), index, kind)

    def _lay_out_plain(self, layout: Layout, message: Message, index: int) -> None:
        if self._shows_images(message):
            layout.frame(self._frames[message["role"]], index)
            self._lay_out_images(layout, message, index, SegmentKind.CONTENT)
            self._end_turn(layout, index)
            return
        reasoning, text = self._read(message)
        if reasoning:
            raise _no_thinking_error(self, index)
        if message.get("tool_calls"):
            raise RendererError(f"messages[{index}]: only the assistant can make tool_calls.")
        layout.frame(self._frames[message["role"]], index)
        tools = message.get("tools")
        if tools:
            text = text or (self.default_system or "")
        layout.text(text, SegmentKind.CONTENT, index)
        if tools:
            self._lay_out_tools(layout, tools, index, after_text=bool(text))
        self._end_turn(layout, index)

    def _lay_out_assistant(
        self, layout: Layout, message: Message, index: int, form: Hashable
    ) -> None:
        """Append a reply; formats with several `turn_forms` are told which one it takes."""
        reasoning, text = self._read(message)
        if reasoning:
            raise _no_thinking_error(self, index)
        layout.frame(self._frames["assistant"], index)
        layout.text(text, SegmentKind.CONTENT, index, sampled=True)
        self._lay_out_calls(layout, message, index, after_text=bool(text))
        self._end_turn(layout, index, sampled=True)

    # ---- tools ----

    def _lay_out_tools(
        self, layout: Layout, tools: Sequence[ToolSpec], index: int, *, after_text: bool
    ) -> None:
        if not self.writes_tools:
            raise RendererError(
                f"messages[{index}]: tools={len(tools)} tools cannot be declared in this format; "
                "use the renderer of a model with tools, such as qwen3."
            )
        declarations = "".join("\n" + json_text(tool_declaration(tool)) for tool in tools)
        gap = "\n\n" if after_text else ""
        layout.text(gap + _TOOLS_BEFORE + declarations, SegmentKind.TOOL, index)
        self._lay_out_markup(layout, _TOOLS_AFTER, index)

    def _lay_out_markup(self, layout: Layout, text: str, index: int) -> None:
        """Append a text that the format supplies; markers in it become tokens."""
        for piece in _CALL_MARKER.split(text):
            if piece in _MARKERS:
                self._marker(layout, piece, index)
            else:
                layout.text(piece, SegmentKind.TOOL, index)

    def _marker(self, layout: Layout, name: str, index: int, *, sampled: bool = False) -> None:
        token = self._marker_ids[name]
        if token is None:
            layout.text(name, SegmentKind.TOOL, index, sampled=sampled)
        else:
            layout.ids((token,), SegmentKind.TOOL, index, sampled=sampled)

    def _lay_out_calls(
        self,
        layout: Layout,
        message: Message,
        index: int,
        *,
        after_text: bool,
        sampled: bool = True,
    ) -> None:
        bodies = [f"\n{self._call_text(call)}\n" for call in message.get("tool_calls") or ()]
        for call in message.get("unparsed_tool_calls") or ():
            bodies.append(call.raw_text.removeprefix(_MARKERS[0]).removesuffix(_MARKERS[1]))
        if bodies and not self.writes_tools:
            raise RendererError(
                f"messages[{index}]: tool_calls cannot be written in this format; use the renderer "
                "of a model with tools, such as qwen3."
            )
        for number, body in enumerate(bodies):
            if after_text or number:
                gap = "\n" if number else "\n" * self.newlines_before_call
                layout.text(gap, SegmentKind.TOOL, index, sampled=sampled)
            self._marker(layout, _MARKERS[0], index, sampled=sampled)
            layout.text(body, SegmentKind.TOOL, index, sampled=sampled)
            self._marker(layout, _MARKERS[1], index, sampled=sampled)

    def _call_text(self, call: CallLike) -> str:
        """Return the text between the markers of a call, without the line breaks around it."""
        name, arguments = call_name_and_arguments(call)
        return f'{{"name": {json_text(name)}, "arguments": {arguments}}}'

    def _lay_out_tool_result(self, layout: Layout, messages: Sequence[Message], index: int) -> None:
        """Append a tool result; consecutive results share one user message."""
        shows_images = self._shows_images(messages[index])
        text = "" if shows_images else self._read(messages[index])[1]
        if index == 0 or messages[index - 1]["role"] != "tool":
            layout.frame(self._results_frame, index)
        layout.text("\n", SegmentKind.TOOL, index)
        self._marker(layout, _MARKERS[2], index)
        if shows_images:
            layout.text("\n", SegmentKind.TOOL, index)
            self._lay_out_images(layout, messages[index], index, SegmentKind.TOOL)
            layout.text("\n", SegmentKind.TOOL, index)
        else:
            layout.text(f"\n{text}\n", SegmentKind.TOOL, index)
        self._marker(layout, _MARKERS[3], index)
        if index == len(messages) - 1 or messages[index + 1]["role"] != "tool":
            self._end_turn(layout, index)

    # ---- replies ----

    def get_stop_sequences(self) -> list[int]:
        return [self._end]

    @property
    def writes_images(self) -> bool:
        return self._images is not None

    def grammar(self) -> Grammar:
        call = (self._marker_ids[_MARKERS[0]], self._marker_ids[_MARKERS[1]])
        document_end = self.encoder.control_id("<|endoftext|>")
        return Grammar(
            stop=frozenset(self._end_ids),
            eos=frozenset() if document_end is None else frozenset([document_end]),
            call=call if self.writes_tools and None not in call else None,  # pyright: ignore
            newlines_before_call=self.newlines_before_call,
        )

    def response_parser(self) -> ReplyParser:
        grammar = self.grammar()
        if self.writes_tools and grammar.call is None:
            return TextCallParser(self.encoder, grammar, *_MARKERS[:2])
        return super().response_parser()


def _no_thinking_error(renderer: Renderer, index: int) -> RendererError:
    return RendererError(
        f"messages[{index}]: {type(renderer).__name__} has no place for thinking here; remove the "
        "thinking parts, or use the renderer of a thinking model."
    )


RENDERERS = [
    NamedRenderer(
        "chatml",
        lambda tokenizer, _: ChatMLRenderer(tokenizer),
        "any tokenizer with `<|im_start|>`",
        "adds no text",
    ),
    NamedRenderer(
        "smollm2",
        lambda tokenizer, _: ChatMLRenderer(tokenizer, default_system=SMOLLM2_SYSTEM),
        "SmolLM2 Instruct",
        "its default system message",
    ),
    NamedRenderer(
        "qwen2_5",
        lambda tokenizer, _: ChatMLRenderer(tokenizer, default_system=QWEN2_5_SYSTEM, tools=True),
        "Qwen2.5 Instruct",
        "its default system message; tools",
    ),
]
