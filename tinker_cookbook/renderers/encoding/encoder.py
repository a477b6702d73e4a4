"""Text <-> token ids, with typed text kept apart from control tokens.

A renderer writes control tokens by id and everything else through a `TextEncoder`, which does not
know any added token: text such as `<|im_end|>` or `<think>` comes out as ordinary tokens. The
encoder is private to its renderer and sets no flag on the shared tokenizer, so threads cannot
disturb it.

SentencePiece vocabularies (Gemma's) list runs of white space and HTML tags among the added tokens.
These are ordinary text; see `_is_text_token`.
"""

from __future__ import annotations

import bisect
import codecs
import itertools
import re
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.encoding.first_space import (
    FirstSpace,
    TextPlace,
    first_space,
    without_first_space,
)

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

    from tinker_cookbook.renderers.encoding.fast import FastEncoding

__all__ = ["TextEncoder", "Utf8TokenDecoder", "build_text_encoder"]

# Building and checking the fast encoding takes about as long as encoding this much with
# `tokenizers`.
CHARACTERS_BEFORE_SWITCH = 3_000_000


class TextEncoder(Protocol):
    """What renderers need of a tokenizer."""

    newline_is_boundary: bool
    """Whether text that ends in a newline can be encoded separately from text that starts with a
    non-space."""
    first_space: FirstSpace
    """Where the tokenizer inserts a space before a text; unless NEVER, `encode_placed` is
    needed."""
    replies_follow_text: bool
    """Whether prompts end in text. If so, a space at the start of a reply belongs to the reply."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode texts that each follow a control token. The result has no control tokens, nor
        begin-of-sequence."""
        ...

    def encode_spans(self, spans: Sequence[str]) -> list[list[int]]:
        """Encode the joined spans as one text; a token belongs to the span it starts in."""
        ...

    def encode_placed(self, spans: Sequence[str], place: TextPlace) -> list[list[int]]:
        """Encode like `encode_spans`, for a text that does not follow a control token."""
        ...

    def encode_markup(self, text: str) -> list[int]:
        """Encode trusted text: control tokens written in it become control tokens."""
        ...

    def control_id(self, token: str) -> int | None:
        """Return the id of an added token, None if the tokenizer does not have it."""
        ...

    def is_control(self, token: int) -> bool:
        """Whether the id is an added token."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text, with control tokens as text; ids out of range are ignored."""
        ...

    def token_bytes(self, token: int) -> bytes | None:
        """Return the UTF-8 bytes of one token; None if only a whole sequence can be decoded."""
        ...


def build_text_encoder(tokenizer: Any) -> TextEncoder:
    """Return the encoder for a transformers tokenizer, a `tokenizers.Tokenizer` or a similar
    object."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if isinstance(backend, Tokenizer):
        return _SwitchingEncoder(backend) if _is_byte_level(backend) else _BackendEncoder(backend)
    return _GenericEncoder(tokenizer)


class _BackendEncoder:
    """Encoder over the Rust tokenizer behind every fast transformers tokenizer."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        is_byte_level = _is_byte_level(backend)
        self._control_ids = {
            added.content: token
            for token, added in backend.get_added_tokens_decoder().items()
            if is_byte_level or not _is_text_token(added)
        }
        self._control_names = {token: name for name, token in self._control_ids.items()}
        self._plain = self._at_start = _without_added_tokens(backend, self._control_ids)
        self._inside = self._plain
        self.first_space = first_space(backend)
        self.replies_follow_text = True
        if self.first_space is not FirstSpace.NEVER:
            self._inside = without_first_space(backend, self._plain)
        if self.first_space is FirstSpace.AT_START:
            self._plain = self._inside
        self._byte_of = _byte_alphabet() if is_byte_level else None
        self._has_byte_tokens = is_byte_level or _falls_back_to_bytes(backend)
        self._bytes_cache: dict[int, bytes | None] = {}
        self.newline_is_boundary = all(
            self._one("user\n" + probe) == self._one("user\n") + self._one(probe)
            for probe in _BOUNDARY_PROBES
        )

    def _one(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        try:
            batch = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise _text_error(texts) from error
        return [encoding.ids for encoding in batch]

    def encode_spans(self, spans: Sequence[str]) -> list[list[int]]:
        return self._encode_spans(self._plain, spans)

    def encode_placed(self, spans: Sequence[str], place: TextPlace) -> list[list[int]]:
        if place is TextPlace.AFTER_CONTROL:
            return self.encode_spans(spans)
        tokenizer = self._at_start if place is TextPlace.START else self._inside
        return self._encode_spans(tokenizer, spans)

    @staticmethod
    def _encode_spans(tokenizer: Tokenizer, spans: Sequence[str]) -> list[list[int]]:
        text = "".join(spans)
        try:
            encoding = tokenizer.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise _text_error([text]) from error
        ends = _running_ends(spans)
        result: list[list[int]] = [[] for _ in spans]
        for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
            result[min(bisect.bisect_right(ends, start), len(spans) - 1)].append(token)
        return result

    def encode_markup(self, text: str) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise _text_error([text]) from error

    def control_id(self, token: str) -> int | None:
        return self._control_ids.get(token)

    def is_control(self, token: int) -> bool:
        return token in self._control_names

    def decode(self, tokens: Sequence[int]) -> str:
        if not self._has_byte_tokens:
            return self._backend.decode(list(tokens), skip_special_tokens=False)
        pieces = [self.token_bytes(token) or b"" for token in tokens]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes | None:
        if not self._has_byte_tokens:
            return None
        try:
            return self._bytes_cache[token]
        except KeyError:
            value = self._bytes_cache[token] = self._look_up_bytes(token)
            return value

    def _look_up_bytes(self, token: int) -> bytes:
        name = self._control_names.get(token)
        if name is not None:
            return name.encode()
        try:
            text = self._backend.id_to_token(token)
        except OverflowError:
            text = None
        if text is None:
            return b""
        byte_of = self._byte_of
        if byte_of is None:
            is_byte = _BYTE_TOKEN.fullmatch(text)
            return bytes([int(is_byte[1], 16)]) if is_byte else text.replace("▁", " ").encode()
        if all(character in byte_of for character in text):
            return bytes(byte_of[character] for character in text)
        return text.encode()


class _SwitchingEncoder(_BackendEncoder):
    """Switches to the exact fast encoding once enough text was encoded to repay building it."""

    def __init__(self, backend: Tokenizer) -> None:
        super().__init__(backend)
        self._fast: FastEncoding | None = None
        self._characters_left = CHARACTERS_BEFORE_SWITCH
        self._switch_lock = threading.Lock()

    def switch(self) -> bool:
        """Build the fast encoding now; return False if it is not installed or not proved exact."""
        with self._switch_lock:
            if self._fast is None:
                from tinker_cookbook.renderers.encoding.fast import build_fast_encoding

                self._fast = build_fast_encoding(self._plain, self._byte_of or {})
                self._characters_left = sys.maxsize
        return self._fast is not None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        fast = self._fast
        if fast is None:
            result = super().encode_batch(texts)
            self._characters_left -= sum(map(len, texts))
            if self._characters_left < 0 and not self._switch_lock.locked():
                self.switch()
            return result
        try:
            encoded = list(map(fast.encode, texts))
        except (AttributeError, TypeError) as error:
            raise _text_error(texts) from error
        slow = [index for index, tokens in enumerate(encoded) if tokens is None]
        if slow:
            by_tokenizer = super().encode_batch([texts[index] for index in slow])
            for index, tokens in zip(slow, by_tokenizer, strict=True):
                encoded[index] = tokens
        return encoded  # pyright: ignore[reportReturnType]

    def encode_spans(self, spans: Sequence[str]) -> list[list[int]]:
        if self._fast is not None:
            encoded = self._fast.encode_spans(spans)
            if encoded is not None:
                return encoded
        return super().encode_spans(spans)


# One start per class of characters that a pre-tokenizer tells apart.
_BOUNDARY_PROBES = ("a", "Z", "7", ".", "<", "_", "'s", "é", "日", "\u0301", "\U0001f600", "\u200b")


def _without_added_tokens(backend: Tokenizer, control_ids: dict[str, int]) -> Tokenizer:
    """Return a tokenizer with the same model but without the control tokens.

    The model is shared, not copied, so this takes microseconds and no memory.
    """
    from tokenizers import Tokenizer

    plain = Tokenizer(backend.model)
    plain.normalizer = backend.normalizer
    plain.pre_tokenizer = backend.pre_tokenizer
    added = backend.get_added_tokens_decoder().values()
    plain.add_tokens([token for token in added if token.content not in control_ids])
    names = list(control_ids)
    for name, encoding in zip(names, plain.encode_batch_fast(names), strict=True):
        if control_ids[name] in encoding.ids:
            return _with_trimmed_vocabulary(backend, control_ids)
    return plain


def _with_trimmed_vocabulary(backend: Tokenizer, control_ids: dict[str, int]) -> Tokenizer:
    """Do the same for models whose vocabulary contains the control tokens and produces them."""
    import json

    from tokenizers import Tokenizer

    config = json.loads(backend.to_str())
    config["added_tokens"] = [t for t in config["added_tokens"] if t["content"] not in control_ids]
    config["post_processor"] = None
    config["truncation"] = config["padding"] = None
    vocabulary = config["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        raise RendererError(
            f"tokenizer model {config['model'].get('type')!r} writes control tokens from typed "
            "text; use a byte-level BPE tokenizer."
        )
    config["model"]["vocab"] = {
        token: index for token, index in vocabulary.items() if token not in control_ids
    }
    return Tokenizer.from_str(json.dumps(config))


def _is_byte_level(backend: Tokenizer) -> bool:
    return type(backend.decoder).__name__ == "ByteLevel"


_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_TEXT_TOKEN = re.compile(r"[\s▁]+|(?!<mask>|<unused)</?[a-z]+[1-6]?>")
_BYTE_FALLBACK_DECODER = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP_FIRST_SPACE = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def _is_text_token(added: AddedToken) -> bool:
    """Whether an added token of a SentencePiece vocabulary is text: white space or an HTML tag."""
    return not added.special and _TEXT_TOKEN.fullmatch(added.content) is not None


def _falls_back_to_bytes(backend: Tokenizer) -> bool:
    """Whether tokens decode one by one: pieces with `▁` for spaces, and single bytes."""
    import json

    if type(backend.decoder).__name__ != "Sequence":
        return False
    steps = json.loads(backend.decoder.__getstate__()).get("decoders")
    return steps in (_BYTE_FALLBACK_DECODER, [*_BYTE_FALLBACK_DECODER, _STRIP_FIRST_SPACE])


def _byte_alphabet() -> dict[str, int]:
    """Return the byte behind each character of a byte-level vocabulary (the GPT-2 mapping).

    Printable Latin-1 characters represent themselves; U+0100 and following represent the other
    bytes.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


def _running_ends(spans: Sequence[str]) -> list[int]:
    ends, total = [], 0
    for span in spans:
        total += len(span)
        ends.append(total)
    return ends


def _text_error(texts: Sequence[str]) -> RendererError:
    for text in texts:
        if not isinstance(text, str):
            return RendererError(f"text={text!r} is not a string; give a string.")
        for index, character in enumerate(text):
            if 0xD800 <= ord(character) <= 0xDFFF:
                return RendererError(
                    f"character {index} of {text[max(0, index - 20) : index + 20]!r} is a lone "
                    "surrogate, which UTF-8 cannot hold; replace it, for example with "
                    "text.encode('utf-8', 'replace').decode()."
                )
    return RendererError(f"the tokenizer refuses the text {texts!r:.200}; check its type.")


class _GenericEncoder:
    """Encoder for any object with `encode` and `decode`: slower, and spans are encoded
    separately."""

    newline_is_boundary = True
    first_space = FirstSpace.NEVER
    replies_follow_text = True

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "get_added_vocab", dict)()
        self._control_ids: dict[str, int] = dict(added)

    def _encode(self, text: str) -> list[int]:
        ordinary = getattr(self._tokenizer, "encode_ordinary", None)
        if ordinary is not None:
            return list(ordinary(text))
        return [
            token
            for piece in _cut_through_markers(text, self._control_ids)
            for token in self._tokenizer.encode(piece, add_special_tokens=False)
        ]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def encode_spans(self, spans: Sequence[str]) -> list[list[int]]:
        return [self._encode(span) for span in spans]

    def encode_placed(self, spans: Sequence[str], place: TextPlace) -> list[list[int]]:
        del place
        return self.encode_spans(spans)

    def encode_markup(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def control_id(self, token: str) -> int | None:
        if token in self._control_ids:
            return self._control_ids[token]
        ids = self._tokenizer.encode(token, add_special_tokens=False)
        return ids[0] if len(ids) == 1 else None

    def is_control(self, token: int) -> bool:
        return token in self._control_ids.values()

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens))

    def token_bytes(self, token: int) -> bytes | None:
        return None


def _cut_through_markers(text: str, markers: dict[str, int]) -> list[str]:
    """Split `text` inside every control token's name, so that no piece holds a whole one."""
    cuts = {0, len(text)}
    for marker in markers:
        start = text.find(marker)
        while start >= 0:
            cuts.add(start + 1)
            start = text.find(marker, start + 1)
    places = sorted(cuts)
    return [text[a:b] for a, b in itertools.pairwise(places) if a < b]


class Utf8TokenDecoder:
    """Decodes tokens incrementally, holding back bytes of an unfinished character."""

    def __init__(self, tokenizer: Any) -> None:
        is_encoder = hasattr(tokenizer, "token_bytes")
        self._encoder: TextEncoder = tokenizer if is_encoder else build_text_encoder(tokenizer)
        writes_space = self._encoder.first_space is FirstSpace.AFTER_CONTROL
        self._drops_first_space = writes_space
        self.reset()
        self._is_at_start = writes_space and not (is_encoder and tokenizer.replies_follow_text)

    def decode(self, tokens: Sequence[int]) -> str | None:
        """Return the text that the tokens complete, or None."""
        text = self.decode_text(tokens)
        return text or None

    def decode_text(self, tokens: Sequence[int]) -> str:
        """Return the text that the tokens complete; it may be empty."""
        pieces = [self._encoder.token_bytes(token) for token in tokens]
        if self._held or any(piece is None for piece in pieces):
            return self._decode_whole(tokens)
        text = self._bytes.decode(b"".join(piece for piece in pieces if piece is not None))
        if self._is_at_start and text:
            self._is_at_start = False
            return text.removeprefix(" ")
        return text

    def _decode_whole(self, tokens: Sequence[int]) -> str:
        """Decode all tokens again and return the new text, for tokenizers without byte tokens."""
        self._held.extend(tokens)
        text = self._encoder.decode(self._held)
        stable = text.rstrip("\ufffd")
        new = stable[len(self._given) :]
        self._given = stable
        return new

    def flush(self) -> str:
        """Return the rest, with unfinished characters as U+FFFD, and reset."""
        if self._held:
            rest = self._encoder.decode(self._held)[len(self._given) :]
        else:
            rest = self._bytes.decode(b"", final=True)
        self.reset()
        return rest

    def reset(self) -> None:
        """Forget everything held back."""
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held: list[int] = []
        self._given = ""
        self._is_at_start = self._drops_first_space  # a control token precedes

    def has_pending(self) -> bool:
        """Whether bytes of an unfinished character are held back."""
        if self._held:
            return len(self._encoder.decode(self._held)) > len(self._given)
        return bool(self._bytes.getstate()[0])
