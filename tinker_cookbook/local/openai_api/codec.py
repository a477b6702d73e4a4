"""Conversion between text and tokens: prompts are encoded, sampled tokens decoded one by one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tinker_cookbook.local.engine.sampling.stops import load_tokenizer
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.openai_api.chat_template import ChatTemplate, SafeEncoder, encode
from tinker_cookbook.local.openai_api.reply import INNER_MARKS, MARKS, marks_among
from tinker_cookbook.local.openai_api.structured import GrammarCompiler

if TYPE_CHECKING:
    from tokenizers.decoders import DecodeStream

__all__ = ["StopCutter", "TextCodec", "TextStream"]

_CONTEXT_TOKENS = 8
# Control tokens that structure an answer. All other control tokens are not shown in its text.
SHOWN_MARKERS = frozenset((*MARKS, *INNER_MARKS))


class TextCodec:
    """Tokenizer and chat template of one model folder. It may be used on several threads."""

    def __init__(self, folder: Path, vocab_size: int = 0) -> None:
        """Load them.

        Args:
            folder: the model folder.
            vocab_size: number of the model's logits, if it is larger than the tokenizer's
                vocabulary.

        Raises:
            UserError: the folder has no tokenizer.json, or its template is broken.
        """
        self._folder = folder
        self.tokenizer = load_tokenizer(str(folder))
        self._encoder = SafeEncoder(self.tokenizer)
        self.control_ids = self._encoder.control_ids
        """Names of control tokens -> their ids."""
        self.template = ChatTemplate.load(folder, self._encoder)
        self.tool_template = ChatTemplate.load(folder, self._encoder, for_tools=True)
        added = self.tokenizer.get_added_tokens_decoder()
        self.grammars = GrammarCompiler(self.tokenizer, vocab_size)
        """Compiles what a reply must look like."""
        self.longest_token = max(map(len, self.tokenizer.get_vocab()), default=1)
        """Length of the longest token in characters; limits the length of a text."""
        marks = marks_among({token.content for token in added.values()})
        self.mark_texts = {i: t.content for i, t in added.items() if t.content in marks}
        """Tokens that structure a reply -> their texts."""
        self._control_tokens = frozenset(self._encoder.control_ids.values())
        self.hidden_ids = frozenset(
            i for i, t in added.items() if t.special and t.content not in SHOWN_MARKERS
        )

    def encode_text(self, text: str) -> list[int]:
        """Encode a prompt without a chat format, as the model's tokenizer does.

        Names of control tokens in the text become control tokens, because the caller writes the
        whole prompt.
        """
        return encode(self.tokenizer, text)

    def check_length(self, num_characters: int, max_tokens: int, field: str) -> None:
        """Refuse a text that is longer than any text that fits the context.

        Raises:
            UserError: the message begins with the field.
        """
        most = max_tokens * self.longest_token
        if num_characters > most:
            raise UserError(
                f"{field} has {num_characters} characters; the context length is {max_tokens} "
                f"tokens of at most {self.longest_token} characters each, so at most {most} "
                "characters fit. Shorten it"
            )

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, with the names of control tokens."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)

    def token_text(self, token: int) -> str:
        """Return the text of one token. Bytes of an incomplete character become U+FFFD.

        In SentencePiece vocabularies, the space before a word is part of its token, but decoding
        removes the space at the start of a text. It is restored here.
        """
        text = self.decode([token])
        name = self.tokenizer.id_to_token(token) or ""
        is_cut = name.startswith("\u2581") and not text.startswith((" ", "\u2581"))
        return f" {text}" if is_cut else text

    def text_before(self, prompt: Sequence[int]) -> Sequence[int]:
        """Return the last tokens of a prompt, after the last control token.

        A `TextStream` that has read them decodes the first sampled token as the continuation of a
        text, and not as the start of one.
        """
        end = list(prompt[-_CONTEXT_TOKENS:])
        controls = [at for at, token in enumerate(end) if token in self._control_tokens]
        return end[controls[-1] + 1 :] if controls else end

    def token_bytes(self, token: int) -> list[int]:
        """Return the UTF-8 bytes of one token, even if it holds only a part of a character."""
        name = self.tokenizer.id_to_token(token) or ""
        if name in self._encoder.control_ids:
            return list(name.encode())
        if self._byte_of and all(character in self._byte_of for character in name):
            return [self._byte_of[character] for character in name]
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return [int(name[3:5], 16)]
        return list(name.replace("\u2581", " ").encode())

    @cached_property
    def image_token(self) -> int | None:
        """The token that the chat template writes for an image; None for models without images."""
        config = json.loads((self._folder / "config.json").read_text(encoding="utf-8"))
        token = config.get("image_token_id", config.get("image_token_index"))
        return token if isinstance(token, int) else None

    @cached_property
    def _byte_of(self) -> dict[str, int]:
        """Letters of a byte-level vocabulary -> their bytes; empty for other vocabularies."""
        if "ByteLevel" not in self.tokenizer.to_str()[-20_000:] + repr(self.tokenizer.decoder):
            return {}
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [value for value in range(256) if value not in shown]
        letters = [chr(value) for value in shown] + [chr(256 + n) for n in range(len(hidden))]
        return dict(zip(letters, [*shown, *hidden], strict=True))


class TextStream:
    """Decodes a completion token by token. A character is returned when it is complete."""

    def __init__(
        self, codec: TextCodec, *, hide_control: bool = True, after: Sequence[int] = ()
    ) -> None:
        """Begin empty.

        Args:
            codec: text codec of the model.
            hide_control: whether to leave out control tokens that do not structure an answer.
            after: tokens that the text continues.
        """
        from tokenizers.decoders import DecodeStream

        self._codec = codec
        self._hidden = codec.hidden_ids if hide_control else frozenset()
        self._stream: DecodeStream = DecodeStream(skip_special_tokens=False)
        self._held: list[int] = []
        for token in after:
            self._stream.step(codec.tokenizer, token)

    def push(self, token: int) -> str:
        """Add a token; returns the text that it completes."""
        if token in self._hidden:
            return self.finish()
        self._held.append(token)
        piece = self._stream.step(self._codec.tokenizer, token)
        if not piece:
            return ""
        self._held = []
        return piece

    def finish(self) -> str:
        """Return the rest: the bytes of a character that was not completed."""
        rest = self._codec.decode(self._held) if self._held else ""
        self._held = []
        return rest


class StopCutter:
    """Cuts a text off before the first stop string, and holds back a possible start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Add text; returns the part that is certainly before any stop."""
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
        """Return the text that was held back, if no stop was found."""
        rest, self._held = self._held, ""
        return rest if self.found is None else ""

    def _length_to_hold(self, text: str) -> int:
        longest = max(map(len, self._stops), default=0) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
