"""Plain text for base models: `User: ...`, blank line, `Assistant: ...`, blank line.

No template defines this format. A reply ends where the next `User:` starts, so that text is the
stop sequence. It is trained after every trained reply that is followed by a user message or by
nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.base import NamedRenderer, Renderer
from tinker_cookbook.renderers.content import split_reasoning
from tinker_cookbook.renderers.encoding.encoder import TextEncoder, Utf8TokenDecoder
from tinker_cookbook.renderers.layout import Layout, SegmentKind
from tinker_cookbook.renderers.parsing import MessageBuilder, ReplyParser
from tinker_cookbook.renderers.types import Message, MessageDelta, ParseTermination, Role
from tinker_cookbook.tokenizer_utils import Tokenizer

__all__ = ["RENDERERS", "RoleColonRenderer"]

_GAP = "\n\n"
_USER = "User:"
_STOP = _GAP + _USER


class RoleColonRenderer(Renderer):
    """`Role: text` with blank lines between, for models without a chat format."""

    roles = ("system", "user", "assistant")

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        bos = getattr(tokenizer, "bos_token_id", None)
        eos = getattr(tokenizer, "eos_token_id", None)
        # Some tokenizers declare a begin-of-sequence token that no text starts with: the end of a
        # document (Qwen), or the opening of a ChatML message (SmolLM2).
        starts_texts = bos not in (None, eos, self.encoder.control_id("<|im_start|>"))
        self.bos_ids = (bos,) if starts_texts else ()
        self._eos = frozenset() if eos is None else frozenset([eos])

    # ---- layout ----

    def lay_out(
        self, layout: Layout, messages: Sequence[Message], forms: Sequence[Hashable]
    ) -> None:
        if self.bos_ids:
            layout.ids(self.bos_ids, SegmentKind.FRAME, -1)
        header_is_written = False
        for index, message in enumerate(messages):
            if not header_is_written:
                self._lay_out_header(layout, message["role"], index)
            header_is_written = False
            sampled = message["role"] == "assistant"
            layout.text(
                " " + self._text(message, index), SegmentKind.CONTENT, index, sampled=sampled
            )
            if sampled and self._user_is_next(messages, index):
                layout.text(_GAP, SegmentKind.STOP, index, sampled=True)
                layout.text(_USER, SegmentKind.STOP, index, sampled=True)
                layout.cut()
                header_is_written = True
            else:
                layout.text(_GAP, SegmentKind.STOP, index, sampled=sampled)

    def open_turn(self, layout: Layout, messages: Sequence[Message], role: Role) -> None:
        if messages and messages[-1]["role"] == "assistant":
            if role == "user":
                return  # the stop sequence just written is the beginning of this header
            del layout.pieces[-2:]  # its "User:" and the cut after it
        self._lay_out_header(layout, role, len(messages))

    def _lay_out_header(self, layout: Layout, role: Role, index: int) -> None:
        layout.text(f"{role.capitalize()}:", SegmentKind.FRAME, index)

    @staticmethod
    def _user_is_next(messages: Sequence[Message], index: int) -> bool:
        return index + 1 == len(messages) or messages[index + 1]["role"] == "user"

    def _text(self, message: Message, index: int) -> str:
        reasoning, text = split_reasoning(message)
        if reasoning or message.get("tool_calls") or message.get("tools"):
            raise RendererError(
                f"messages[{index}]: role_colon writes plain text only; remove thinking, tools and "
                "tool_calls, or use the renderer of a chat model."
            )
        return text

    # ---- replies ----

    def get_stop_sequences(self) -> list[str]:
        return [_STOP]

    def response_parser(self) -> ReplyParser:
        return _RoleColonParser(self.encoder, self._eos)


class _RoleColonParser:
    """Splits a reply at the stop text; one space before the reply belongs to the format.

    Base models continue with the user's next message if nothing stops them. Text after the stop
    sequence is kept as `trailing_text`, and the reply itself counts as properly ended.
    """

    def __init__(self, encoder: TextEncoder, eos: frozenset[int]) -> None:
        self._encoder = encoder
        self._eos = eos
        self._decoder = Utf8TokenDecoder(encoder)
        self._builder = MessageBuilder()
        self._pending = ""
        self._is_start = True
        self._trailing: list[int] = []
        self._trailing_text = ""
        self._termination = ParseTermination.MALFORMED

    def feed(self, tokens: Iterable[int]) -> Iterator[MessageDelta]:
        """Take more tokens and yield the text that can no longer be a stop sequence."""
        run: list[int] = []
        for token in tokens:
            if self._termination is ParseTermination.EOS:
                self._trailing.append(token)
            elif token in self._eos:
                yield from self._text(self._decoder.decode_text(run) + self._decoder.flush())
                run = []
                yield from self._end_at_eos()
            else:
                run.append(token)
        if run:
            yield from self._text(self._decoder.decode_text(run))

    def finish(self) -> Iterator[MessageDelta]:
        """Take the end of the tokens and yield what was held back."""
        yield from self._text(self._decoder.flush())
        yield from self._release()

    def result(self) -> tuple[Message, ParseTermination]:
        """Return the message and how it ended."""
        message = self._builder.message()
        rest = [token for token in self._trailing if token not in self._eos]
        trailing = self._trailing_text + (self._encoder.decode(self._trailing) if rest else "")
        if trailing:
            message["trailing_text"] = trailing
        return message, ParseTermination.MALFORMED if rest else self._termination

    def _end_at_eos(self) -> Iterator[MessageDelta]:
        yield from self._release()
        if self._termination is ParseTermination.MALFORMED:
            self._termination = ParseTermination.EOS

    def _text(self, text: str) -> Iterator[MessageDelta]:
        if self._termination is ParseTermination.STOP_SEQUENCE:
            self._trailing_text += text
            return
        if self._is_start and text:
            text, self._is_start = text.removeprefix(" "), False
        self._pending += text
        before, stop, after = self._pending.partition(_STOP)
        if stop:
            self._termination = ParseTermination.STOP_SEQUENCE
            self._pending, self._trailing_text = "", after
            yield from self._builder.text(before)
            return
        held = _overlap(self._pending, _STOP)
        ready = self._pending[: len(self._pending) - held]
        self._pending = self._pending[len(ready) :]
        yield from self._builder.text(ready)

    def _release(self) -> Iterator[MessageDelta]:
        pending, self._pending = self._pending, ""
        return self._builder.text(pending)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


RENDERERS = [
    NamedRenderer(
        "role_colon",
        lambda tokenizer, _: RoleColonRenderer(tokenizer),
        "base models",
        "`User: ...`, `Assistant: ...`",
    ),
]
