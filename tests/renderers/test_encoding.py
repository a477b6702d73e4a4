"""Text to tokens and back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.assets import TOKENIZER_NAMES, load_tokenizer
from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers import Utf8TokenDecoder
from tinker_cookbook.renderers.encoding.encoder import build_text_encoder

_SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


class _SlowTokenizer:
    """A tokenizer that is not from transformers: `encode`, `decode`, and added tokens."""

    def __init__(self, name: str) -> None:
        self._inner = load_tokenizer(name)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._inner.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, tokens: list[int]) -> str:
        return self._inner.decode(tokens)

    def get_added_vocab(self) -> dict[str, int]:
        return self._inner.get_added_vocab()


@pytest.mark.parametrize("name", TOKENIZER_NAMES)
@_SETTINGS
@given(text=_TEXT)
def test_plain_text_encodes_as_the_tokenizer_does(name: str, text: str) -> None:
    tokenizer = load_tokenizer(name)
    encoder = build_text_encoder(tokenizer)
    if not any(marker in text for marker in tokenizer.get_added_vocab()):
        expected = tokenizer.encode(text, add_special_tokens=False)
        assert encoder.encode_batch([text, "x"])[0] == expected
        assert encoder.encode_markup(text) == expected
        assert encoder.decode(expected) == tokenizer.backend_tokenizer.decode(
            expected, skip_special_tokens=False
        )


@pytest.mark.parametrize("name", TOKENIZER_NAMES)
@_SETTINGS
@given(spans=st.lists(_TEXT, min_size=1, max_size=4))
def test_spans_are_one_text(name: str, spans: list[str]) -> None:
    encoder = build_text_encoder(load_tokenizer(name))
    parts = encoder.encode_spans(spans)
    assert len(parts) == len(spans)
    assert [t for part in parts for t in part] == encoder.encode_batch(["".join(spans)])[0]


@pytest.mark.parametrize("name", TOKENIZER_NAMES)
@_SETTINGS
@given(tokens=st.lists(st.integers(0, 160_000), max_size=12))
def test_tokens_decode_one_by_one_as_together(name: str, tokens: list[int]) -> None:
    encoder = build_text_encoder(load_tokenizer(name))
    decoder = Utf8TokenDecoder(encoder)
    text = "".join(decoder.decode_text([token]) for token in tokens) + decoder.flush()
    assert text == encoder.decode(tokens)
    backend = load_tokenizer(name).backend_tokenizer
    assert text == backend.decode(tokens, skip_special_tokens=False)


def test_unfinished_characters_are_held_back() -> None:
    tokenizer = load_tokenizer("qwen3")
    tokens = tokenizer.encode("𓀀", add_special_tokens=False)
    assert len(tokens) > 1
    decoder = Utf8TokenDecoder(tokenizer)
    assert decoder.decode(tokens[:1]) is None
    assert decoder.has_pending()
    assert decoder.decode(tokens[1:]) == "𓀀"
    assert not decoder.has_pending()
    assert decoder.decode(tokens[:1]) is None
    assert decoder.flush() == "\ufffd"
    assert not decoder.has_pending()


def test_lone_surrogates_are_refused_clearly() -> None:
    encoder = build_text_encoder(load_tokenizer("qwen3"))
    for call in (
        lambda: encoder.encode_batch(["ok", "abc\udcff"]),
        lambda: encoder.encode_spans(["\ud800", "x"]),
        lambda: encoder.encode_markup("\ud800"),
    ):
        with pytest.raises(RendererError, match="lone surrogate"):
            call()


def test_any_object_with_encode_and_decode_works() -> None:
    slow = build_text_encoder(_SlowTokenizer("qwen3"))
    fast = build_text_encoder(load_tokenizer("qwen3"))
    assert slow.encode_batch(["plain text\n"]) == fast.encode_batch(["plain text\n"])
    typed = "a<|im_end|>b<|im_<|im_end|>end|>"
    assert slow.decode(slow.encode_batch([typed])[0]) == typed
    assert not any(slow.is_control(token) for token in slow.encode_batch([typed])[0])
    assert slow.control_id("<|im_end|>") == fast.control_id("<|im_end|>")
    decoder = Utf8TokenDecoder(slow)
    tokens = fast.encode_batch(["日本 𓀀 é"])[0]
    assert "".join(decoder.decode_text([t]) for t in tokens) + decoder.flush() == "日本 𓀀 é"


def test_model_vocabularies_that_hold_control_tokens_are_trimmed() -> None:
    """A word-level model yields its control token from typed text unless it is taken out."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({"<end>": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    encoder = build_text_encoder(tokenizer)
    assert encoder.encode_markup("a <end>") == [1, 0]
    assert encoder.encode_batch(["a <end>"]) == [[1, 2]]
