"""What a chat format defines: the contract between a format and the rest of the package.

A format is a subclass of `Renderer` (base.py), which adds rendering, training examples and parsing
to this contract. It must define three methods; the others have defaults:

| define                 | to say                                                              |
|------------------------|---------------------------------------------------------------------|
| `lay_out`              | how a whole conversation is written                                 |
| `open_turn`            | what a generation prompt adds after the last message                |
| `get_stop_sequences`   | which tokens end a sampled reply                                    |
| `grammar`              | which tokens mark reasoning and tool calls in a reply               |
| `writes_tools`         | that system messages may declare tools                              |
| `turn_forms`           | that an earlier reply is written differently from the last one      |

A module of formats ends with a list `RENDERERS` of `NamedRenderer`, and built_in.py names the
module. docs/adding_a_renderer.md has a complete example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.encoding.encoder import build_text_encoder
from tinker_cookbook.renderers.layout import Frame, Layout
from tinker_cookbook.renderers.parsing import Grammar, ReplyParser, ResponseParser
from tinker_cookbook.renderers.single_messages import (
    RenderedMessage,
    lay_out_header,
    lay_out_messages,
)
from tinker_cookbook.renderers.types import Message, RenderContext, Role, ToolSpec

if TYPE_CHECKING:
    from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["Format"]


class Format(ABC):
    """One chat format. All methods are safe to call from several threads."""

    tokenizer: Tokenizer
    roles: tuple[str, ...] = ("system", "user", "assistant", "tool")
    """Roles that the format can write; the others are refused."""
    bos_ids: tuple[int, ...] = ()
    """Tokens that `lay_out` writes before the first message. They are never trained."""
    disables_thinking: bool = False
    """Whether prompts tell the model not to think."""
    supports_streaming: bool = True
    takes_text_arguments: bool = True
    """Whether the model's own chat template takes the arguments of a call as JSON text."""
    writes_tools: bool = False
    """Whether `lay_out` writes the `tools` of a first system message."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.encoder = build_text_encoder(tokenizer)

    # ---- writing: define both ----

    def lay_out(
        self, layout: Layout, messages: Sequence[Message], forms: Sequence[Hashable]
    ) -> None:
        """Append a whole conversation, from begin-of-sequence to the last separator.

        Refuse with a RendererError what the format cannot write. Never drop it.

        Args:
            layout: where the pieces go.
            messages: the conversation; may be empty. All roles are in `roles`.
            forms: for each message, the value that `turn_forms` or `prompt_forms` returned.
        """
        del forms
        lay_out_messages(layout, messages, self.render_message)

    def open_turn(self, layout: Layout, messages: Sequence[Message], role: Role) -> None:
        """Append the header of a new message of `role`; `messages` have been written before."""
        lay_out_header(layout, messages, role, self.render_message)

    def render_message(self, message: Message, ctx: RenderContext) -> RenderedMessage:
        """Return the tokens of one message: define it instead of `lay_out` and `open_turn`."""
        raise RendererError(
            f"{type(self).__name__} does not write single messages; use render or render_prompt. "
            "A new format implements lay_out and open_turn, or render_message."
        )

    # ---- replies ----

    @abstractmethod
    def get_stop_sequences(self) -> list[int] | list[str]:
        """Return what ends a sampled turn: token ids, or texts if no token does."""

    def grammar(self) -> Grammar:
        """Return the tokens that structure a reply. Default: only the stop tokens."""
        stops = self.get_stop_sequences()
        return Grammar(stop=frozenset(stop for stop in stops if isinstance(stop, int)))

    def response_parser(self) -> ReplyParser:
        """Return a parser for one reply. Default: one that obeys `grammar`."""
        return ResponseParser(self.encoder, self.grammar())

    def fit_tool_calls(self, message: Message, tools: Sequence[ToolSpec]) -> Message:
        """Return a parsed reply whose arguments have the types that the tools declare.

        For formats that write arguments without types (`<parameter=zip>` 8001). Change only what
        the same tokens still write: text that was read as a number, truth value, null, list or
        object. Leave wrong types for the tool to refuse. Default: change nothing.
        """
        del tools
        return message

    # ---- formats that rewrite earlier turns ----

    @property
    def has_extension_property(self) -> bool:
        """Whether each prompt starts with the previous prompt and the reply sampled from it.

        If not (the format drops old reasoning, say), a conversation with several trained replies
        becomes several examples, and `turn_forms` must tell how each message is written.
        """
        return True

    def turn_forms(self, messages: Sequence[Message]) -> Sequence[Hashable]:
        """Return how the format writes each message of this conversation: any value per message.

        Two conversations that begin with the same messages in the same forms must begin with the
        same tokens. Default: there is one form only.
        """
        return [None] * len(messages)

    def prompt_forms(self, messages: Sequence[Message]) -> Sequence[Hashable]:
        """Return the forms of the messages in front of a new reply. Default: `turn_forms`."""
        return self.turn_forms(messages)

    def trains_in_one(self, messages: Sequence[Message], trained: Sequence[int]) -> bool:
        """Whether one example can hold all trained replies. Default: `has_extension_property`."""
        del messages, trained
        return self.has_extension_property

    def check_trained_turn(self, messages: Sequence[Message], index: int) -> None:
        """Raise RendererError if sampling could never produce this assistant message."""
        del messages, index

    # ---- tools and images ----

    def create_conversation_prefix_with_tools(
        self, tools: list[ToolSpec], system_prompt: str = ""
    ) -> list[Message]:
        """Return the messages that declare tools. Default: one system message with `tools`."""
        if not self.writes_tools:
            raise RendererError(
                f"{type(self).__name__} has no tool format; use a model that has one."
            )
        return [Message(role="system", content=system_prompt, tools=list(tools))]

    @property
    def writes_images(self) -> bool:
        """Whether messages may hold images. It usually depends on the image processor."""
        return False

    # ---- for use in formats ----

    def control_token(self, name: str) -> int:
        """Return the id of a control token.

        Raises:
            RendererError: if the tokenizer does not have it, so it belongs to another model.
        """
        token = self.encoder.control_id(name)
        if token is None:
            model = getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__
            raise RendererError(
                f"tokenizer={model!r} has no token {name!r}, which {type(self).__name__} needs; "
                "choose the renderer made for this model: leave renderer_name unset, or use the "
                "name that model_info.get_recommended_renderer_name returns."
            )
        return token

    def build_frame(self, control: Sequence[int], tail: str) -> Frame:
        """Return the opening of a message: control tokens, then text right before the content."""
        encoder = self.encoder
        tail_ids = encoder.encode_batch([tail])[0] if tail else []
        is_separate = not tail or (tail.endswith("\n") and encoder.newline_is_boundary)
        return Frame((*control, *tail_ids), tuple(control), tail, is_separate)
