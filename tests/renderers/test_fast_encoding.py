"""The fast encoding gives the ids of the tokenizer itself, or leaves the text to it."""

from __future__ import annotations

import json
import random
import sys
import unicodedata
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.assets import load_tokenizer, tokenizer_folder
from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers import get_renderer
from tinker_cookbook.renderers.encoding import fast as fast_encoding
from tinker_cookbook.renderers.encoding.encoder import build_text_encoder
from tinker_cookbook.renderers.encoding.fast import build_fast_encoding

from .fuzz_encoding import first_difference, random_text

pytest.importorskip("tiktoken")
NAMES = ("qwen3", "llama3", "smollm2")
_SETTINGS = settings(max_examples=30, deadline=None, derandomize=True)
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@cache
def encoders(name: str) -> tuple[Any, Any]:
    """Return the fast encoder and the tokenizer's own way, for one tokenizer."""
    tokenizer = load_tokenizer(name)
    fast, slow = build_text_encoder(tokenizer), build_text_encoder(tokenizer)
    assert fast.switch()  # pyright: ignore[reportAttributeAccessIssue]
    return fast, slow


@pytest.mark.parametrize("name", NAMES)
@_SETTINGS
@given(texts=st.lists(_TEXT, min_size=1, max_size=6))
def test_texts_encode_as_by_the_tokenizer(name: str, texts: list[str]) -> None:
    fast, slow = encoders(name)
    assert fast.encode_batch(texts) == slow.encode_batch(texts)
    assert fast.encode_spans(texts) == slow.encode_spans(texts)


@pytest.mark.parametrize("name", NAMES)
def test_random_texts_encode_as_by_the_tokenizer(name: str) -> None:
    fast, slow = encoders(name)
    choose = random.Random(name)
    texts = [random_text(choose) for _ in range(800)]
    assert first_difference(fast, slow, texts) is None


@pytest.mark.parametrize("name", NAMES)
def test_every_character_encodes_as_by_the_tokenizer(name: str) -> None:
    """Each code point next to a letter, a space, a digit and itself: all classes of the splits."""
    fast, slow = encoders(name)
    codes = [c for c in range(sys.maxunicode + 1) if not 0xD800 <= c <= 0xDFFF]
    known = [chr(c) for c in codes if unicodedata.category(chr(c)) not in ("Cn", "Co")]
    step = 7 if name == "qwen3" else 23  # the big comparison takes all
    texts = [f"a{c}b {c} 1{c}2{c}{c}\n{c}" for c in known[::step]]
    texts = ["".join(texts[i : i + 40]) for i in range(0, len(texts), 40)]
    assert first_difference(fast, slow, texts) is None
    assert fast._fast.encode(texts[3]) is not None


@pytest.mark.parametrize("name", NAMES)
def test_texts_left_to_the_tokenizer(name: str) -> None:
    fast, slow = encoders(name)
    texts = [" " * 200_000 + "x", "\U0001df2b\U00011de0", "a\U000e0fff", "x\x04y\U00040000"]
    texts += ["\u1906\u1a25\u1ac4\u18a9", "e\u1ac4\u0323\u0301 n\u0303"]  # marks of Unicode 14
    assert fast.encode_batch(["plain", *texts, "text"]) == slow.encode_batch(
        ["plain", *texts, "text"]
    )
    assert fast._fast.encode(texts[0]) is None


@pytest.mark.parametrize("name", NAMES)
def test_bad_texts_are_refused_as_by_the_tokenizer(name: str) -> None:
    fast, _ = encoders(name)
    for bad in ("\ud800", "abc\udcff", "é\udfff"):
        with pytest.raises(RendererError, match="lone surrogate"):
            fast.encode_batch(["ok", bad])
        with pytest.raises(RendererError, match="lone surrogate"):
            fast.encode_spans(["ok", bad])
    with pytest.raises(RendererError, match="is not a string"):
        fast.encode_batch(["ok", 3])


@pytest.mark.parametrize("name", NAMES)
def test_control_tokens_stay_text(name: str) -> None:
    fast, _ = encoders(name)
    texts = [f"a{marker}b" for marker in load_tokenizer(name).get_added_vocab()]
    for text, tokens in zip(texts, fast.encode_batch(texts), strict=True):
        assert not any(fast.is_control(token) for token in tokens)
        assert fast.decode(tokens) == text


def test_latin1_needs_no_look_at_each_character() -> None:
    """What the shortcut for texts below U+0100 takes for granted."""
    codes = [chr(code) for code in range(0x100)]
    assert all(unicodedata.category(code) not in ("Cn", "Cs") for code in codes)
    assert all(unicodedata.is_normalized("NFC", a + b) for a in codes for b in codes)
    fast, _ = encoders("qwen3")
    assert fast._fast._trusts_latin1


@pytest.mark.parametrize("rules", fast_encoding._KNOWN_SPLITS, ids=lambda rules: rules[-1][:30])
def test_only_what_never_looks_ahead_is_grouped(rules: tuple[str, ...]) -> None:
    """No alternative moves, and the group itself has no lookahead."""
    rule = fast_encoding._KNOWN_SPLITS[rules]
    grouped = fast_encoding._grouped(rule)
    group, rest = grouped.removeprefix("(?:").split(r")|\s+(?!")
    assert rf"{group}|\s+(?!{rest}" == rule
    assert "(?!" not in group
    assert "(?=" not in group


def _edited(change: Any) -> Any:
    """Return what the fast encoding makes of an edited SmolLM2 tokenizer."""
    from tokenizers import Tokenizer

    from tinker_cookbook.renderers.encoding.encoder import _byte_alphabet

    config = json.loads((tokenizer_folder("smollm2") / "tokenizer.json").read_text("utf-8"))
    config["added_tokens"] = []
    change(config)
    return build_fast_encoding(Tokenizer.from_str(json.dumps(config)), _byte_alphabet())


def _swap_merges(config: Any) -> None:
    merges = config["model"]["merges"]
    merges[100], merges[2000] = merges[2000], merges[100]


def _drop_merge(config: Any) -> None:
    """A whole word of two tokens that tiktoken would merge inside longer words as well."""
    config["model"]["ignore_merges"] = True
    del config["model"]["merges"][-1]


def _other_split(config: Any) -> None:
    config["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False


@pytest.mark.parametrize(
    "change",
    [
        _swap_merges,
        _drop_merge,
        _other_split,
        lambda config: config.update(normalizer={"type": "NFKC"}),
        lambda config: config["model"].update(dropout=0.1),
        lambda config: config["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    ],
)
def test_tokenizers_not_proved_equal_are_refused(change: Any) -> None:
    assert _edited(change) is None


def test_tokens_without_merges_are_left_out() -> None:
    """Where words are not looked up whole, a token that no merge makes never comes out.

    Also shows that it is the changes above for which tokenizers are refused.
    """
    fast = _edited(lambda config: config["model"]["merges"].pop())
    assert fast is not None


def test_renderers_switch_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinker_cookbook.renderers.encoding.encoder.CHARACTERS_BEFORE_SWITCH", 2000)
    renderer = get_renderer("smollm2", load_tokenizer("smollm2"))
    talk: Any = [
        {"role": "user", "content": "Hi é 日本 123"},
        {"role": "assistant", "content": " Yes.\n"},
    ]
    before = renderer.render_batch([talk] * 10)
    encoder: Any = renderer.encoder
    assert encoder._fast is None
    renderer.render_batch([talk] * 200)
    assert encoder._fast is not None
    assert [r.segments for r in renderer.render_batch([talk] * 10)] == [r.segments for r in before]
