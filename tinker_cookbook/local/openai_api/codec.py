"""Text of a model: prompts to token ids, sampled tokens to text as they come."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tinker_cookbook.local.engine.sampling.stops import load_tokenizer
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.openai_api.chat_template import ChatTemplate, SafeEncoder, encode
from tinker_cookbook.local.openai_api.reply import INNER_MARKS, MARKS, marks_among

__all__ = ["StopCutter", "TextCodec", "TextStream"]

# Control tokens that structure an answer; all others are left out of its text.
_CONTEXT_TOKENS = 8
SHOWN_MARKERS = frozenset((*MARKS, *INNER_MARKS))


class TextCodec:
    """Tokenizer and chat template of one model folder. Thread-safe once made."""

    def __init__(self, folder: Path) -> None:
        """Load them.

        Raises:
            UserError: the folder has no tokenizer.json, or its template is broken.
        """
        self._folder = folder
        self.tokenizer = load_tokenizer(str(folder))
        self._encoder = SafeEncoder(self.tokenizer)
        self.template = ChatTemplate.load(folder, self._encoder)
        self.tool_template = ChatTemplate.load(folder, self._encoder, for_tools=True)
        added = self.tokenizer.get_added_tokens_decoder()
        self.longest_token = max(map(len, self.tokenizer.get_vocab()), default=1)
        """Characters of the longest token: no text of so many tokens is longer."""
        marks = marks_among({token.content for token in added.values()})
        self.mark_texts = {i: t.content for i, t in added.items() if t.content in marks}
        """Tokens that a reader of replies takes as marks."""
        self._control_tokens = frozenset(self._encoder.control_ids.values())
        self.hidden_ids = frozenset(
            i for i, t in added.items() if t.special and t.content not in SHOWN_MARKERS
        )

    def encode_text(self, text: str) -> list[int]:
        """A prompt without chat format, as the model's tokenizer encodes any text.

        Control tokens written in it become control tokens: it is the caller's whole prompt.
        """
        return encode(self.tokenizer, text)

    def check_length(self, num_characters: int, max_tokens: int, field: str) -> None:
        """Refuse a text that cannot fit a context, however it is cut into tokens.

        Raises:
            UserError: it begins with the field.
        """
        most = max_tokens * self.longest_token
        if num_characters > most:
            raise UserError(
                f"{field} has {num_characters} characters; the context length is {max_tokens} "
                f"tokens of at most {self.longest_token} characters each, so {most} are the most "
                "that can fit. Shorten it"
            )

    def decode(self, tokens: Sequence[int]) -> str:
        """All text, control tokens written out."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)

    def token_text(self, token: int) -> str:
        """One token alone; bytes that are no text by themselves show as U+FFFD.

        SentencePiece vocabularies write the space before a word as part of its token, and leave it
        out at the start of a text; a token has it wherever it stands.
        """
        text = self.decode([token])
        name = self.tokenizer.id_to_token(token) or ""
        is_cut = name.startswith("\u2581") and not text.startswith((" ", "\u2581"))
        return f" {text}" if is_cut else text

    def text_before(self, prompt: Sequence[int]) -> Sequence[int]:
        """The end of a prompt whose text the next token continues; nothing after a control token.

        A `TextStream` that has read it gives the first token as text in its place, and not as the
        start of a text.
        """
        end = list(prompt[-_CONTEXT_TOKENS:])
        controls = [at for at, token in enumerate(end) if token in self._control_tokens]
        return end[controls[-1] + 1 :] if controls else end

    def token_bytes(self, token: int) -> list[int]:
        """UTF-8 bytes of one token, also where it holds part of a character only."""
        name = self.tokenizer.id_to_token(token) or ""
        if name in self._encoder.control_ids:
            return list(name.encode())
        if self._byte_of and all(character in self._byte_of for character in name):
            return [self._byte_of[character] for character in name]
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return [int(name[3:5], 16)]
        return list(name.replace("\u2581", " ").encode())

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """The byte behind each letter of a byte-level vocabulary; empty for other kinds."""
        if "ByteLevel" not in self.tokenizer.to_str()[-20_000:] + repr(self.tokenizer.decoder):
            return {}
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [value for value in range(256) if value not in shown]
        letters = [chr(value) for value in shown] + [chr(256 + n) for n in range(len(hidden))]
        return dict(zip(letters, [*shown, *hidden], strict=True))


class TextStream:
    """Decodes a completion token by token; a character is given out once it is whole."""

    def __init__(
        self, codec: TextCodec, *, hide_control: bool = True, after: Sequence[int] = ()
    ) -> None:
        """Begin empty; control tokens are left out unless told otherwise.

        Args:
            codec: of the model.
            hide_control: leave control tokens out.
            after: tokens that the text continues.
        """
        from tokenizers.decoders import DecodeStream

        self._codec = codec
        self._hidden = codec.hidden_ids if hide_control else frozenset()
        self._stream: Any = DecodeStream(skip_special_tokens=False)
        self._held: list[int] = []
        for token in after:
            self._stream.step(codec.tokenizer, token)

    def push(self, token: int) -> str:
        """Take a token and return the text that it completes."""
        if token in self._hidden:
            return self.finish()
        self._held.append(token)
        piece = self._stream.step(self._codec.tokenizer, token)
        if not piece:
            return ""
        self._held = []
        return piece

    def finish(self) -> str:
        """What is left of a character that was never completed."""
        rest = self._codec.decode(self._held) if self._held else ""
        self._held = []
        return rest


class StopCutter:
    """Ends a text before the first stop string, and holds back what may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Take more text and return what certainly stands before any stop."""
        if self.found is not None:
            return ""
        text = self._held + text
        hits = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if hits:
            at, self.found = min(hits)
            self._held = ""
            return text[:at]
        keep = self._length_to_hold(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text that was held back, if no stop was found."""
        rest, self._held = self._held, ""
        return rest if self.found is None else ""

    def _length_to_hold(self, text: str) -> int:
        longest = max(map(len, self._stops), default=0) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
